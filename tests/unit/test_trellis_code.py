"""A trellis code is worth its search: EXL3's and QTIP's code book, walked by Viterbi, on Gaussian numbers.

Two bits a number: state t is the last L bits of a stream that grows by two each step, and stands for one number of the
code book. Lloyd-Max, one number at a time, stays at a squared error of 0.1175; the rate-distortion bound is 0.0625.
Sources: QTIP (arXiv 2406.11235), tables 1 and 2, and its algorithm 4 for codes whose ends meet.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.checkpoints.exl3 import _values

BRANCHES, LENGTH = 4, 256


def gaussians(rows: int) -> Tensor:
    """Quantiles of N(0, 1) in random order [rows, LENGTH]: their own spread adds nothing to the error's."""
    count = rows * LENGTH
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()
    return quantiles[torch.randperm(count, generator=torch.Generator().manual_seed(0))].view(rows, LENGTH)


def best_paths(x: Tensor, book: Tensor, ring: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The states of least error [rows, LENGTH] and that error [rows]; `ring` [rows]: the bits both ends share."""
    high, low = torch.arange(len(book)) // BRANCHES, torch.arange(len(book)) % (len(book) // BRANCHES)
    cost = (x[:, :1] - book).square()
    if ring is not None:
        cost = torch.where(high == ring[:, None], cost, torch.inf)
    came = []
    for number in x[:, 1:].split(1, dim=1):
        cost, which = cost.view(len(x), BRANCHES, -1).min(1)
        came.append(which.to(torch.uint8))
        cost = cost.repeat_interleave(BRANCHES, 1) + (number - book).square()
    if ring is not None:
        cost = torch.where(low == ring[:, None], cost, torch.inf)
    error, state = cost.min(1)
    states = [state]
    for which in reversed(came):
        before = state // BRANCHES
        state = which.gather(1, before[:, None])[:, 0].long() * (len(book) // BRANCHES) + before
        states.append(state)
    return torch.stack(states[::-1], 1), error


@pytest.fixture(scope="module")
def book() -> Tensor:
    return _values("3inst").double()


def test_the_spread_of_the_code_book(book: Tensor) -> None:
    assert float(book.std(correction=0)) == pytest.approx(1.24371088, abs=2e-6)


@pytest.mark.parametrize(
    ("bits", "rows", "error", "within"),
    [(12, 96, 0.0733, 0.0007), pytest.param(16, 48, 0.069, 0.001, marks=pytest.mark.slow)],
)
def test_codes_whose_ends_meet(book: Tensor, bits: int, rows: int, error: float, within: float) -> None:
    some = book[: 1 << bits]
    scaled, found = (some / some.std()).float(), []
    for x in gaussians(rows).split(8):  # few at a time stay in a CPU's cache
        turned, _ = best_paths(x.roll(LENGTH // 2, 1), scaled)
        states, errors = best_paths(x, scaled, turned[:, LENGTH // 2] // BRANCHES)
        kept = len(scaled) // BRANCHES
        assert bool((states[:, 1:] // BRANCHES == states[:, :-1] % kept).all())
        assert bool((states[:, 0] // BRANCHES == states[:, -1] % kept).all())
        assert torch.allclose((x - scaled[states]).square().sum(1), errors, rtol=1e-4)
        found.append(errors)
    assert float(torch.cat(found).mean()) / LENGTH == pytest.approx(error, abs=within)
