"""The best choice within a budget, as an integer programme.

    minimise    sum_g sum_f  loss[g, f] x[g, f]
    subject to  sum_f x[g, f] = 1                       every group g gets one format f
                sum_g sum_f  bits[g, f] x[g, f] <= B    bits as stored, an integer
                x binary

solved to the optimum by HiGHS (scipy.optimize.milp). EXL2 anneals the same problem and a greedy pass fills what is
left; with hundreds of groups and a handful of formats the exact solution takes well under a second.

An option that another of its group betters in both bits and loss is never chosen and left out beforehand. Hence no
single group can be moved to its next better option with the bits that are left over: the move would lower the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fewbits.core.errors import BadInput, FewbitsError, MissingExtra

_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Option:
    """One format for one group: bits it takes (exact), loss it causes."""

    format: str
    bits: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """chosen: an option per group. gap: how far the loss may be from the least, as a share; 0 is proven least."""

    chosen: tuple[Option, ...]
    gap: float

    @property
    def bits(self) -> int:
        return sum(option.bits for option in self.chosen)

    @property
    def loss(self) -> float:
        return sum(option.loss for option in self.chosen)


def useful(options: Sequence[Option]) -> list[Option]:
    """Those no other betters, fewest bits first; each costs more bits and less loss than the one before it."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bits, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def allocate(groups: Sequence[Sequence[Option]], budget: int) -> Allocation:
    """One option of each group, of the least total loss within `budget` bits.

    Raises BadInput where no choice is that small, MissingExtra without scipy.
    """
    menus = [useful(options) for options in groups]
    least = sum(menu[0].bits for menu in menus)
    if least > budget:
        raise BadInput(f"a budget of {budget} bits; the smallest choice takes {least}")
    if sum(menu[-1].bits for menu in menus) <= budget:
        return Allocation(chosen=tuple(menu[-1] for menu in menus), gap=0.0)
    limit = budget
    while True:
        chosen, gap = _solve(menus, limit)
        excess = sum(option.bits for option in chosen) - budget
        if excess <= 0:
            return Allocation(chosen=tuple(_filled(menus, chosen, budget)), gap=gap)
        limit -= excess  # the solver's constraint holds to a millionth; ours holds to the bit


def _solve(menus: Sequence[Sequence[Option]], limit: int) -> tuple[list[Option], float]:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise MissingExtra("scipy", "plan", "choosing a format per layer") from error
    flat = [option for menu in menus for option in menu]
    owner = [index for index, menu in enumerate(menus) for _ in menu]
    largest = max(option.loss for option in flat) or 1.0
    each = csr_array(([1.0] * len(flat), (owner, range(len(flat)))), shape=(len(menus), len(flat)))
    # Losses span six decades: scaled so that the solver's absolute tolerance of 1e-7 is far below the least of them.
    result: Any = milp(
        [1e4 * option.loss / largest for option in flat],
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(each, 1, 1),
            LinearConstraint([[option.bits / limit for option in flat]], -float("inf"), 1.0),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
    )
    if result.x is None:
        raise FewbitsError(f"the integer programme was not solved: {result.message}")
    chosen, start = [], 0
    for menu in menus:
        taken = result.x[start : start + len(menu)]
        chosen.append(menu[int(taken.argmax())])
        start += len(menu)
    return chosen, float(result.mip_gap or 0.0)


def _filled(menus: Sequence[Sequence[Option]], chosen: Sequence[Option], budget: int) -> list[Option]:
    """`chosen` with the leftover spent on single upgrades, the best first. Changes nothing that is optimal already."""
    found = list(chosen)
    while True:
        left = budget - sum(option.bits for option in found)
        upgrades = [
            (option.loss - now.loss, index, option)
            for index, (menu, now) in enumerate(zip(menus, found, strict=True))
            for option in menu
            if option.bits > now.bits and option.bits - now.bits <= left
        ]
        if not upgrades:
            return found
        _, index, option = min(upgrades, key=lambda upgrade: upgrade[:2])
        found[index] = option
