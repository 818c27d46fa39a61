"""LLM-FP4: the shifts change no function, and the search has none of the traps of the published one."""

from __future__ import annotations

import math

import pytest
import torch
from test_awq import NAMES, first_block

from fewbits.algorithms.base import proxy_loss
from fewbits.algorithms.channels import RoundedLoss, scalables
from fewbits.algorithms.compose import compose
from fewbits.algorithms.llm_fp4 import LLMFP4
from fewbits.algorithms.preshift import PreShift, shift_limit, shifts
from fewbits.calibration.stats import ROWS, Inputs, InputSum
from fewbits.core.errors import BadInput
from fewbits.formats import Quantized, parse_format
from fewbits.formats.minifloat import bias_of

W = torch.randn(12, 96, generator=torch.Generator().manual_seed(0))
X = torch.randn(400, 96, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 3, 96)
INPUTS = Inputs(hessian=(X.T @ X * (2 / 400)).double(), rows=X, tokens=400)


def solve(weight: torch.Tensor, name: str = "fp4_e2m1-channel", **options):
    return LLMFP4(**options).solve(weight, parse_format(name), INPUTS, "layer")


# ---- the search of ranges


@pytest.mark.parametrize("absmax", [12.0, 6.0, 3.0, 100.0, 1e-3])
def test_a_bias_of_zero_or_below_is_a_bias_like_any_other(absmax: float) -> None:
    """Multiples of the bias are all one at absmax 12 (bias 0) and run backwards above it (recipe 1.8)."""
    assert bias_of(12.0, 2, 1) == 0 > bias_of(100.0, 2, 1)
    plain, scaled = solve(W), solve(W * (absmax / W.abs().amax(1, keepdim=True)))
    assert float((plain.loss / plain.rtn_loss).mean()) < 0.99
    unit = solve(W / W.abs().amax(1, keepdim=True))
    assert float((scaled.quantized.codes != unit.quantized.codes).float().mean()) < 0.01  # ties at the last bit
    torch.testing.assert_close(scaled.quantized.scale, unit.quantized.scale * absmax, rtol=1e-4, atol=0)


