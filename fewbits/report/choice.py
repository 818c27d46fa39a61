"""How `--method auto` chose: what each candidate loses against how long the run would take, and the reasons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fewbits.core.units import duration_text
from fewbits.report.certificate import Certificate, number, positive, text
from fewbits.report.figure import BASELINE, INK, METHOD, MUTED, SERIES, figure, label_steps
from fewbits.report.tables import table
from fewbits.report.words import DASH, esc

_MOST = 64
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")


@dataclass(frozen=True, kw_only=True)
class Tried:
    """loss: in units of what rounding to nearest does, of all blocks tried and (`by_block`) of each; seconds: of the
    whole run; step: iterations, where it learns."""

    name: str
    method: str
    step: str
    loss: float | None
    by_block: dict[str, float]
    block_seconds: float | None
    seconds: float | None
    reason: str
    chosen: bool


def tried(certificate: Certificate) -> list[Tried]:
    """The candidates as the certificate has them; none where the method was not chosen."""
    choice = certificate.raw.get("auto")
    if not isinstance(choice, dict) or not isinstance(choice.get("candidates"), list):
        return []
    entries = [entry for entry in choice["candidates"][:_MOST] if isinstance(entry, dict) and text(entry.get("name"))]
    return [_tried(entry, choice) for entry in entries]


def _tried(entry: dict[str, Any], choice: dict[str, Any]) -> Tried:
    method = text(entry.get("method")) or entry["name"]
    step = number(_object(entry.get("options")).get("learned.iterations"))
    floors, scales = _object(choice.get("floors")), _object(choice.get("scales"))
    by_block = {}
    for block, error in _object(entry.get("errors")).items():
        found, floor, scale = number(error), number(floors.get(block)), positive(scales.get(block))
        if found is not None and floor is not None and scale is not None:
            by_block[str(block)] = (found - floor) / scale
    return Tried(
        name=entry["name"],
        method=f"{method} sequential" if entry.get("sequential") is True else method,
        step="" if step is None else f"{step:g}",
        loss=number(entry.get("loss")),
        by_block=by_block,
        block_seconds=positive(entry.get("block_seconds")),
        seconds=positive(entry.get("seconds")),
        reason=text(entry.get("why_not")) or "",
        chosen=entry["name"] == choice.get("chosen"),
    )


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def lead(certificate: Certificate) -> str:
    """The choice in one sentence, and what the figure and the table hold."""
    choice = certificate.raw.get("auto")
    why = (text(choice.get("why")) or "") if isinstance(choice, dict) else ""
    twice = any(len(entry.by_block) > 1 for entry in tried(certificate))
    return (
        f"{why}. Loss is what a candidate adds to the error of a block's output, on calibration text held back, "
        "in units of what rounding to nearest does to the block by itself; below 0 it undoes what blocks before have "
        "done. Time is that of the whole run, foreseen from the blocks tried, with a margin."
        + (" Only the best were tried on the second block; the others are drawn hollow." if twice else "")
    )


def candidates(certificate: Certificate) -> str:
    """The table of all that could have been."""
    entries = tried(certificate)
    blocks = list(dict.fromkeys(block for entry in entries for block in entry.by_block))
    rows = [
        [
            esc(entry.name),
            *(f"{entry.by_block[block]:.3f}" if block in entry.by_block else DASH for block in blocks),
            *([DASH if entry.loss is None else f"{entry.loss:.3f}"] if len(blocks) != 1 else []),
            duration_text(entry.block_seconds) if entry.block_seconds else DASH,
            duration_text(entry.seconds) if entry.seconds else DASH,
            "chosen" if entry.chosen else esc(entry.reason) or DASH,
        ]
        for entry in entries
    ]
    marked = next((index for index, entry in enumerate(entries) if entry.chosen), None)
    heads = ["Candidate", *(f"Loss, block {block}" for block in blocks), *(["Loss"] if len(blocks) != 1 else [])]
    heads += ["A block", "Whole run", "Why not"]
    return table(heads, rows, numbers_to=len(heads) - 1, marked=marked) if rows else ""


def chart(certificate: Certificate) -> str:
    """Loss against time, the time there was, and the one that was taken."""
    shown = [entry for entry in tried(certificate) if entry.loss is not None and entry.seconds]
    minutes = positive(certificate.raw["auto"].get("minutes")) if shown else None
    if len(shown) < 2 or minutes is None:
        return ""
    methods = list(dict.fromkeys(entry.method for entry in shown))

    def draw(canvas: Any, wide: bool) -> None:
        axis = canvas.subplots()
        # Learning first: its line is the one to follow.
        others = sorted((method for method in methods if method != "rtn"), key=lambda name: "learned" not in name)
        most = max(len(entry.by_block) for entry in shown)
        for method in methods:
            members = [entry for entry in shown if entry.method == method]
            index = others.index(method) if method in others else -1
            look = (BASELINE, "p") if index < 0 else (SERIES[index % len(SERIES)], _MARKERS[index % len(_MARKERS)])
            _series(axis, members, *look, most)
        axis.axvline(minutes, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), label=f"the time given: {minutes:g} min")
        times = [minutes, *((entry.seconds or 0.0) / 60 for entry in shown)]
        losses = [entry.loss or 0.0 for entry in shown]
        _logarithmic(axis, axis.xaxis, min(times) / 1.15, max(times) * 1.15)
        if min(losses) > 0:
            _logarithmic(axis, axis.yaxis, min(losses) / 1.15, max(losses) * 1.15)
        axis.set_xlabel("predicted time of the whole run, minutes")
        axis.set_ylabel("loss, in units of what\nrounding to nearest does")
        canvas.legend(loc="outside upper left", ncols=3 if wide else 1, borderaxespad=0.0, handlelength=2.2)

    lines = len(methods) + 2
    described = "Loss of each candidate against the time the run would take, with the time given"
    return figure("choice", described, draw, (3.2 + 0.2 * math.ceil(lines / 3), 3.0 + 0.2 * lines))


def _series(axis: Any, members: list[Tried], colour: str, marker: str, most: int) -> None:
    """One method: a point, or a line over the iterations of learning. Hollow: tried on fewer than `most` blocks."""
    x = [(entry.seconds or 0.0) / 60 for entry in members]
    y = [entry.loss or 0.0 for entry in members]
    label = f"{members[0].method}, by iterations" if members[0].step else members[0].method
    if len(members) > 1:
        axis.plot(x, y, color=colour, linewidth=1.3, zorder=1.5)
    style = {"color": colour, "marker": marker, "markersize": 6.0, "linewidth": 0.0, "markeredgewidth": 1.3}
    for index, (entry, left, height) in enumerate(zip(members, x, y, strict=True)):
        inside = colour if len(entry.by_block) == most else "none"
        axis.plot(left, height, **style, markerfacecolor=inside, label=label if index == 0 else None)
        if entry.step:
            place = {"textcoords": "offset points", "xytext": (0, 10), "ha": "center"}
            axis.annotate(entry.step, (left, height), color=MUTED, fontsize=8.5, **place)
        if entry.chosen:
            axis.plot(
                left, height, marker="o", markersize=13, markerfacecolor="none", markeredgecolor=METHOD,
                markeredgewidth=2.0, linewidth=0.0, label="chosen", zorder=1,
            )  # fmt: skip


def _logarithmic(axis: Any, side: Any, low: float, high: float) -> None:
    """A logarithmic axis from `low` to `high`."""
    name = side.axis_name
    getattr(axis, f"set_{name}scale")("log")
    getattr(axis, f"set_{name}lim")(low, high)
    label_steps(side, low, high, lambda value: f"{value:g}")
