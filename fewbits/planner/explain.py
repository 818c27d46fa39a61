"""Why a group of layers got its format: what one step down or up would do, against the going price of a bit.

The *price* is what the next bits would save, spent where they save most: the largest loss per bit that an upgrade not
taken would save. An upgrade that was taken saves more than the price (or fills what was left); one that was not saves
less. So a group's format is explained by two ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.planner.allocate import Option, useful


def price(menus: Sequence[Sequence[Option]], chosen: Sequence[Option]) -> float | None:
    """Nats per bit that the best step up not taken would save; None where every group has its best option."""
    rates = [
        (now.loss - option.loss) / (option.bits - now.bits)
        for menu, now in zip(menus, chosen, strict=True)
        for option in useful(menu)
        if option.bits > now.bits
    ]
    return max(rates, default=None)


def steps(menu: Sequence[Option], chosen: Option, going: float | None) -> dict[str, Any]:
    """JSON: {"down": ..., "up": ...}, the neighbours of `chosen` in `menu`, each None or

    {"format": ..., "nats": what the step adds (down) or saves (up), "price": that per bit, in units of `going`}.
    """
    options = useful(menu)
    place = options.index(chosen)
    found: dict[str, Any] = {"down": None, "up": None}
    for way, index in (("down", place - 1), ("up", place + 1)):
        if 0 <= index < len(options):
            option = options[index]
            nats = abs(option.loss - chosen.loss)
            rate = nats / abs(option.bits - chosen.bits)
            found[way] = {"format": option.format, "nats": nats, "price": rate / going if going else None}
    return found


def sentence(group: Mapping[str, Any]) -> str:
    """Why a group of a plan has its format, in words."""
    said = []
    for way, verb in (("down", "would add"), ("up", "would save")):
        if step := group[way]:
            times = "" if step["price"] is None else f", {step['price']:.2g} times the price of the bits"
            said.append(f"{step['format']} {verb} {step['nats']:.2g} nats{times}")
    return "; ".join(said) or "no other format loses less"
