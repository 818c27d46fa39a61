"""GPTAQ's and the refinement's own laws, and how steps compose."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.algorithms.base import proxy_loss
from fewbits.algorithms.clipping import RangeSearch
from fewbits.algorithms.compose import compose
from fewbits.algorithms.gptaq import GPTAQ
from fewbits.algorithms.gptq import GPTQ
from fewbits.algorithms.refine import Refine, descend, refit_scales
from fewbits.algorithms.rtn import RTN
from fewbits.calibration.stats import Inputs, InputSum
from fewbits.core.errors import BadInput
from fewbits.formats import Quantized, parse_format


def drifted(n: int = 128, tokens: int = 2000, drift: float = 0.3) -> tuple[Tensor, Tensor, Inputs]:
    """(original inputs, the inputs a quantized model would see, their statistics), float64."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ (mix + torch.eye(n))
    noise = torch.randn(tokens, n, generator=generator, dtype=torch.float64)
    bent = x - drift * x @ mix + 0.05 * noise
    sums = InputSum(n, frozenset({"hessian", "cross"}))
    sums.add(bent, x)
    return x, bent, sums.inputs("layer")


def weight_of(n: int = 128) -> Tensor:
    return torch.randn(32, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def output_error(x: Tensor, bent: Tensor, weight: Tensor, q: Quantized) -> float:
    return float((x @ weight.T - bent @ q.dequantize(torch.float64).T).square().mean())


@pytest.mark.parametrize("options", [{}, {"act_order": False}, {"act_order": False, "static_groups": False}])
def test_without_drift_gptaq_is_gptq_bit_for_bit(options: dict[str, bool]) -> None:
    _, _, inputs = drifted()
    assert inputs.cross is not None
    still = dataclasses.replace(inputs, cross=torch.zeros_like(inputs.cross))
    format, weight = parse_format("int3-asym-g32"), weight_of()
    plain = GPTQ(**options).solve(weight, format, inputs, "w").quantized
    for found in (
        GPTAQ(**options).solve(weight, format, still, "w").quantized,
        GPTAQ(**options).solve(weight, format, dataclasses.replace(inputs, cross=None), "w").quantized,
        GPTAQ(strength=0.0, **options).solve(weight, format, inputs, "w").quantized,
    ):
        assert torch.equal(found.codes, plain.codes) and torch.equal(found.scale, plain.scale)


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptaq_brings_the_output_back_to_the_original(act_order: bool, block_size: int) -> None:
    x, bent, inputs = drifted()
    format, weight = parse_format("int4-asym-g32"), weight_of()
    options = {"act_order": act_order, "block_size": block_size}
    plain = output_error(x, bent, weight, GPTQ(**options).solve(weight, format, inputs, "w").quantized)
    errors = [
        output_error(x, bent, weight, GPTAQ(strength=strength, **options).solve(weight, format, inputs, "w").quantized)
        for strength in (0.25, 1.0)
    ]
    assert errors[1] < errors[0] < plain


def test_gptaq_does_not_depend_on_the_block_size() -> None:
    _, _, inputs = drifted()
    format, weight = parse_format("int3-asym-g32"), weight_of()
    for options in ({}, {"act_order": False, "static_groups": False}):
        codes = [
            GPTAQ(block_size=size, **options).solve(weight, format, inputs, "w").quantized.codes
            for size in (1, 16, 128)
        ]
        assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("name", ["int3-asym-g32", "int2-g32", "nf4-g64", "fp4_e2m1-g16", "nvfp4", "mxfp4"])
def test_every_half_step_lowers_the_loss(name: str) -> None:
    _, _, inputs = drifted()
    assert inputs.hessian is not None
    weight, hessian, format = weight_of().float(), inputs.hessian.float(), parse_format(name)
    found = GPTQ().solve(weight, format, inputs, "w").quantized
    before = proxy_loss(weight - found.dequantize(), hessian).sum()
    moved = descend(found, weight, hessian)
    after = proxy_loss(weight - moved.dequantize(), hessian).sum()
    assert float(after) <= float(before) * (1 + 1e-6)
    again = descend(moved, weight, hessian)
    assert float(proxy_loss(weight - again.dequantize(), hessian).sum()) <= float(after) * (1 + 1e-6)


def test_refitted_scales_are_least_squares() -> None:
    """No scale nearby does better, before rounding to a stored dtype (float32 here)."""
    _, _, inputs = drifted()
    assert inputs.hessian is not None
    weight, hessian = weight_of(), inputs.hessian
    found = RTN().solve(weight.float(), parse_format("int3-asym-g32"), inputs, "w").quantized
    best = refit_scales(found, weight, hessian)
    assert torch.equal(best.codes, found.codes)

    def loss(scale: Tensor) -> Tensor:
        expanded, zero = best.format.expand(scale, best.zero, best.shape)
        return proxy_loss(weight - best.format.decode(best.codes, expanded, zero, torch.float64), hessian)

    least = loss(best.scale.double())
    assert bool((least <= loss(found.scale.double()) * (1 + 1e-9)).all())
    for group in range(best.scale.shape[1]):
        for factor in (0.99, 1.01):
            nudged = best.scale.double().clone()
            nudged[:, group] *= factor
            assert bool((loss(nudged) >= least * (1 - 1e-9)).all())


@pytest.mark.parametrize("first", ["rtn", "gptq", "gptaq"])
def test_refinement_gains_on_what_came_before(first: str) -> None:
    x, bent, inputs = drifted()
    weight, format = weight_of().float(), parse_format("int3-asym-g32")
    recipe = compose(f"{first},refine")
    before = recipe.weights.solve(weight, format, inputs, "w")
    after = recipe.refinements[0].refine(before, weight, inputs, "w")
    own = (weight.double(), before.quantized), (weight.double(), after.quantized)
    losses = [output_error(x, bent, *pair) for pair in own]
    assert losses[1] < losses[0]
    assert after.loss is not None and after.rtn_loss is not None and after.zero_loss is not None


def test_a_layer_that_no_token_reached_stays_as_it_is() -> None:
    weight, format = weight_of(64).float(), parse_format("int4-g32")
    inputs = Inputs(hessian=torch.zeros(64, 64))
    solved = GPTQ().solve(weight, format, inputs, "expert")
    assert torch.equal(Refine().refine(solved, weight, inputs, "expert").quantized.codes, solved.quantized.codes)


def test_steps_are_taken_in_the_order_of_their_roles() -> None:
    assert compose("refine,gptq,awq").names == ("awq", "gptq", "refine")
    assert compose("awq").names == ("awq", "rtn")
    assert compose("gptq,refine").statistics == {"hessian"}
    assert compose("awq,gptaq").statistics == {"hessian", "cross", "mean_abs"}
    assert compose("rtn").statistics == frozenset()


def test_options_reach_every_step_that_has_them() -> None:
    recipe = compose("gptq,refine", {"damping": 0.05, "refine.rounds": 7})
    assert recipe.weights.damping == 0.05 and recipe.refinements[0].damping == 0.05
    assert recipe.refinements[0].rounds == 7
    assert recipe.describe()["refine"]["rounds"] == 7 and recipe.describe()["name"] == "gptq,refine"


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        ("gptq,rtn", {}, "both make the codes"),
        ("gptq,gptq", {}, "named twice"),
        ("gptqq", {}, "unknown method 'gptqq'"),
        ("gptq,refine", {"rund": 1}, "unknown option of method gptq,refine 'rund'"),
        ("gptq", {"awq.steps": 3}, "unknown step"),
        ("gptaq", {"strength": 2.0}, "strength 2.0"),
        ("refine", {"rounds": 0}, "rounds >= 1"),
    ],
)
def test_what_makes_no_sense_is_refused(names: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        compose(names, options)


@pytest.mark.parametrize(
    ("names", "option", "value", "allowed"),
    [
        ("gptq", "act_order", "False", "true or false"),
        ("gptq", "gptq.act_order", 1, "true or false"),
        ("gptq", "act_order", None, "true or false"),
        ("llm_int8", "llm_int8.fixed", "no", "true or false"),
        ("gptq", "damping", "abc", "a number, e.g. 0.01"),
        ("gptq", "damping", True, "a number, e.g. 0.01"),
        ("gptq", "damping", [0.01], "a number, e.g. 0.01"),
        ("gptq,refine", "refine.damping", float("nan"), "a number, e.g. 0.01"),
        ("gptq", "block_size", 1.5, "a whole number, e.g. 128"),
        ("gptq", "max_retries", "x", "a whole number, e.g. 3"),
        ("gptq,lowrank", "rank", "abc", "a whole number, e.g. 16"),
        ("refine", "refine.rounds", "x", "a whole number, e.g. 3"),
        ("rotate", "rotate.seed", False, "a whole number, e.g. 0"),
        ("rotate", "rotate.block", "abc", "a whole number or none"),
        ("rotate", "rotate.online", 1, "true or false or none"),
        ("smoothquant", "smoothquant.alpha", "x", "a number or none"),
        ("learned", "learned.lr", "x", "a number or none"),
        ("llm_int8", "weights", 8, "text, e.g. original"),
        ("gptq", "range", 3, "text or none"),
        ("rtn", "rtn.search", "foo", "a RangeSearch made in Python or none"),
    ],
)
def test_a_value_is_of_its_options_type(names: str, option: str, value: Any, allowed: str) -> None:
    with pytest.raises(BadInput) as refused:
        compose(names, {option: value})
    assert str(refused.value) == f"option {option} {value!r}: {allowed}"


@pytest.mark.parametrize(
    ("names", "option", "value"),
    [
        ("gptq", "act_order", False),
        ("gptq", "damping", 1),
        ("gptq", "range", "mse"),
        ("gptq", "search", None),
        ("rtn", "search", RangeSearch(steps=5)),
        ("rotate", "online", None),
        ("rotate", "block", 32),
        ("smoothquant", "alpha", 1),
        ("learned", "lr", None),
        ("lowrank", "stored", "float16"),
    ],
)
def test_a_value_that_fits_arrives_as_it_is(names: str, option: str, value: Any) -> None:
    assert getattr(compose(names, {option: value}).steps[names], option) is value


def test_what_text_cannot_set_is_not_offered() -> None:
    with pytest.raises(BadInput, match=r"unknown option of method gptq 'serch'") as refused:
        compose("gptq", {"serch": 1})
    assert "damping" in str(refused.value) and "search" not in str(refused.value)
