"""Our quantizers of GGUF types: the bytes of the gguf package, the error of ggml, and their own laws."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from make_ggml_quantize import TYPES, importances, matrices, sqnr

from fewbits.algorithms.gptq import GPTQ
from fewbits.algorithms.rtn import RTN
from fewbits.calibration.stats import Inputs
from fewbits.checkpoints.gguf_pack import block_bytes, from_blocks, to_blocks
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Quantized, parse_format

LEGACY = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
GGML = json.loads(Path(__file__).with_name("ggml_quantize.json").read_text())


def edge_cases() -> torch.Tensor:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-7, 3, 64)[:, None]
    w[0, :32], w[1, :32], w[2, :32], w[3, :32] = 0, 1, -1, 1e-30
    w[4, 0], w[4, 1] = 5, -5  # equal magnitudes: the first one's sign counts
    w[5, 0], w[5, 1] = -5, 5
    w[6, :64] = torch.arange(-32, 32) / 4  # ties
    return w


@pytest.mark.parametrize("name", LEGACY)
def test_legacy_types_equal_the_reference_to_the_byte(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name.upper()]
    for w in (edge_cases(), *(torch.from_numpy(w) for w in matrices().values())):
        assert np.array_equal(to_blocks(parse_format(name).quantize(w)).numpy(), gguf.quants.quantize(w.numpy(), kind))


@pytest.mark.parametrize("name", TYPES)
def test_bytes_say_what_was_computed(name: str) -> None:
    format, kind = parse_format(name), gguf.GGMLQuantizationType[name.upper()]
    assert block_bytes(format) == gguf.GGML_QUANT_SIZES[kind][1]
    for w in (edge_cases(), torch.zeros(2, 256)):
        q = format.quantize(w)
        blocks = to_blocks(q)
        assert 8 * blocks.numel() / w.numel() == pytest.approx(format.bits_per_weight((64, 256)))
        decoded = gguf.quants.dequantize(blocks.numpy(), kind)
        assert np.array_equal(q.dequantize().numpy(), decoded)
        assert np.array_equal(from_blocks(format, blocks).dequantize().numpy(), decoded)
        again = Quantized.from_state(format, q.shape, q.to_state())
        assert np.array_equal(again.dequantize().numpy(), decoded)
        assert torch.equal(to_blocks(again), blocks)


@pytest.mark.parametrize("name", TYPES)
def test_error_is_at_most_that_of_ggml(name: str) -> None:
    importance = importances()
    for what, w in matrices().items():
        plain, weighted = GGML[name][what]
        format, weight = parse_format(name), torch.from_numpy(w)
        ours = sqnr(w, format.quantize(weight).dequantize().numpy(), np.ones(w.shape[1]))
        assert ours >= plain - 0.005
        decoded = format.quantize(weight, importance=torch.from_numpy(importance)).dequantize().numpy()
        assert sqnr(w, decoded, importance) >= weighted - 0.02


@pytest.mark.parametrize("name", ["q4_1", "q5_0", "q2_k", "q3_k", "q4_k", "q6_k"])
def test_gptq_uses_the_blocks(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 256, generator=generator)
    x = torch.randn(512, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    hessian = 2 * x.T @ x / len(x)
    format = parse_format(name)
    solved = GPTQ().solve(weight, format, Inputs(hessian=hessian), "layer")
    assert solved.loss is not None and solved.rtn_loss is not None
    assert float(solved.loss.sum()) < 0.8 * float(solved.rtn_loss.sum())
    blocks = to_blocks(solved.quantized)
    assert torch.equal(from_blocks(format, blocks).dequantize(), solved.quantized.dequantize())
    assert RTN().solve(weight, format, Inputs(), "layer").quantized.codes.shape == weight.shape


def test_rows_that_blocks_do_not_fit_are_refused_with_the_fallback() -> None:
    with pytest.raises(BadInput, match=r"layer: .*576 .* q4_k's 256: use q5_0"):
        parse_format("q4_k").quantize(torch.randn(4, 576), "layer")
    with pytest.raises(BadInput, match=r"keep it in 16 bits"):
        parse_format("q4_0").quantize(torch.randn(4, 40), "layer")


def test_what_fp16_cannot_hold_is_refused() -> None:
    with pytest.raises(BadInput, match="overflows the fp16"):
        parse_format("q4_0").quantize(torch.full((1, 32), 1e6))


@pytest.mark.parametrize("importance", [torch.ones(31), torch.full((32,), float("nan")), -torch.ones(32)])
def test_importances_must_fit(importance: torch.Tensor) -> None:
    with pytest.raises(BadInput, match=r"layer: importance"):
        parse_format("q4_0").quantize(torch.randn(2, 32), "layer", importance=importance)


def test_other_formats_have_no_gguf_type() -> None:
    with pytest.raises(Unsupported, match=r"nf4-g64 has no GGUF type.*q4_k"):
        to_blocks(parse_format("nf4-g64").quantize(torch.randn(2, 64)))
