"""Labels of points that lie close together: each where it covers no other label and no point.

Greedy: points by height, and for each the nearest of a fan of places that is free. A label that had to move away from
its point gets a thin line to it. Widths are estimated from the number of letters, which is enough for one font.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewbits.report.figure import INK, MUTED

_LETTER, _LINE = 0.56, 1.25  # of the font size: the mean width of a letter, the height of a line
_GAP = 6.0  # points between a mark and its label

Box = tuple[float, float, float, float]  # left, bottom, right, top


def place(
    canvas: Any, axis: Any, points: Sequence[tuple[float, float]], labels: Sequence[str], size: float = 8.0
) -> None:
    """Writes `labels` beside `points` (data coordinates) of `axis`; the axis must have its limits and scales."""
    canvas.draw_without_rendering()  # settles where the axis lies
    unit = canvas.dpi / 72
    seen = [tuple(axis.transData.transform(point) / unit) for point in points]
    frame = axis.get_window_extent()
    bounds = (frame.x0 / unit, frame.y0 / unit, frame.x1 / unit, frame.y1 / unit)
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in seen]
    for index in sorted(range(len(seen)), key=lambda index: -seen[index][1]):
        x, y = seen[index]
        width, height = _LETTER * size * len(labels[index]), _LINE * size
        dx, dy, side = _free(x, y, width, height, taken, bounds)
        taken.append(_box(x, y, dx, dy, side, width, height))
        far = abs(dy) > height or abs(dx) > 2 * _GAP
        note = axis.annotate(
            labels[index], points[index], xytext=(dx, dy), textcoords="offset points", color=INK, fontsize=size,
            ha="left" if side > 0 else "right", va="center",
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkB": 3} if far else None,
        )  # fmt: skip
        note.set_in_layout(False)


def _box(x: float, y: float, dx: float, dy: float, side: int, width: float, height: float) -> Box:
    left = x + dx if side > 0 else x + dx - width
    return left, y + dy - height / 2, left + width, y + dy + height / 2


def _free(
    x: float, y: float, width: float, height: float, taken: Sequence[Box], bounds: Box
) -> tuple[float, float, int]:
    """(dx, dy, side) of the nearest place that touches nothing in `taken`, or the least covered one."""
    tries = [
        (side * (_GAP + out), step * height / 2, side)
        for out in (0.0, 10.0, 24.0)
        for step in (0, 1, -1, 2, -2, 3, -3, 4, -4, 6, -6, 8, -8)
        for side in (1, -1)
    ]

    def cost(place: tuple[float, float, int]) -> float:
        box = _box(x, y, *place, width, height)
        covered = sum(_shared(box, other) for other in taken)
        outside = width * height - _shared(box, bounds)
        return covered + outside

    return min(tries, key=lambda place: (round(cost(place), 6), abs(place[0]) + abs(place[1])))


def _shared(first: Box, second: Box) -> float:
    """The area two boxes have in common."""
    wide = min(first[2], second[2]) - max(first[0], second[0])
    high = min(first[3], second[3]) - max(first[1], second[1])
    return max(wide, 0.0) * max(high, 0.0)
