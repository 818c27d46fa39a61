"""What the points of `fewbits study bits` say: curves, equal bits, effects of data type and block, fronts.

Differences are taken window by window before they are averaged: both formats saw the same text, and its difficulty
cancels. So they are known far better than the two numbers they come from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fewbits.metrics import block_estimate

Point = dict[str, Any]
MEASURES = ("total_bits", "block_bits")
KAPLAN = 0.076  # NLL of trained models ~ parameters ** -0.076 (arXiv 2001.08361)
_STEPS = 17  # budgets at which two curves are compared


def analyse(found: Mapping[str, Sequence[Point]], grid: Any) -> dict[str, Any]:
    """Everything the page shows that is not a point itself."""
    sizes, points = found["sizes"], found["points"]
    ladder = [p for p in points if p["type"] == grid.base_type and p["block"] == grid.base_block]
    curves = curves_of(ladder, sizes)
    largest = max(sizes, key=lambda size: size["total_bits"])
    whole = [p for p in points if p["size"] == largest["key"]]
    return {
        "largest": largest["key"],
        "curves": [{key: value for key, value in point.items() if key != "nll_by_window"} for point in curves],
        "equal_bits": {measure: equal_bits(curves, measure) for measure in MEASURES},
        "best": {measure: best_bits(equal_bits(curves, measure)) for measure in MEASURES},
        "front": {measure: front(curves, measure) for measure in MEASURES},
        "pareto": [p["format"] for p in front(whole, "bits_per_weight", "kl")],
        "types": type_effect([p for p in whole if p["block"] == grid.base_block], grid.base_type),
        "blocks": block_effect([p for p in whole if p["type"] == grid.base_type]),
        "widths": widths(whole, largest),
        "trained": trained([p for p in ladder if p["size"] == largest["key"]], largest)
        if found["truncations"]
        else None,
        "truncations": [*found["truncations"], *as_trained(found["truncations"], sizes, largest)],
    }


def curves_of(ladder: Sequence[Point], sizes: Sequence[Point]) -> list[Point]:
    """One point per bit-width, model and depth: the mean over the draws of a random truncation."""
    model_of = {size["key"]: size["model"] for size in sizes}
    groups: dict[tuple[int, str, int], list[Point]] = {}
    for point in ladder:
        groups.setdefault((point["bits"], model_of[point["size"]], point["depth"]), []).append(point)
    found = []
    for (bits, model, depth), group in groups.items():
        by_window = np.mean([p["nll_by_window"] for p in group], axis=0)
        nll = block_estimate(torch.tensor(by_window)[:, None]).to_dict()
        if len(group) > 1:  # which blocks were drawn is a chance of its own
            spread = float(np.std([p["nll"]["mean"] for p in group], ddof=1)) / math.sqrt(len(group))
            nll["stderr"] = None if nll["stderr"] is None else math.hypot(nll["stderr"], spread)
        found.append(
            {
                "bits": bits,
                "model": model,
                "depth": depth,
                "format": group[0]["format"],
                **{measure: round(float(np.mean([p[measure] for p in group]))) for measure in MEASURES},
                "nll": nll,
                "kl": {"mean": float(np.mean([p["kl"]["mean"] for p in group]))},
                "nll_by_window": by_window.tolist(),
            }
        )
    return sorted(found, key=lambda point: (point["bits"], point["total_bits"]))


def equal_bits(curves: Sequence[Point], measure: str) -> list[dict[str, Any]]:
    """Neighbouring bit-widths at equal bits: NLL of the fewer minus NLL of the more, over budgets both reach.

    Between sizes a curve is a straight line in the logarithm of the bits, as in the paper. Positive: more bits per
    weight in a smaller model are better. "difference" is None where no budget is reached by both.
    """
    found = []
    for low, high in itertools.pairwise(sorted({point["bits"] for point in curves})):
        one, other = (_line(curves, bits, measure) for bits in (low, high))
        start, end = max(one[0][0], other[0][0]), min(one[0][-1], other[0][-1])
        entry: dict[str, Any] = {"low": low, "high": high, "from": None, "to": None, "difference": None}
        if start < end:
            budgets = np.linspace(start, end, _STEPS)
            gaps = [
                float(np.mean(np.interp(budgets, one[0], a) - np.interp(budgets, other[0], b)))
                for a, b in zip(one[1].T, other[1].T, strict=True)
            ]
            entry |= {"from": round(2**start), "to": round(2**end), "difference": _estimate(gaps)}
        found.append(entry)
    return found


def _line(curves: Sequence[Point], bits: int, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """(log2 of the bits, NLL [sizes, windows]) of one bit-width, by size."""
    points = sorted((p for p in curves if p["bits"] == bits), key=lambda p: p[measure])
    return np.log2([p[measure] for p in points]), np.array([p["nll_by_window"] for p in points])


def best_bits(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The bit-width no neighbour betters at equal bits; None where the sizes are too few or far apart to tell.

    sure: whether it is two standard errors ahead of each neighbour it could be compared with.
    """
    known = [pair for pair in pairs if pair["difference"] is not None]
    for bits in sorted({pair[side] for pair in known for side in ("low", "high")}):
        below = next((p["difference"] for p in known if p["high"] == bits), None)
        above = next((p["difference"] for p in known if p["low"] == bits), None)
        ahead = [*([(below, 1)] if below else []), *([(above, -1)] if above else [])]
        if all(sign * gap["mean"] > 0 for gap, sign in ahead):
            sure = all(gap["stderr"] is not None and abs(gap["mean"]) > 2 * gap["stderr"] for gap, _ in ahead)
            return {"bits": bits, "below": below, "above": above, "sure": sure}
    return {"bits": None, "below": None, "above": None, "sure": False}


