"""Metrics against their closed forms, and against the laws they must obey."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.metrics import (
    Estimate,
    block_estimate,
    divergence,
    kl,
    nll,
    perplexity,
    relative_error,
    sqnr_db,
    top1_agreement,
)

seeds = st.integers(0, 2**31 - 1)


def logits(seed: int, rows: int = 5, vocabulary: int = 33, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


# ---- KL


def test_kl_of_two_coins() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert kl(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, shift=st.floats(-50, 50))
def test_kl_laws(seed: int, shift: float) -> None:
    p, q = logits(seed), logits(seed + 1)
    value = kl(p, q)
    assert value.dtype == torch.float32 and value.shape == (5,)
    assert (value >= 0).all()
    assert kl(p, p + shift).max() < 1e-6  # logits count up to a constant
    assert kl(p, p).max() == 0
    oracle = torch.nn.functional.kl_div(
        q.double().log_softmax(-1), p.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(value.double(), oracle, rtol=1e-6, atol=1e-9)


def test_kl_in_slabs_equals_kl_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = logits(0, rows=11), logits(1, rows=11)
    whole = kl(p, q)
    monkeypatch.setattr(divergence, "_SLAB_ELEMENTS", 33 * 4)
    assert torch.equal(kl(p, q), whole)


def test_kl_resolves_a_divergence_far_below_float32_rounding() -> None:
    p = logits(0, rows=1, vocabulary=49152).double()
    q = p + 1e-5 * logits(1, rows=1, vocabulary=49152).double()
    expected = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum().item()
    assert 0 < expected < 1e-8
    assert kl(p, q).item() == pytest.approx(expected, rel=1e-3)


def test_kl_with_tokens_ruled_out() -> None:
    p = torch.tensor([[0.0, 0.0, -math.inf]])
    q = torch.tensor([[0.0, 0.0, 0.0]])
    assert kl(p, q).item() == pytest.approx(math.log(1.5))
    assert kl(q, p).item() == math.inf
    assert kl(p, p).item() == 0.0


def test_shapes_must_match() -> None:
    for function in (kl, top1_agreement):
        with pytest.raises(ValueError, match="one shape"):
            function(logits(0), logits(0)[:, :-1])
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="targets"):
        nll(logits(0), torch.zeros(4, dtype=torch.int64))


def test_top1() -> None:
    p = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    q = torch.tensor([[0.0, 9.0], [0.0, 1.0]])
    assert top1_agreement(p, q).tolist() == [True, False]


# ---- perplexity


def test_nll_and_perplexity_of_a_uniform_guess() -> None:
    targets = torch.tensor([0, 3, 32, 7, 1])
    values = nll(torch.zeros(5, 33), targets)
    torch.testing.assert_close(values, torch.full((5,), math.log(33)))
    result = perplexity(Estimate(mean=math.log(33), stderr=0.01, n=5))
    assert result.mean == pytest.approx(33) and result.stderr == pytest.approx(0.33) and result.n == 5
    torch.testing.assert_close(
        nll(logits(3), targets), torch.nn.functional.cross_entropy(logits(3), targets, reduction="none")
    )


def test_a_hopeless_perplexity_is_infinite_and_null_in_json() -> None:
    result = perplexity(Estimate(mean=800.0, stderr=1.0, n=1))
    assert result.mean == math.inf
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["mean"] is None


# ---- error


@settings(max_examples=40, deadline=None)
@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_error_laws(seed: int, scale: float) -> None:
    x = logits(seed).double()
    noise = logits(seed + 1).double() * 0.01
    error = relative_error(x, x + noise)
    assert error == pytest.approx((noise.square().sum() / x.square().sum()).item(), rel=1e-9)
    assert relative_error(x * scale, (x + noise) * scale) == pytest.approx(error, rel=1e-9)
    assert sqnr_db(x, x + noise) == pytest.approx(-10 * math.log10(error))


def test_error_at_the_edges() -> None:
    x = torch.ones(3)
    assert relative_error(x, x) == 0 and sqnr_db(x, x) == math.inf
    assert relative_error(torch.zeros(3), x) == math.inf and sqnr_db(torch.zeros(3), x) == -math.inf
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert sqnr_db(x, torch.full((3,), 0.5)) == pytest.approx(20 * math.log10(2))


# ---- estimates


def test_block_estimate_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0], [5.0, 7.0], [0.0, 2.0]])  # block means 2, 6, 1
    result = block_estimate(values)
    assert result.mean == pytest.approx(3.0) and result.n == 6
    assert result.stderr == pytest.approx(math.sqrt(7.0) / math.sqrt(3))  # variance of 2, 6, 1 is 7
    assert block_estimate(values.reshape(-1), block=2) == result


def test_stderr_covers_blocks_that_move_together() -> None:
    # 64 blocks of 256 values that hardly differ inside a block: the naive error would be 16 times too small.
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(64, 1, generator=generator) + 0.01 * torch.randn(64, 256, generator=generator)
    assert block_estimate(blocks).stderr == pytest.approx(1 / 8, rel=0.25)


def test_one_block_has_no_error_bar() -> None:
    result = block_estimate(torch.ones(1, 4))
    assert math.isnan(result.stderr) and result.to_dict()["stderr"] is None and str(result) == "1"
    assert "±" in str(block_estimate(torch.tensor([[1.0], [2.0]])))
    with pytest.raises(ValueError, match="no values"):
        block_estimate(torch.empty(0))
