"""SmoothQuant's own laws, in float64."""

from __future__ import annotations

import pytest
import torch

from fewbits.algorithms.smoothing import smoothing_scales
from fewbits.core.errors import BadInput


def layer() -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    x[:, 3] *= 60
    x[:, 7] = 0
    return x, [torch.randn(rows, 32, generator=generator, dtype=torch.float64) for rows in (16, 8)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_the_product_stays_and_the_difficulty_moves(alpha: float) -> None:
    x, weights = layer()
    active, heavy = x.abs().amax(0), torch.cat(weights).abs().amax(0)
    s = smoothing_scales(active, weights, alpha)
    assert bool((s > 0).all()) and float(s[7]) == 1
    for weight in weights:
        exact = x @ weight.T
        assert float(((x / s) @ (weight * s).T - exact).norm() / exact.norm()) <= 1e-12
    alive = active > 0
    expected = active.pow(1 - alpha) * heavy.pow(1 - alpha)
    assert torch.allclose((x / s).abs().amax(0)[alive], expected[alive], rtol=1e-12)


def test_at_one_half_both_sides_are_equally_hard() -> None:
    x, weights = layer()
    s = smoothing_scales(x.abs().amax(0), weights)
    alive = x.abs().amax(0) > 0
    ends = (x / s).abs().amax(0), (torch.cat(weights) * s).abs().amax(0)
    assert torch.allclose(ends[0][alive], ends[1][alive], rtol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match=r"alpha 1\.5"):
        smoothing_scales(torch.ones(4), [torch.ones(2, 4)], 1.5)
    with pytest.raises(BadInput, match="4 activation channels for weights of 5 columns"):
        smoothing_scales(torch.ones(4), [torch.ones(2, 5)])
