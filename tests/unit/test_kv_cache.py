"""The quantized cache: a transformers cache, packed for real, rounded once, with what must stay exact left exact."""

from __future__ import annotations

import pytest
import torch
from tiny_runtime_models import byte_tokenizer, tiny_llama
from transformers import DynamicCache

from fewbits.core.errors import BadInput, Unsupported
from fewbits.evaluation import evaluate
from fewbits.formats import hadamard, parse_format
from fewbits.formats.kv import KVFormat, parse_kv
from fewbits.nn.kv_cache import QuantizedKVCache, QuantizedKVLayer
from fewbits.runtime.generate import stream

TOKENIZER = byte_tokenizer()
IDS = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def states(tokens: int, *, width: int = 64, seed: int = 0, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 2, tokens, width, generator=torch.Generator().manual_seed(seed))


def filled(name: str, keys: torch.Tensor, values: torch.Tensor, step: int = 1000) -> QuantizedKVLayer:
    layer = QuantizedKVLayer(parse_kv(name))
    for start in range(0, keys.shape[2], step):
        layer.update(keys[:, :, start : start + step], values[:, :, start : start + step])
    return layer


def held(layer: QuantizedKVLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values, decoded."""
    nothing = layer.keys[:, :, :0]
    return layer.update(nothing, nothing)


@torch.no_grad()
def logits(model, cache, step: int) -> torch.Tensor:
    return torch.cat([model(part, past_key_values=cache).logits for part in IDS.split(step, 1)], 1)


# ---- as a transformers cache


def test_with_nothing_quantized_it_is_the_cache_of_transformers(model) -> None:
    ours = logits(model, QuantizedKVCache(model.config, "int2-recent200"), 30)
    assert torch.equal(ours, logits(model, DynamicCache(config=model.config), 30))


@pytest.mark.parametrize("name", ["int8", "fp8", "int4", "int4-rotated-token", "int3-g8", "nf4", "int2"])
def test_logits_follow_the_bits(model, name: str) -> None:
    cache = QuantizedKVCache(model.config, f"{name}-recent8-first2")
    exact, ours = logits(model, DynamicCache(config=model.config), 10), logits(model, cache, 10)
    assert cache.layers[0].stored_tokens >= 64
    error = float((ours - exact)[:, 50:].norm() / exact[:, 50:].norm())
    assert 0 < error < {"int8": 0.005, "fp8": 0.04, "int3-g8": 0.25, "int2": 0.5}.get(name, 0.12)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_generate_takes_it(model, options) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0  # a batch padded on the left
    torch.manual_seed(0)
    cache = QuantizedKVCache(model.config, "int8-g16-recent16")
    settings = {"max_new_tokens": 40, "pad_token_id": 257, "eos_token_id": None, **{"do_sample": False, **options}}
    out = model.generate(IDS, attention_mask=mask, past_key_values=cache, **settings)
    assert out.shape == (2, 140) and cache.get_seq_length() == 139
    torch.manual_seed(0)
    plain = model.generate(IDS, attention_mask=mask, **settings)
    assert (out == plain).float().mean() > 0.9


def test_layers_of_sliding_attention_stay_as_they_are() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("gemma2", num_hidden_layers=2, sliding_window=16)
    kinds = [type(layer).__name__ for layer in QuantizedKVCache(config, "int4").layers]
    assert sorted(kinds) == ["DynamicSlidingWindowLayer", "QuantizedKVLayer"]
    only = AutoConfig.for_model("mistral", num_hidden_layers=2, sliding_window=16)
    with pytest.raises(Unsupported, match="no layer of full attention"):
        QuantizedKVCache(only, "int4")


# ---- what is stored


def test_stored_states_are_those_of_the_formats() -> None:
    keys, values = states(100), states(100, seed=1)
    got_keys, got_values = held(filled("int4-recent20-first4", keys, values, step=7))
    for got, given, by_channel in ((got_keys, keys, True), (got_values, values, False)):
        assert torch.equal(got[:, :, :4], given[:, :, :4]) and torch.equal(got[:, :, 68:], given[:, :, 68:])
        middle = given[:, :, 4:68]
        rows = middle.transpose(2, 3) if by_channel else middle
        format = parse_format("int4-min-g32").with_scale_dtype(torch.float16)
        rounded = format.quantize(rows.reshape(-1, rows.shape[3])).dequantize().view(rows.shape)
        assert torch.equal(got[:, :, 4:68], rounded.transpose(2, 3) if by_channel else rounded)


def test_a_rotated_cache_rounds_rotated_heads() -> None:
    keys, values = states(32, width=96), states(32, width=96, seed=1)
    _, got = held(filled("int4-recent0-first0-rotated", keys, values))
    orders = hadamard.block_factors(96)
    format = parse_format("int4-min-g32").with_scale_dtype(torch.float16)
    turned = format.quantize(hadamard.transform(values, orders).reshape(-1, 96)).dequantize().view(values.shape)
    torch.testing.assert_close(got, hadamard.transform(turned, orders, inverse=True))


@pytest.mark.parametrize(
    "name", ["int2-recent8", "int3-g16-recent0-first0", "fp8-recent5-rotated", "int4-token-recent8"]
)
def test_how_tokens_arrive_does_not_matter_and_each_is_rounded_once(name: str) -> None:
    keys, values = states(90, width=80), states(90, width=80, seed=1)
    whole = held(filled(name, keys, values))
    for step in (1, 13):
        for ours, expected in zip(held(filled(name, keys, values, step)), whole, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "fp8", "int3-g16", "int4-rotated-token"])
def test_memory_is_what_is_said(name: str) -> None:
    kv = parse_kv(f"{name}-recent0-first0")
    layer = filled(kv.name, states(96), states(96, seed=1))
    assert layer.stored_tokens == 96
    assert layer.nbytes == 2 * 96 * kv.bytes_per_token(heads=2, width=64)
    bits = {"int2": 3, "int4": 5, "int8": 9, "fp8": 8.5, "int3-g16": 5, "int4-rotated-token": 5}[name]
    assert kv.bits_per_number(64) == (bits, bits)


def test_recent_and_first_tokens_take_the_dtype_of_the_states() -> None:
    kv = parse_kv("int4-recent16-first4")
    layer = filled(kv.name, states(100).bfloat16(), states(100, seed=1).bfloat16())
    assert layer.stored_tokens == 64 and layer.keys.dtype == torch.bfloat16
    plain = 36 * 2 * 2 * 64 * 2
    assert layer.nbytes == 2 * (plain + 64 * kv.bytes_per_token(heads=2, width=64))
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes  # nothing of what was stored is kept alive


@pytest.mark.parametrize("removed", [5, 16, 30, 70, 97, 100])
def test_crop(removed: int) -> None:
    keys, values = states(100), states(100, seed=1)
    layer = filled("int8-g16-recent16", keys, values)
    layer.crop(-removed)
    assert layer.get_seq_length() == 100 - removed
    got = held(layer)
    layer.update(keys[:, :, 100 - removed :], values[:, :, 100 - removed :])
    for cropped, again, given in zip(got, held(layer), (keys, values), strict=True):
        torch.testing.assert_close(cropped, given[:, :, : 100 - removed], atol=0.03, rtol=0)
        torch.testing.assert_close(again, given, atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(3)


def test_batches_are_picked_and_repeated() -> None:
    keys, values = states(80, batch=3), states(80, seed=1, batch=3)
    expected = held(filled("int4-recent8", keys, values))
    layer = filled("int4-recent8", keys, values)
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(held(layer)[0], expected[0][[2, 0, 0]])
    layer.batch_select_indices(torch.tensor([1]))
    layer.batch_repeat_interleave(2)
    assert torch.equal(held(layer)[0], expected[0][[0, 0]])
    layer.reset()
    assert layer.get_seq_length() == layer.nbytes == 0


# ---- why it is laid out so


@pytest.mark.parametrize("width", [64, 128])
def test_two_bit_keys_want_scales_per_channel(width: int) -> None:
    """One channel 30 times the others, one scale a token and head against one a channel."""
    keys = states(256, width=width)
    keys[..., 5] += 30
    by_channel = held(filled("int2-recent0-first0", keys, keys))[0] - keys
    by_token = held(filled(f"int2-g{width}-recent0-first0-token", keys, keys))[0] - keys
    assert float(by_token.square().mean() / by_channel.square().mean()) > 20
    # An outlier that changes sign pays for its own range; it is the other channels that are spared.
    keys[..., 5] = states(256, width=width, seed=3)[..., 5] * 30
    by_channel = held(filled("int2-recent0-first0", keys, keys))[0] - keys
    by_token = held(filled(f"int2-g{width}-recent0-first0-token", keys, keys))[0] - keys
    others = [channel for channel in range(width) if channel != 5]
    assert float(by_token[..., others].square().mean() / by_channel[..., others].square().mean()) > 20


# ---- names, and where they go


def test_names() -> None:
    assert parse_kv("int4") == KVFormat(element="int4")
    named = parse_kv("FP8-token-g64-recent0-rotated-first1")
    assert named == KVFormat(element="fp8_e4m3", group=64, recent=0, first=1, rotated=True, by_token=True)
    assert parse_kv(named.name) == named


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("int5x", "int5"),
        ("dynamic8u", "dynamic8"),
        ("int4-window3", "recent128"),
        ("int4-g1", "groups of 1"),
        ("w4a16", "key-value cache"),
    ],
)
def test_unknown_names(name: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        parse_kv(name)


def test_streaming(model) -> None:
    text = stream(model, TOKENIZER, "hello world " * 5, max_new_tokens=20, ignore_eos=True, kv="int8-g8-recent8")
    list(text)
    plain = stream(model, TOKENIZER, "hello world " * 5, max_new_tokens=20, ignore_eos=True)
    list(plain)
    assert text.ids[:12] == plain.ids[:12] and text.runner == "transformers model, key-value cache int8-g8-recent8"
    with pytest.raises(BadInput, match="key-value cache"):
        stream(model, TOKENIZER, "hello", kv="float")


def test_evaluating(model) -> None:
    options = {"text": ["the quick brown fox " * 60], "samples": 2, "sequence_length": 128}
    with pytest.raises(BadInput, match="windows of 128 tokens never read the cache int2"):
        evaluate((model, TOKENIZER), kv="int2", **options)
    two, eight = (
        evaluate((model, TOKENIZER), against=(model, TOKENIZER), kv=f"{name}-recent0-first0", **options)
        for name in ("int2", "int8")
    )
    assert two.kl.mean > 20 * eight.kl.mean > 0
    assert "keys and values as int8-recent0-first0, 32 tokens" in eight.method
