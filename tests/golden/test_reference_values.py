"""What other packages decode after quantizing the same matrix is what we decode (see make_reference_values.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewbits.formats import parse_format
from fewbits.formats.elements import ELEMENTS

VALUES = load_file(Path(__file__).with_name("reference_values.safetensors"))
MATRIX = VALUES["inputs/matrix"]
# bitsandbytes' CPU code takes a coarser neighbour of some small values; torchao multiplies the two scales of NVFP4 in
# another order.
INEXACT = ("bitsandbytes/dynamic8-g256", "torchao/nvfp4")


def named(*packages: str) -> list[str]:
    return [name for name in VALUES if name.split("/")[0] in packages and name not in INEXACT]


@pytest.mark.parametrize("name", named("ml_dtypes"))
def test_minifloats_round_as_ml_dtypes(name: str) -> None:
    element = name.split("/")[1]
    assert torch.equal(ELEMENTS[element].snap(VALUES[f"inputs/{element}"]) + 0.0, VALUES[name] + 0.0)


@pytest.mark.parametrize("name", named("bitsandbytes", "compressed-tensors", "torchao"))
def test_the_same_values_to_the_bit(name: str) -> None:
    decoded = parse_format(name.split("/")[1]).quantize(MATRIX).dequantize()
    assert torch.equal(decoded + 0.0, VALUES[name] + 0.0)


def test_double_quantized_scales_are_those_of_bitsandbytes() -> None:
    found, expected = parse_format("nf4-g64-dq").quantize(MATRIX).scale, VALUES["scales/nf4-g64-dq"]
    live = MATRIX.unflatten(1, (-1, 64)).abs().amax(-1) > 0
    # The mean they subtract counts blocks of zeros, ours does not: scales may fall on a neighbouring code.
    assert torch.allclose(found[live], expected[live], rtol=0.02, atol=0.02 * float(expected.max()))


def test_nvfp4_but_for_the_last_bit() -> None:
    decoded = parse_format("nvfp4").quantize(MATRIX).dequantize()
    assert torch.allclose(decoded, VALUES["torchao/nvfp4"], rtol=3e-7, atol=0)


def test_dynamic_codes_are_at_least_as_near_as_those_of_bitsandbytes() -> None:
    ours, theirs = parse_format("dynamic8-g256").quantize(MATRIX).dequantize(), VALUES["bitsandbytes/dynamic8-g256"]
    assert bool(((ours - MATRIX).abs() <= (theirs - MATRIX).abs() + 1e-9).all())
    assert float((ours == theirs).float().mean()) > 0.8
