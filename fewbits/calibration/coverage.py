"""Experts that calibration hardly reached, and what is done about them.

A router sends each token to a few of many experts, and not evenly: some see a handful of the calibration tokens, some
none. A Hessian of fewer tokens than inputs is singular; a method that believes it rounds as if the directions it never
saw did not matter. Three ways out, stated in the record of every expert they were used for:

    more data   the only real one: more --samples. The coverage report says how many would do.
    borrow      H' = (n H + k H_all) / (n + k), H_all over the tokens of all experts of the block, k = inputs
                of the matrix: an expert with no tokens takes its fellows' Hessian, one with many keeps its own.
    data-free   H = 0 where fewer tokens than inputs came by: rounding to nearest.

Borrowing is the default: what all experts see is a better guess of what one will see than nothing. All experts of a
block read the same hidden states, by different shares, so for gate and up the pool is the plain input of the block.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fewbits.calibration.collect import Ref
from fewbits.calibration.stats import Inputs, InputSum
from fewbits.models.walk import ExpertRef

POLICIES = ("borrow", "data-free")
_NAMED = 50  # experts named in a report; the layers hold all counts


def cover(refs: Sequence[Ref], sums: Mapping[str, InputSum], policy: str, prefix: str) -> dict[str, Inputs]:
    """Inputs for the experts that saw fewer tokens than they have inputs, by name."""
    few: dict[str, Inputs] = {}
    for members in _families(refs):
        width = members[0].shape[1]
        short = [ref for ref in members if ref.name in sums and sums[ref.name].tokens < width]
        pool = _pool(members, sums, prefix) if short and policy == "borrow" else None
        for ref in short:
            own = sums[ref.name].inputs(f"{prefix}.{ref.name}.weight")
            few[ref.name] = _blend(own, pool, width) if pool is not None and pool.tokens else _nothing(own)
    return few


def report(layers: Sequence[Mapping[str, Any]], policy: str) -> dict[str, Any] | None:
    """Coverage of the experts among the records of `layers`; None where there are none or no text was needed.

    few: those that saw fewer tokens than they have inputs, fewest first. more: how many times the text would do for
    all that saw any.
    """
    experts = [layer for layer in layers if layer.get("expert") is not None and layer["tokens"] is not None]
    if not experts:
        return None
    few = sorted((e for e in experts if e["tokens"] < e["shape"][1]), key=lambda e: (e["tokens"], e["name"]))
    reached = [e["shape"][1] / e["tokens"] for e in few if e["tokens"]]
    return {
        "policy": policy,
        "matrices": len(experts),
        "few": len(few),
        "unreached": sum(1 for e in few if not e["tokens"]),
        "tokens": {
            "least": min(e["tokens"] for e in experts),
            "median": statistics.median(e["tokens"] for e in experts),
            "most": max(e["tokens"] for e in experts),
        },
        "more": math.ceil(max(reached)) if reached else None,
        "named": [{"name": e["name"], "tokens": e["tokens"], "needed": e["shape"][1]} for e in few[:_NAMED]],
    }


def sentence(found: Mapping[str, Any]) -> str:
    """One line about the experts that saw few tokens."""
    what = "borrowed from all experts of their block" if found["policy"] == "borrow" else "rounded without data"
    line = (
        f"{found['few']} of {found['matrices']} expert matrices saw fewer calibration tokens than they have inputs "
        f"({found['unreached']} none at all): {what}"
    )
    return line + (f"; {found['more']} times the --samples would do for the rest" if found["more"] else "")


def _families(refs: Sequence[Ref]) -> list[list[ExpertRef]]:
    """The experts of one owner that read alike: gate and up together, down apart."""
    found: dict[tuple[nn.Module, bool], list[ExpertRef]] = {}
    for ref in refs:
        if isinstance(ref, ExpertRef):
            found.setdefault((ref.owner, ref.part == "down_proj"), []).append(ref)
    return list(found.values())


def _pool(members: Sequence[ExpertRef], sums: Mapping[str, InputSum], prefix: str) -> Inputs:
    own = {id(sums[ref.name]): sums[ref.name] for ref in members if ref.name in sums}
    first = next(iter(own.values()))
    total = InputSum(members[0].shape[1], first.wanted, first.device)
    for each in own.values():
        total.merge(each)
    return total.inputs(f"{prefix}.{members[0].name}.weight")


def _blend(own: Inputs, pool: Inputs, width: int) -> Inputs:
    share = own.tokens / (own.tokens + width)

    def mixed(name: str) -> object:
        mine, all_of_them = getattr(own, name), getattr(pool, name)
        return None if mine is None else share * mine + (1 - share) * all_of_them

    names = [field.name for field in dataclasses.fields(Inputs) if field.name != "tokens"]
    return dataclasses.replace(own, **{name: mixed(name) for name in names})  # type: ignore[arg-type]


def _nothing(own: Inputs) -> Inputs:
    names = [field.name for field in dataclasses.fields(Inputs) if field.name != "tokens"]
    empty = {name: value * 0 for name in names if (value := getattr(own, name)) is not None}
    return dataclasses.replace(own, **empty)
