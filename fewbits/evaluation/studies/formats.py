"""Which data type for which distribution: signal to noise of every format where it clips best. Exact, no samples.

    bits of accuracy = SQNR in dB / 6.02,     SQNR = variance / E[(x - q(x))**2]

An ideal uniform quantizer of a uniform value has as many bits of accuracy as it has bits. Any other distribution
costs some: what lies in the tails is rare, and either clipped or paid for with coarser steps. More exponent bits make
small values precise and large ones coarse, which suits peaked densities with heavy tails; integers suit flat ones.
Van Baalen et al. 2023 and Kuzmin et al. 2022 show this for FP8 and INT8: INT8 wins on uniform values, E2M5 on
Gaussian ones with INT8 second, more exponent bits win as tails grow. Here are all formats, and what no scalar
quantizer (Lloyd-Max) and no code at all (Shannon) can better.

Clipping is chosen for least error, as one scale per tensor would be. Under absmax scaling of small blocks nothing is
clipped and the block's size decides: the second half of the study.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fewbits.core.progress import OnProgress, Progress
from fewbits.evaluation.studies.record import Record, record
from fewbits.formats import lloyd_max
from fewbits.formats.elements import ELEMENTS, NARROW
from fewbits.formats.grid import Grid
from fewbits.metrics.distributions import DISTRIBUTIONS, Outliers, best_scale, block_error, decibels, lower_bound
from fewbits.metrics.distributions import squared_error as error_at

BITS = range(2, 9)
BLOCK_SIZES = tuple(1 << power for power in range(3, 13))
CLIPPED = ("int8", "fp8_e2m5", "fp8_e3m4", "fp8_e4m3", "fp8_e5m2")
CLIPS = torch.logspace(0, 3, 241, dtype=torch.float64)  # of the largest level, in standard deviations

# Scalar formats to compare. Tables made for blocks scaled to [-1, 1] (NF4) are stretched to their best like the rest.
COMPARED: dict[str, Grid] = {
    **{f"int{bits}": ELEMENTS[f"int{bits}"] for bits in BITS},
    **{f"int{bits}_narrow": NARROW[f"int{bits}"] for bits in (4, 8)},
    **{name: grid for name, grid in ELEMENTS.items() if grid.kind == "float" and not name.endswith("_finite")},
    **{name: ELEMENTS[name] for name in ("nf4", "af4", "fp4_bnb", "dynamic8")},
}
# Under absmax: levels, the level the largest magnitude is scaled to, whether the scale takes that value's sign.
BLOCKED: dict[str, tuple[Grid, float, bool]] = {
    **{name: (ELEMENTS[name], ELEMENTS[name].top, False) for name in ("nf4", "af4", "fp4_e2m1", "fp4_bnb", "fp4_e3m0")},
    "int4": (ELEMENTS["int4"], ELEMENTS["int4"].top, False),
    "int4_narrow": (NARROW["int4"], NARROW["int4"].top, False),
    "q4_0": (ELEMENTS["int4"], 8.0, True),
}
SOURCES = (
    "Van Baalen et al. 2023, FP8 versus INT8 for efficient deep learning inference, arXiv 2303.17951",
    "Kuzmin et al. 2022, FP8 Quantization: The Power of the Exponent, arXiv 2208.09225",
    "Dettmers et al. 2023, QLoRA: Efficient Finetuning of Quantized LLMs (NF4), arXiv 2305.14314",
    "Max 1960, Quantizing for minimum distortion; Lloyd 1982, Least squares quantization in PCM",
    "Shannon 1959, Coding theorems for a discrete source with a fidelity criterion",
)


def study(on_progress: OnProgress | None = None) -> Record:
    """The record: best clipping of every format, Lloyd-Max, lower bound, absmax blocks, error against clip."""
    started = time.monotonic()
    results: dict[str, Any] = {
        "formats": {name: {"bits": grid.bits, "levels": len(grid.levels)} for name, grid in COMPARED.items()}
    }
    parts: dict[str, Callable[[str], Any]] = {
        "best": _best,
        "lloyd_max": _lloyd_max,
        "bound": _bound,
        "blocks": _blocks,
        "clip": _clip,
    }
    for done, name in enumerate(DISTRIBUTIONS):
        for part, measure in parts.items():
            results.setdefault(part, {})[name] = measure(name)
        if on_progress:
            on_progress(Progress("distributions", done + 1, len(DISTRIBUTIONS), name))
    outliers = Outliers()
    settings = {
        "distributions": list(DISTRIBUTIONS),
        "outliers": f"{100 * outliers.share:g} % of a Gaussian's values are {outliers.ratio:g} times as wide",
        "block_sizes": list(BLOCK_SIZES),
        "method": "expected squared error in closed form, float64; nothing is sampled",
    }
    seconds = time.monotonic() - started
    return record("formats", settings=settings, sources=SOURCES, results=results, seconds=seconds)


def _best(name: str) -> dict[str, dict[str, float]]:
    """Each format where it clips best: clip in standard deviations, squared error, SQNR, bits of accuracy."""
    found = {}
    for format, grid in COMPARED.items():
        scale, error = best_scale(DISTRIBUTIONS[name], grid.levels)
        clip = scale * max(abs(level) for level in grid.levels)
        found[format] = {"clip": clip, **_quality(error)}
    return found


def _quality(error: float) -> dict[str, float]:
    return {"error": error, "sqnr_db": decibels(error), "bits": decibels(error) / decibels(1 / 4)}


def _lloyd_max(name: str) -> dict[str, dict[str, float]]:
    """The best levels there are, by bits."""
    distribution, one = DISTRIBUTIONS[name], torch.ones(1)
    errors = {bits: error_at(distribution, lloyd_max.of(distribution, 1 << bits), one) for bits in BITS}
    return {str(bits): _quality(float(error)) for bits, error in errors.items()}


def _bound(name: str) -> dict[str, dict[str, float]]:
    return {str(bits): _quality(lower_bound(DISTRIBUTIONS[name], bits)) for bits in BITS}


def _blocks(name: str) -> dict[str, dict[str, float]]:
    """Squared error of 4-bit formats by block size, absmax scaling, scales not rounded."""
    return {
        format: {
            str(size): block_error(DISTRIBUTIONS[name], grid.levels, top, size, signed=signed) for size in BLOCK_SIZES
        }
        for format, (grid, top, signed) in BLOCKED.items()
    }


def _clip(name: str) -> dict[str, list[list[float]]]:
    """[clip in standard deviations, SQNR in dB] of the 8-bit formats."""
    curves = {}
    for format in CLIPPED:
        levels = ELEMENTS[format].levels
        errors = error_at(DISTRIBUTIONS[name], levels, CLIPS / max(abs(level) for level in levels))
        curves[format] = [[clip, decibels(error)] for clip, error in zip(CLIPS.tolist(), errors.tolist(), strict=True)]
    return curves
