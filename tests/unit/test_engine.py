"""The decode engine computes what the transformers model does, and says when it cannot."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from tiny_runtime_models import quantize_in_place, tiny_llama

from fewbits.core.errors import BadInput, Unsupported
from fewbits.kernels import No
from fewbits.metrics.error import sqnr_db
from fewbits.nn import qlinears
from fewbits.runtime.engine import Engine, accepts, engine_for

IDS = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(3)).tolist()
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# The head's float16 weights; bfloat16 x in each product of the 4-bit and 8-bit kernels, over two layers.
EXACT_DB, KERNEL_DB = 68.0, 37.0


@torch.no_grad()
def expected(model) -> torch.Tensor:
    return model(torch.tensor([IDS])).logits[0].float()


def check(model, limit: float) -> None:
    reference = expected(model)
    whole = Engine(model, capacity=4).prefill(IDS, every=True)
    assert whole.dtype == torch.float32 and sqnr_db(reference, whole) > limit
    engine = Engine(model, capacity=4)  # grows several times on the way
    stepped = [engine.prefill(IDS[:7]), *(engine.step(token) for token in IDS[7:])]
    assert engine.tokens == IDS
    assert sqnr_db(reference[6:], torch.stack(stepped)) > limit


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"tied": False, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 32}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tied": False}),
        ("qwen3", {}),
    ],
)
def test_dense_logits(model_type: str, changes: dict) -> None:
    check(tiny_llama(model_type=model_type, **changes), EXACT_DB)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("int4-asym-g32", KERNEL_DB),
        ("int8-asym-channel", KERNEL_DB),
        ("nf4-g64", EXACT_DB),
        ("int4-tensor", KERNEL_DB),
    ],
)
def test_quantized_logits(model_type: str, name: str, limit: float) -> None:
    check(quantize_in_place(tiny_llama(model_type=model_type), name), limit)


def test_quantized_activations() -> None:
    # Rounding x per token turns on the last bit of x, so two correct programs differ by single steps.
    check(quantize_in_place(tiny_llama(), "int8-channel", "int8-token"), 18.0)


def test_bfloat16_weights() -> None:
    check(tiny_llama().to(torch.bfloat16), 25.0)  # transformers rounds hidden states to bfloat16, the engine does not


def test_joined_weights_share_memory_with_the_modules() -> None:
    model = quantize_in_place(tiny_llama(intermediate_size=192), "int4-asym-g32")
    before = {name: module.dequantize() for name, module in qlinears(model)}
    engine = Engine(model)
    up = model.model.layers[0].mlp.up_proj
    gate = model.model.layers[0].mlp.gate_proj
    storage = up.packed["weight"].untyped_storage().data_ptr()
    assert storage == gate.packed["weight"].untyped_storage().data_ptr()
    assert all(torch.equal(module.dequantize(), before[name]) for name, module in qlinears(model))
    assert sqnr_db(expected(model), engine.prefill(IDS, every=True)) > KERNEL_DB


def test_a_common_beginning_is_not_read_again() -> None:
    model = tiny_llama()
    engine, fresh = Engine(model), Engine(model)
    engine.prefill([*IDS[:10], 1, 2, 3])
    read = []
    inner = engine._read
    engine._read = lambda ids, every: (read.append(list(ids)), inner(ids, every))[1]
    again = engine.prefill(IDS[:14])
    assert read == [IDS[10:14]]
    torch.testing.assert_close(again, fresh.prefill(IDS[:14]), rtol=1e-4, atol=1e-5)
    assert engine.tokens == IDS[:14]
    engine.prefill(IDS[:14])
    assert read[-1] == IDS[13:14], "the last token is read for its logits"


def test_the_context_ends() -> None:
    engine = Engine(tiny_llama(max_position_embeddings=16))
    with pytest.raises(BadInput, match="16 at most"):
        engine.prefill(IDS)
    with pytest.raises(BadInput, match="empty"):
        engine.prefill([])
    engine.prefill(IDS[:16])
    with pytest.raises(BadInput, match="full"):
        engine.step(1)


def hooked(model):
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return model


def with_foreign_linear(model):
    model.model.layers[0].mlp.up_proj = torch.nn.Sequential(model.model.layers[0].mlp.up_proj)
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tiny_llama(hidden_act="gelu"), "gelu"),
        (lambda: tiny_llama(model_type="mistral", sliding_window=64), "sliding"),
        (lambda: tiny_llama(model_type="olmo2"), "olmo2"),
        (lambda: tiny_llama().train(), "eval"),
        (lambda: hooked(tiny_llama()), "hooks"),
        (lambda: with_foreign_linear(tiny_llama()), "Sequential"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
        (
            lambda: tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "dynamic",
        ),
    ],
)
def test_what_it_refuses(make, says: str) -> None:
    model = make()
    answer = accepts(model)
    assert isinstance(answer, No) and says in answer.reason
    with pytest.raises(Unsupported, match=says):
        Engine(model)


def test_one_engine_a_model_until_its_weights_change() -> None:
    model = tiny_llama()
    first = engine_for(model)
    assert engine_for(model) is first
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    second = engine_for(model)
    assert second is not first
    assert sqnr_db(expected(model), second.prefill(IDS, every=True)) > EXACT_DB
    assert engine_for(copy.deepcopy(model)) is not second


def test_the_engine_does_not_keep_the_model_alive() -> None:
    model = tiny_llama()
    engine_for(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