def front(points: Sequence[Point], cost: str, quality: str = "nll") -> list[Point]:
    """The points that nothing as cheap betters, cheapest first, without their windows."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p[cost], p[quality]["mean"])):
        if not found or point[quality]["mean"] < found[-1][quality]["mean"]:
            found.append({key: value for key, value in point.items() if not key.endswith("_by_window")})
    return found


def type_effect(points: Sequence[Point], base: str) -> list[dict[str, Any]]:
    """KL of each data type by bits, and its paired difference from the base type as a share of the base's KL."""
    bases = {p["bits"]: p for p in points if p["type"] == base}
    found = []
    for point in sorted(points, key=lambda p: (p["bits"], p["kl"]["mean"])):
        entry = {key: point[key] for key in ("bits", "type", "format", "bits_per_weight", "kl", "nll")}
        other = bases.get(point["bits"])
        ratio = None if other is None or other is point else log_ratio(point["kl_by_window"], other["kl_by_window"])
        found.append({**entry, "log2_against_base": ratio})
    return found


def block_effect(points: Sequence[Point]) -> list[dict[str, Any]]:
    """What a smaller block and what one more bit buy: halvings of the KL per bit of storage spent.

    smaller: from this block to the next smaller one. wider: from this bit-width to the next, same block.
    """
    table = {(p["bits"], p["block"]): p for p in points}
    widths = sorted({bits for bits, _ in table})
    found = []
    for (bits, block), point in table.items():
        finer = [p for (b, _), p in table.items() if b == bits and p["bits_per_weight"] > point["bits_per_weight"]]
        smaller = min(finer, key=lambda p: p["bits_per_weight"], default=None)
        wider = table.get((next((b for b in widths if b > bits), -1), block))
        found.append(
            {
                **{key: point[key] for key in ("bits", "block", "format", "bits_per_weight", "kl", "nll")},
                "smaller": _bought(point, smaller),
                "wider": _bought(point, wider),
            }
        )
    return sorted(found, key=lambda entry: (entry["bits"], entry["bits_per_weight"]))


