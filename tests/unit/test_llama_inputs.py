"""How llama.cpp rounds inputs: its rule for Q8_K value by value, the gguf package's Q8_0, and who meets what."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from interop.llama_inputs import MEETS, RULES, q8_0, q8_k, round_inputs
from tiny_runtime_models import saved, tiny_llama
from torch import Tensor, nn

from fewbits.checkpoints.gguf_blocks import readable
from fewbits.checkpoints.gguf_export import write_gguf
from fewbits.checkpoints.source import open_source
from fewbits.models.skeleton import load_model


def inputs() -> Tensor:
    """[24, 512]: sizes over nine decades, zeros, ties of codes, two largest of either sign."""
    x = torch.randn(24, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 24)[:, None]
    x[0, :256], x[1] = 0, 0
    x[2, :255], x[2, 255] = torch.arange(-127, 128) / 2, 127  # half of them ties
    x[3, :2], x[4, :2] = torch.tensor([900.0, -900.0]), torch.tensor([-900.0, 900.0])
    return x


def q8_k_by_value(block: list[np.float32]) -> list[np.float32]:
    """quantize_row_q8_K_ref and dequantize_row_q8_K, one float32 operation after the other."""
    largest = np.float32(0)
    for value in block:
        if abs(value) > abs(largest):
            largest = value
    if largest == 0:
        return [np.float32(0)] * len(block)
    inverse = np.float32(-127) / largest
    scale = np.float32(1) / inverse
    magic = np.float32(12582912)  # 1.5 * 2^23: added, it leaves the nearest integer in the low bits
    return [scale * np.float32(min(127, int(inverse * value + magic - magic))) for value in block]


def test_q8_k_is_llama_cpps_to_the_bit() -> None:
    x = inputs()
    expected = [q8_k_by_value(list(block)) for block in x.view(-1, 256).numpy()]
    assert np.array_equal(q8_k(x).view(-1, 256).numpy(), np.array(expected))


def test_q8_0_is_the_gguf_packages_to_the_bit() -> None:
    x, kind = inputs(), gguf.GGMLQuantizationType.Q8_0
    assert np.array_equal(q8_0(x).numpy(), gguf.quants.dequantize(gguf.quants.quantize(x.numpy(), kind), kind))


@pytest.mark.parametrize("rule", [q8_0, q8_k])
def test_inputs_keep_their_shape_and_lose_half_a_step(rule) -> None:
    x = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(1))
    error = (rule(x) - x).abs()
    assert error.shape == x.shape
    step = x.abs().max() / 127
    assert 0 < error.max() < 0.51 * step


def test_every_type_that_is_read_meets_a_type_of_inputs() -> None:
    assert set(MEETS) == set(readable())
    assert set(MEETS.values()) == {"F32", *RULES}
    assert (MEETS["Q4_K"], MEETS["Q5_0"], MEETS["Q5_1"], MEETS["TQ1_0"]) == ("Q8_K", "Q8_0", "Q8_1", "Q8_K")


def test_linears_of_a_file_get_rounded_inputs(tmp_path: Path) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=256)
    write_gguf(open_source(saved(model, tmp_path / "m")), tmp_path / "m.gguf", weights="q4_k", dense="F32")
    source = open_source(tmp_path / "m.gguf")
    model = load_model(source, dtype=torch.float32)
    met = round_inputs(model, source)
    assert met["Q8_K"] > 0 and met["Q8_0"] > 0 and met["F32"] > 0  # down, the others, the head
    block = model.model.layers[0].mlp
    for linear, rule in ((block.down_proj, q8_k), (block.up_proj, q8_0), (model.lm_head, lambda x: x)):
        x = torch.randn(3, linear.in_features)
        assert torch.equal(linear(x), nn.functional.linear(rule(x), linear.weight))