def test_absmax_itself_and_both_ends_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published grid has no 1 and never tries its last candidate."""
    tried = []

    def params(self, low, high):
        tried.append(float((high / W.abs().amax(1, keepdim=True)).mean()))
        return torch.ones_like(high), None

    monkeypatch.setattr("fewbits.formats.base.Format.params_from_range", params)
    solve(W)
    assert {round(factor, 4) for factor in tried} >= {1.0, 0.4, 1.2}
    assert len(set(tried)) >= 17


@pytest.mark.parametrize(
    "name", ["fp4_e2m1-channel", "int4-channel", "fp4_e3m0-g32", "fp4_e2m1-tensor", "nvfp4_4over6"]
)
def test_never_worse_than_absmax(name: str) -> None:
    found = solve(W, name)
    ours = proxy_loss(W - found.quantized.dequantize(), INPUTS.hessian)
    torch.testing.assert_close(ours, found.loss)
    assert float(found.loss.sum()) <= float(found.rtn_loss.sum()) * (1 + 1e-6)


def test_e1m2_is_int4_of_the_restricted_range() -> None:
    a, b = solve(W, "fp4_e1m2-channel"), solve(W, "int4-narrow-channel")
    torch.testing.assert_close(a.quantized.dequantize(), b.quantized.dequantize())


def test_a_row_of_zeros() -> None:
    weight = W.clone()
    weight[3] = 0
    found = solve(weight)
    assert torch.equal(found.quantized.dequantize()[3], weight[3])
    assert bool(torch.isfinite(found.loss).all())


# ---- exponent bits


def test_the_exponent_follows_the_tails() -> None:
    torch.manual_seed(0)
    flat, heavy = torch.rand(16, 96) * 2 - 1, torch.randn(16, 96).mul(2).exp() * torch.randn(16, 96).sign()
    grids = [solve(weight, "fp4_fit-channel").quantized for weight in (flat, heavy)]
    assert [quantized.format.grid.name for quantized in grids] == ["fp4_e1m2", "fp4_e3m0"]
    for quantized in grids:
        state = quantized.to_state()
        again = Quantized.from_state(parse_format("fp4_fit-channel"), quantized.shape, state)
        assert torch.equal(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize(("name", "bits"), [("fp4_fit-channel", 4), ("fp8_fit-channel", 8)])
def test_exponent_and_mantissa_share_the_bits(name: str, bits: int) -> None:
    """The published 8-bit activations may take E+M = 9."""
    grids = [made.grid for made in parse_format(name).choices(W)]
    assert len(grids) == {4: 3, 8: 5}[bits]
    assert grids[0].levels == parse_format(name).grid.levels
    assert {grid.bits for grid in grids} == {bits}
    assert all(len(grid.levels) == 2**bits - 1 for grid in grids)


def test_rounding_to_nearest_takes_the_best_grid_too() -> None:
    for name, elements in (("fp4_fit", ("fp4_e1m2", "fp4_e2m1", "fp4_e3m0")), ("fp8_fit", ("fp8_e3m4", "fp8_e2m5"))):
        fitted = float((W - parse_format(f"{name}-g32").quantize(W).dequantize()).square().sum())
        each = [float((W - parse_format(f"{e}-g32").quantize(W).dequantize()).square().sum()) for e in elements]
        assert fitted <= min(each)


# ---- pre-shifted exponents


@pytest.mark.parametrize("name", NAMES)
def test_shifts_change_nothing_but_exponents(name: str) -> None:
    run, ids, block = first_block(name)
    before = run(ids)
    for place in scalables(block):
        k = shifts(place.tie(torch.rand(place.stages[0].refs[0].shape[1]) ** 8), 0, 7)
        assert bool(k.any())
        place.scale(torch.exp2(-k))
    after = run(ids)
    # Powers of two round nowhere but in the order of sums; experts are in float32.
    assert float((after - before).norm() / before.norm()) < (1e-12 if before.dtype == torch.float64 else 1e-5)


def test_shifts_by_hand() -> None:
    reach = torch.tensor([32.0, 16.0, 5.0, 1.0, 0.01, 0.0])
    assert shifts(reach, 0, 3).tolist() == [0, 1, 3, 3, 3, 0]  # a channel that is never active: log2(0)
    assert shifts(reach, 2, 3).tolist() == [0, 0, 1, 3, 3, 0]
    assert shifts(torch.zeros(3), 0, 3).tolist() == [0, 0, 0]
    # The paper's form: the integer parts of real biases, clamped to what E2 can say above the tensor's own.
    rho = bias_of(32.0, 2, 1)
    expected = [min(max(round(bias_of(value, 2, 1)) - round(rho), 0), 3) for value in reach[:-1].tolist()]
    assert all(abs(a - b) <= 1 for a, b in zip(shifts(reach, 0, 3).tolist(), expected, strict=False))


def test_limits() -> None:
    names = ("fp4_e2m1-token", "fp4_e3m0-token", "fp4_e1m2-token", "fp8_e4m3-token", "int4-token")
    assert [shift_limit(parse_format(name)) for name in names] == [3, 7, 1, 15, 3]


def block_with_rows(outliers: float, activations: str | None = "fp4_e2m1-token"):
    import dataclasses

    run, ids, block = first_block("llama")
    block = dataclasses.replace(
        block, format=parse_format("fp4_e2m1-channel"), activations=activations and parse_format(activations)
    )
    for stage in block.stages:
        rows = torch.randn(64, stage.refs[0].shape[1], generator=torch.Generator().manual_seed(1))
        rows[:, ::7] *= outliers
        stage.inputs = dataclasses.replace(stage.inputs, rows=rows)
    return run, ids, block


def test_shifts_are_taken_where_channels_differ() -> None:
    run, ids, block = block_with_rows(8.0)
    before = run(ids)
    place = next(iter(scalables(block)))
    k = PreShift().best(place, block)
    assert k is not None and set(k[::7].tolist()) == {0.0} and float(k.max()) <= 3
    assert RoundedLoss(place.stages, block)(torch.exp2(-k)) < 0.7 * RoundedLoss(place.stages, block)(None)
    changed = PreShift().apply(block).changed
    assert any("norm" in name for name in changed)
    assert float((run(ids) - before).norm() / before.norm()) < 1e-12


def test_nothing_is_shifted_where_inputs_are_not_rounded() -> None:
    run, ids, block = block_with_rows(8.0, None)
    before = run(ids)
    done = PreShift().apply(block)
    assert not done.changed and "not rounded" in next(iter(done.notes.values()))[0]
    assert torch.equal(run(ids), before)


def test_the_method_brings_its_shifts() -> None:
    assert compose("llm_fp4").names == ("preshift", "llm_fp4")
    assert compose("preshift,gptq").names == ("preshift", "gptq")
    assert compose("llm_fp4", {"preshift.limit": 5}).transforms[0].limit == 5
    with pytest.raises(BadInput, match="both make the codes"):
        compose("llm_fp4,gptq")


@pytest.mark.parametrize("options", [{"steps": 0}, {"low": 0.0}, {"low": 2.0}, {"high": math.inf}])
def test_bad_options(options: dict) -> None:
    with pytest.raises(BadInput):
        LLMFP4(**options)


# ---- the sample of inputs


def test_rows_are_an_even_sample_however_they_arrive() -> None:
    x = torch.arange(3000.0)[:, None].expand(3000, 4)
    for step in (3000, 7, 512):
        total = InputSum(4, frozenset({"rows"}))
        for part in x.split(step):
            total.add(part)
        rows = total.inputs("x").rows
        assert ROWS <= len(rows) < 2 * ROWS and torch.equal(rows[:, 0], torch.arange(0, 3000.0, 8))
    merged, other = InputSum(4, frozenset({"rows"})), InputSum(4, frozenset({"rows"}))
    merged.add(x[:100])
    other.add(x[100:200])
    merged.merge(other)
    assert len(merged.inputs("x").rows) == 200
    assert torch.equal(merged.inputs("x").divided(torch.full((4,), 2.0)).rows, x[:200] / 2)
