"""Which data type for which tensor: every weight and activation of a model, in every format where it clips best.

`formats` computes what a distribution asks for; here are the tensors themselves. The question is that of van Baalen et
al. 2023: is FP8 better than INT8? Their answer, and Kuzmin's et al. 2022 before: on Gaussian values INT8 and E2M5 are
best and every exponent bit more costs 6 dB; exponent bits pay where outliers are, which is in the activations of
transformers and hardly in weights or in convolutional networks. LLM-FP4 and ZeroQuant-FP found the same at 4 bits:
E2M1 before INT4 for activations. So a network without outliers is measured beside the model: a ResNet with Gaussian
weights, or any other that is named.

    SQNR = energy of the tensor / energy of its rounding error, in dB;  6.02 dB are one bit

| operand | scale | |
|---|---|---|
| weight | tensor, channel, group | one scale a tensor, output channel, or group of inputs, clipped for least error |
| activation | static | one scale for all tokens, clipped for least error, the error of all tokens |
| | rest | the same without the first token of each window |
| | absmax | one scale that clips nothing of any token; the error of all but the first |
| | token | a scale for each token as it comes, clipping nothing; the error of all but the first |

A first token that is a thousand times as large as the others is nearly all the energy there is: `static` then says how
well that token is kept. `absmax` says what a static scale that keeps it costs every other token.

Scales are not rounded. FP8 is OFP8's E4M3 and E5M2, without infinities; E2M5 and E3M4 have every code finite. INT4 less
its lowest level is E1M2, and INT8 E1M6. Groups that a row's end cuts short are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.algorithms.clipping import best_factor
from fewbits.calibration.data import TextSpec
from fewbits.core.errors import BadInput
from fewbits.core.progress import OnProgress, Progress
from fewbits.evaluation.studies.operands import (
    ACTIVATION_VALUES,
    GAUSSIAN,
    TOKENS,
    WEIGHT_VALUES,
    Activation,
    Network,
    check,
    gaussian_network,
    of_model,
)
from fewbits.evaluation.studies.record import Record, record
from fewbits.formats import Format
from fewbits.formats.blocks import Scaling
from fewbits.formats.elements import ELEMENTS
from fewbits.formats.scales import PlainScale
from fewbits.metrics.distributions import DISTRIBUTIONS, best_scale
from fewbits.metrics.empirical import Sorted

FORMATS = (
    *("int8", "fp8_e2m5", "fp8_e3m4", "fp8_e4m3", "fp8_e5m2"),
    *("int6", "fp6_e2m3", "fp6_e3m2"),
    *("int4", "fp4_e2m1", "fp4_e3m0", "nf4"),
)
SAMPLES, SEQUENCE_LENGTH, GROUP_SIZE = 8, 512, 64
# Of absmax: quarters of an octave from 1.19 down to 1/4 through 1, then sixteenths around each block's best of those.
COARSE = (1.0, *(2 ** (step / 4) for step in range(1, -9, -1) if step))
FINE = (1.0, *(2 ** (step / 16) for step in range(-3, 4) if step))
SEARCHED = 1 << 16  # values of a weight, in whole rows, whose channels and groups are searched
_LEAST = 1e-15  # of a relative error: what is exact counts 150 dB

SOURCES = (
    "Van Baalen et al. 2023, FP8 versus INT8 for efficient deep learning inference, arXiv 2303.17951",
    "Kuzmin et al. 2022, FP8 Quantization: The Power of the Exponent, arXiv 2208.09225",
    "Liu et al. 2023, LLM-FP4: 4-Bit Floating-Point Quantized Transformers, arXiv 2310.16836",
    "Wu et al. 2023, ZeroQuant-FP: W4A8 post-training quantization using floating-point formats, arXiv 2307.09782",
    "Sun et al. 2024, Massive Activations in Large Language Models, arXiv 2402.17762",
)


def study(
    model: str,
    *,
    samples: int | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    seed: int = 0,
    text: TextSpec = None,
    group_size: int = GROUP_SIZE,
    contrast: str = GAUSSIAN,
    on_progress: OnProgress | None = None,
) -> Record:
    """The record: SQNR of every format on every operand of `model` and of `contrast`, and how heavy their tails are.

    model: as `fewbits.load` takes it, or a directory that holds an encoder; contrast: likewise, or "gaussian".
    samples, sequence_length, seed, text: the windows shown. group_size: weights that share a scale.
    """
    if group_size < 2:
        raise BadInput(f"group size {group_size}: needs 2 or more; one weight a scale leaves nothing to round")
    started = time.monotonic()
    shown: dict[str, Any] = {"samples": samples, "sequence_length": sequence_length, "text": text, "at_most": SAMPLES}
    for name in (model, contrast):
        check(name)
    results: dict[str, Any] = {"formats": {name: ELEMENTS[name].bits for name in FORMATS}}
    results["gaussian"] = {name: _decibels(best_scale(DISTRIBUTIONS["gaussian"], _levels(name))[1]) for name in FORMATS}
    about, described = {}, {}
    for role, name in (("model", model), ("contrast", contrast)):
        gaussian = name == GAUSSIAN
        network = gaussian_network(seed) if gaussian else of_model(name, seed=seed, on_progress=on_progress, **shown)
        results[role] = _measure(network, group_size, seed, on_progress)
        about[role], described[role] = network.about, network.text or {}
        del network  # before the next is loaded
    text_shown = described["model"]
    settings = {
        "model": about["model"],
        "contrast": about["contrast"],
        "text": text_shown.get("description", ""),
        "tokens": f"{text_shown.get('samples')} windows of {text_shown.get('sequence_length')}, seed {seed}",
        "text_sha256": text_shown.get("sha256", ""),
        "group_size": group_size,
        "seed": seed,
        "sample": f"of a weight whole rows, up to {WEIGHT_VALUES} values, {SEARCHED} for channels and groups; of an "
        f"activation the first token of each window and up to {TOKENS} others, or about {ACTIVATION_VALUES} values",
        "left_out": "embeddings and head; routers of experts; operands that are all zero",
    }
    seconds = time.monotonic() - started
    return record("model_formats", settings=settings, sources=SOURCES, results=results, seconds=seconds)


def _measure(network: Network, group_size: int, seed: int, on_progress: OnProgress | None) -> dict[str, Any]:
    """One network: an entry per weight and per activation that is not all zero."""
    found: dict[str, Any] = {"name": network.name, "about": network.about, "weights": [], "activations": []}
    total = len(network.weights) + len(network.activations)
    for done, operand in enumerate((*network.weights, *network.activations)):
        about: dict[str, Any] = {"name": operand.name, "kind": operand.kind, "block": operand.block}
        if isinstance(operand, Activation):
            key, entry = "activations", of_activation(operand.first, operand.rest, operand.seen)
        else:
            key, entry = "weights", of_weight(operand.rows(seed), group_size)
        if entry:
            found[key].append(about | entry)
        if on_progress:
            on_progress(Progress(f"formats on {network.name}", done + 1, total, operand.name))
    return found


# ---- one tensor


def of_weight(rows: Tensor, group_size: int = GROUP_SIZE) -> dict[str, Any]:
    """Tails, and SQNR in dB by scale in the order of FORMATS, of rows [out, in]; empty where all are zero."""
    values = Sorted(rows)
    if not values.energy:
        return {}
    width, kept = min(group_size, rows.shape[1]), max(1, SEARCHED // rows.shape[1])
    rows = rows[:: -(-len(rows) // kept)]
    whole = rows[:, : rows.shape[1] // width * width].reshape(len(rows), -1, width)
    return {
        **_tails(values),
        "sqnr_db": {
            "tensor": _clipped(values),
            "channel": _scaled(rows[:, None], COARSE, FINE),
            "group": _scaled(whole, COARSE, FINE),
        },
    }


def of_activation(first: Tensor | None, rest: Tensor, seen: int) -> dict[str, Any]:
    """The same of an activation: first tokens [windows, channels] or None, a sample of `seen` others [n, channels]."""
    others = Sorted(rest)
    if not others.energy:
        return {}
    everything, share = others, 0.0
    if first is not None:
        counts = torch.cat([torch.ones_like(first), torch.full_like(rest, seen / len(rest))])
        everything = Sorted(torch.cat([first, rest]), counts)
        share = 1 - others.energy * seen / len(rest) / everything.energy
    static = _clipped(everything)
    return {
        **_tails(everything),
        "rest": _tails(others),
        "first_share": round(max(share, 0.0), 4),
        "sqnr_db": {
            "static": static,
            "rest": static if first is None else _clipped(others),
            "absmax": [_decibels(_covering(others, name, everything.absmax)) for name in FORMATS],
            "token": _scaled(rest[:, None], (1.0,)),
        },
    }


def _tails(values: Sorted) -> dict[str, float]:
    """How heavy they are: kurtosis, and the largest magnitude over the rms."""
    return {"kurtosis": float(f"{values.kurtosis:.4g}"), "peak": float(f"{values.absmax / values.rms:.4g}")}


def _clipped(values: Sorted) -> list[float]:
    """One scale, clipped for least error."""
    return [_decibels(values.best_scale(_levels(name))[1]) for name in FORMATS]


def _covering(values: Sorted, name: str, absmax: float) -> float:
    """Error with the scale that puts `absmax` on the format's last level."""
    return float(values.errors(_levels(name), torch.tensor([absmax / ELEMENTS[name].top]))[0])


def _scaled(blocks: Tensor, *searches: Sequence[float]) -> list[float]:
    """A scale for each of blocks [rows, blocks, n]: its largest magnitude times the best of each search in turn."""
    high = blocks.abs().amax(dim=-1)
    energy = float(blocks.double().square().sum())
    scaling = Scaling(block="channel", store=PlainScale(torch.float32))
    found = []
    for name in FORMATS:
        format = Format(name=name, grid=ELEMENTS[name], scaling=scaling)
        low, top, loss = -high, high, high
        for factors in searches:
            low, top, loss = best_factor(blocks, (low, top), factors, format)
        found.append(_decibels(float(loss.double().sum()) / energy if energy else 0.0))
    return found


def _levels(name: str) -> tuple[float, ...]:
    return ELEMENTS[name].levels


def _decibels(error: float) -> float:
    return round(-10 * math.log10(max(error, _LEAST)), 2)
