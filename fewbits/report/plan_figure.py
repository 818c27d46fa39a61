"""The figure of a plan: which format each group of layers got over the depth, and what made it so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.report.figure import INK, SERIES, SURFACE

Plan = Mapping[str, Any]

_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_SPELLED = 40  # blocks up to which every cell holds its number


def height(plan: Plan) -> float:
    return 4.0 + 0.3 * len(_kinds(plan)) + 0.2 * (_legend_rows(plan, wide=True) - 1)


def draw(canvas: Any, wide: bool, plan: Plan) -> None:
    kinds = _kinds(plan)
    upper, lower = canvas.subplots(2, 1, height_ratios=(0.6 + 0.3 * len(kinds), 3.0))
    _formats(upper, wide, plan, kinds)
    _losses(lower, plan, kinds)


def _used(plan: Plan) -> list[str]:
    """The formats that some group has, fewest bits first."""
    return [name for name in plan["formats"] if any(group["format"] == name for group in plan["groups"])]


def _legend_columns(plan: Plan, wide: bool) -> int:
    mixed = any("+" in name for name in _used(plan))  # whose names are long
    return min(len(_used(plan)), (3 if mixed else 6) if wide else (1 if mixed else 2))


def _legend_rows(plan: Plan, wide: bool) -> int:
    return -(-len(_used(plan)) // _legend_columns(plan, wide))


def _kinds(plan: Plan) -> list[str]:
    return list(dict.fromkeys(_kind(group) for group in plan["groups"]))


def _kind(group: Mapping[str, Any]) -> str:
    return "+".join(kind.removesuffix("_proj") for kind in group["kinds"])


def _formats(axis: Any, wide: bool, plan: Plan, kinds: Sequence[str]) -> None:
    """A row of cells for each kind: darker is more bits, the number says how many."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    used = _used(plan)
    shades = colormaps["cividis_r"].resampled(max(len(used), 2))
    blocks = 1 + max(group["block"] for group in plan["groups"])
    for group in plan["groups"]:
        row, place = kinds.index(_kind(group)), used.index(group["format"])
        colour = shades(place)
        axis.add_patch(Rectangle((group["block"] - 0.46, row - 0.42), 0.92, 0.84, facecolor=colour, linewidth=0))
        if wide and blocks <= _SPELLED:
            dark = sum(colour[:3]) < 1.5
            axis.text(
                group["block"], row, f"{group['bits']:.1f}", ha="center", va="center", fontsize=6.0,
                color=SURFACE if dark else INK,
            )  # fmt: skip
    axis.set_xlim(-0.6, blocks - 0.4)
    axis.set_ylim(len(kinds) - 0.5, -0.5)
    axis.set_yticks(range(len(kinds)), kinds)
    axis.grid(visible=False)
    axis.spines.bottom.set_visible(False)
    axis.tick_params(axis="x", labelbottom=False, length=0)
    axis.set_title(
        f"Bits per weight, scales included: {plan['average']:.3f} on average", pad=10 + 14 * _legend_rows(plan, wide)
    )
    handles = [Rectangle((0, 0), 1, 1, facecolor=shades(index), label=name) for index, name in enumerate(used)]
    axis.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=_legend_columns(plan, wide), borderpad=0.0,
        handlelength=1.0, handleheight=1.0, columnspacing=1.2,
    )  # fmt: skip


def _losses(axis: Any, plan: Plan, kinds: Sequence[str]) -> None:
    """What one and the same format would cost each group, per million weights: what the choice answers to."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    common = _common(plan)
    for index, kind in enumerate(kinds):
        points = [
            (group["block"], group["losses"][common] / group["weights"] * 1e6)
            for group in plan["groups"]
            if _kind(group) == kind and group["losses"].get(common, 0.0) > 0
        ]
        if points:
            axis.plot(
                *zip(*points, strict=True), color=SERIES[index % len(SERIES)], marker=_MARKERS[index % len(_MARKERS)],
                markersize=4.0, linewidth=1.3, label=kind,
            )  # fmt: skip
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=12))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlim(-0.6, 0.6 + max(group["block"] for group in plan["groups"]))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("block")
    axis.set_ylabel("nats per token\nper million weights")
    axis.set_title(f"What {common} would cost the model's predictions", pad=24)
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(kinds), borderpad=0.0, columnspacing=1.2)


def _common(plan: Plan) -> str:
    """The format that most groups could have had, nearest the middle of those in use."""
    counts = {name: sum(name in group["losses"] for group in plan["groups"]) for name in plan["formats"]}
    most = [name for name in plan["formats"] if counts[name] == max(counts.values())]
    used = [group["format"] for group in plan["groups"]]
    return max(most, key=lambda name: (used.count(name), -abs(most.index(name) - math.floor(len(most) / 2))))
