"""Why a group of layers got its format: what one step down or up would do, against the going price of a bit.

The *price* is what the next bits would save, spent where they save most: the largest loss per bit that an upgrade not
taken would save. An upgrade that was taken saves more than the price (or fills what was left); one that was not saves
less. So a group's format is explained by two ratios.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def reason(menu: Sequence[Option], chosen: Option, going: float | None) -> str:
    """A sentence on `chosen`, one of `menu`, at the price `going`."""
    options = useful(menu)
    if len(options) == 1:
        return "the only format it can have" if len(menu) == 1 else "no other loses less"
    place = options.index(chosen)
    said = []
    if place:
        said.append(_step("down", options[place - 1], chosen, going))
    if place + 1 < len(options):
        said.append(_step("up", options[place + 1], chosen, going))
    return "; ".join(said)


def _step(way: str, option: Option, chosen: Option, going: float | None) -> str:
    change = abs(option.loss - chosen.loss)
    verb = "adds" if way == "down" else "saves"
    text = f"{option.format} {verb} {change:.2g} nats"
    if not going:
        return text
    return f"{text}, {change / abs(option.bits - chosen.bits) / going:.2g} times the price of the bits"