def _bought(point: Point, other: Point | None) -> dict[str, Any] | None:
    if other is None:
        return None
    spent = other["bits_per_weight"] - point["bits_per_weight"]
    halvings = log_ratio(point["kl_by_window"], other["kl_by_window"])
    per_bit = {key: None if halvings[key] is None else halvings[key] / spent for key in ("mean", "stderr")}
    return {"to": other["format"], "bits": spent, "halvings": halvings, "per_bit": per_bit}


def widths(points: Sequence[Point], size: Point) -> list[dict[str, Any]]:
    """The format of least KL at each bit-width, and what it adds to the NLL of the unquantized model."""
    found = []
    for bits in sorted({p["bits"] for p in points}):
        best = min((p for p in points if p["bits"] == bits), key=lambda p: p["kl"]["mean"])
        added = [a - b for a, b in zip(best["nll_by_window"], size["nll_by_window"], strict=True)]
        kept = {key: best[key] for key in ("bits", "format", "bits_per_weight", "total_bits", "kl", "nll", "top1")}
        found.append({**kept, "added_nll": _estimate(added)})
    return found


def as_trained(truncations: Sequence[Point], sizes: Sequence[Point], largest: Point) -> list[dict[str, Any]]:
    """What models trained at the depths of `truncations` would be expected to reach: a power law of the blocks."""
    parameters = {size["depth"]: size["block_parameters"] for size in sizes}
    scale = {depth: (count / largest["block_parameters"]) ** -KAPLAN for depth, count in parameters.items()}
    nll = largest["nll"]["mean"]
    return [
        {"how": "trained", "depth": depth, "draw": 0, "nll": {"mean": nll * scale[depth], "stderr": None}}
        for depth in sorted({entry["depth"] for entry in truncations}, reverse=True)
    ]


def trained(points: Sequence[Point], largest: Point) -> dict[str, Any]:
    """Bit-widths at equal bits of the blocks, had every size been trained as it is. An estimate, not a measurement.

        NLL(b) = L * (bits per weight / 16)**0.076 + added(b)

    A model of as many bits at b bits per weight has 16 / b times the parameters of one at 16 bits, and is better by
    the power law; quantization adds what it adds to the largest size measured, taken as the same at every size.
    as_good: bit-widths that the error does not tell from the best.
    """
    found, by_window = [], {}
    for point in sorted(points, key=lambda p: p["bits"]):
        gain = largest["nll"]["mean"] * (point["bits_per_weight"] / 16) ** KAPLAN
        added = [a - b for a, b in zip(point["nll_by_window"], largest["nll_by_window"], strict=True)]
        by_window[point["bits"]] = [gain + value for value in added]
        estimate = _estimate(by_window[point["bits"]])
        found.append({"bits": point["bits"], "format": point["format"], "nll": estimate})
    best = min(found, key=lambda entry: entry["nll"]["mean"])["bits"]
    return {"exponent": KAPLAN, "bits": best, "as_good": _as_good(by_window, best), "widths": found}


def _as_good(by_window: Mapping[int, Sequence[float]], best: int) -> list[int]:
    """The bit-widths less than two standard errors behind `best`, itself included."""
    gaps = {
        bits: _estimate([a - b for a, b in zip(values, by_window[best], strict=True)])
        for bits, values in by_window.items()
    }
    return [bits for bits, gap in gaps.items() if bits == best or gap["mean"] < 2 * (gap["stderr"] or 0.0)]


def log_ratio(a: Sequence[float], b: Sequence[float]) -> dict[str, float | None]:
    """log2(mean a / mean b), paired by window; standard error by the jackknife."""
    x, y = np.array(a), np.array(b)
    if x.sum() <= 0 or y.sum() <= 0:
        return {"mean": None, "stderr": None}
    count = len(x)
    mean = float(np.log2(x.sum() / y.sum()))
    if count < 2:
        return {"mean": mean, "stderr": None}
    without = np.log2((x.sum() - x) / (y.sum() - y))
    stderr = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    return {"mean": mean, "stderr": stderr}


def _estimate(by_window: Sequence[float]) -> dict[str, Any]:
    return block_estimate(torch.tensor(by_window, dtype=torch.float64)[:, None]).to_dict()
