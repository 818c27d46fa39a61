"""The integer programme: optimal against brute force, within the budget to the bit, nothing left that would fit."""

from __future__ import annotations

import itertools
import random
import sys

import pytest

from fewbits.core.errors import BadInput, MissingExtra
from fewbits.planner.allocate import Option, allocate, useful
from fewbits.planner.explain import price, sentence, steps

pytest.importorskip("scipy")


def menus(seed: int, groups: int, formats: int, *, noisy: bool = False) -> list[list[Option]]:
    """Losses that fall about fourfold a bit, over three decades of sensitivity; `noisy` ones need not fall."""
    draw = random.Random(seed)
    found = []
    for _ in range(groups):
        weights, sensitivity = draw.randrange(1000, 9000), 10 ** draw.uniform(-3, 0)
        options = []
        for bits in range(2, 2 + formats):
            wobble = draw.uniform(0.1, 8) if noisy else draw.uniform(0.8, 1.2)
            options.append(Option(format=f"int{bits}", bits=bits * weights, loss=sensitivity * 4.0**-bits * wobble))
        found.append(options)
    return found


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_within_the_budget_loses_less(seed: int) -> None:
    groups = menus(seed, 5, 4, noisy=seed % 2 == 1)
    least, most = (sum(pick(o.bits for o in menu) for menu in groups) for pick in (min, max))
    for share in (0.0, 0.13, 0.5, 0.87, 1.0):
        budget = round(least + share * (most - least))
        found = allocate(groups, budget)
        best = min(
            sum(o.loss for o in choice)
            for choice in itertools.product(*groups)
            if sum(o.bits for o in choice) <= budget
        )
        assert found.bits <= budget
        assert found.loss == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_is_left_over_fits_an_upgrade(seed: int) -> None:
    groups = menus(seed, 120, 6)
    total = sum(menu[0].bits for menu in groups) / 2
    for average in (2.5, 3.0, 3.3, 4.0, 6.5):
        found = allocate(groups, int(average * total))
        left = int(average * total) - found.bits
        assert left >= 0
        assert found.bits / total > average - 0.01  # as many groups as a model of 30 blocks has
        for menu, now in zip(groups, found.chosen, strict=True):
            options = useful(menu)
            place = options.index(now)
            assert place + 1 == len(options) or options[place + 1].bits - now.bits > left


def test_an_option_that_another_betters_is_never_chosen() -> None:
    worse = Option(format="worse", bits=30, loss=0.5)
    menu = [Option(format="a", bits=20, loss=0.4), worse, Option(format="b", bits=40, loss=0.1)]
    assert [option.format for option in useful(menu)] == ["a", "b"]
    assert all(worse not in allocate([menu, menu], budget).chosen for budget in range(40, 90, 5))


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(BadInput, match="budget of 19 bits; the smallest choice takes 20"):
        allocate([[Option(format="a", bits=20, loss=1.0)]], 19)


def test_losses_of_any_size_are_told_apart() -> None:
    """A group a millionth as sensitive as another still gets its bits where they save most."""
    small = [Option(format="2", bits=20, loss=2e-9), Option(format="3", bits=30, loss=1e-9)]
    smaller = [Option(format="2", bits=20, loss=3e-10), Option(format="3", bits=30, loss=1e-10)]
    large = [Option(format="2", bits=20, loss=2e-2), Option(format="3", bits=30, loss=1e-2)]
    assert [option.format for option in allocate([small, smaller, large], 80).chosen] == ["3", "2", "3"]


def test_steps_are_priced_against_the_best_unspent() -> None:
    sharp = [Option(format="int3", bits=30, loss=0.8), Option(format="int4", bits=40, loss=0.2)]
    dull = [Option(format="int3", bits=30, loss=0.3), Option(format="int4", bits=40, loss=0.1)]
    chosen = allocate([sharp, dull], 75).chosen
    assert [option.format for option in chosen] == ["int4", "int3"]
    going = price([sharp, dull], chosen)
    assert going == pytest.approx(0.02)
    found = steps(sharp, chosen[0], going)
    assert found["up"] is None and found["down"]["price"] == pytest.approx(3.0)
    assert sentence(found) == "int3 would add 0.6 nats, 3 times the price of the bits"
    assert price([sharp, dull], (sharp[1], dull[1])) is None


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtra, match=r"fewbits\[plan\]"):
        allocate(menus(0, 3, 3), int(2.5 * sum(menu[0].bits for menu in menus(0, 3, 3)) / 2))
