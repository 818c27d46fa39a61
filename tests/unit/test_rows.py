"""Activations are rounded row by row, and the products of a scheme are those of what both sides can say."""

from __future__ import annotations

import pytest
import torch

from fewbits.core.errors import BadInput
from fewbits.formats import SCHEMES, parse_format, parse_scheme
from fewbits.formats.rows import round_rows
from fewbits.kernels import KERNELS, LinearSpec, choose
from fewbits.nn.qlinear import QLinear

X = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 3, 50, 2e4])[:, None]
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1, ties to the even code, by comparing with every level."""
    levels = torch.tensor(E2M1, dtype=torch.float64)
    distance = (x.double().abs().clamp(max=6)[..., None] - levels).abs()
    nearest = distance == distance.amin(-1, keepdim=True)
    even = torch.arange(8) % 2 == 0
    code = torch.where(nearest.sum(-1, keepdim=True) > 1, nearest & even, nearest).int().argmax(-1)
    return (levels[code] * x.double().sign()).float()


def test_mxfp4_bit_for_bit() -> None:
    blocks = X.view(5, 8, 32)
    scale = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True).double())) - 2).float()
    assert torch.equal(round_rows(X, parse_format("mxfp4")), (to_e2m1(blocks / scale) * scale).view(5, 256))


def test_nvfp4_bit_for_bit_with_an_outer_scale_a_token() -> None:
    blocks = X.view(5, 16, 16)
    raw = blocks.abs().amax(-1, keepdim=True) / 6
    outer = raw.amax(1, keepdim=True) / 448
    scale = (raw / outer).clamp(2**-9, 448).to(torch.float8_e4m3fn).float() * outer
    assert torch.equal(round_rows(X, parse_format("nvfp4")), (to_e2m1(blocks / scale) * scale).view(5, 256))


def test_fp8_tiles_of_a_token_bit_for_bit() -> None:
    blocks = X.view(5, 2, 128)
    scale = blocks.abs().amax(-1, keepdim=True) / 448
    expected = (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(round_rows(X, parse_format("fp8_e4m3-g128")), expected.view(5, 256))


ROUNDED = sorted({activations for _, activations in SCHEMES.values() if activations is not None})


@pytest.mark.parametrize("name", ROUNDED)
def test_a_token_does_not_know_its_neighbours(name: str) -> None:
    format = parse_format(name)
    fixed = format.params(X) if format.scaling.static else None
    together, alone = round_rows(X, format, fixed), torch.cat([round_rows(row, format, fixed) for row in X.split(1)])
    assert torch.equal(together, alone)
    assert torch.equal(round_rows(torch.zeros(2, 256), format), torch.zeros(2, 256))
    assert round_rows(X[:0], format).shape == (0, 256)
    with pytest.raises(BadInput, match="NaN or infinite"):
        round_rows(torch.full((1, 256), torch.nan), format)


@pytest.mark.parametrize("scheme", [name for name, (_, activations) in SCHEMES.items() if activations is not None])
def test_the_product_of_a_scheme_is_that_of_what_it_says(scheme: str) -> None:
    found = parse_scheme(scheme)
    weight = found.weights.quantize(torch.randn(96, 256, generator=torch.Generator().manual_seed(1)))
    fixed = found.activations.params(X) if found.activations.scaling.static else None
    inputs = {} if fixed is None else {"input_scale": fixed[0]}
    module = QLinear.from_quantized(weight, activations=found.activations, inputs=inputs)
    expected = round_rows(X, found.activations, fixed) @ weight.dequantize().t()
    y = module(X)
    spec = LinearSpec(format=weight.format, shape=(96, 256), device=X.device, activations=found.activations)
    kernel = choose(spec)
    floor = 10 ** (-min(kernel.floor_db, 110) / 20)
    assert float((y - expected).norm(dim=1).div(expected.norm(dim=1).clamp(min=1e-9)).max()) < 2 * floor
    assert not module.input_state() or found.activations.scaling.static
    if found.activations.scaling.block == "group":
        assert not KERNELS.get("cpu_int4").accepts(spec) and not KERNELS.get("cpu_int8").accepts(spec)


def test_scales_over_rows_are_refused() -> None:
    for name in ("int8-channel", "fp8_block", "nf4-g64-dq", "int8-token-static", "fp4_e2m1-g32-e8m0-static"):
        with pytest.raises(BadInput, match="activations as"):
            QLinear(64, 64, parse_format("int8-channel"), activations=parse_format(name))
