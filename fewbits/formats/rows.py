"""Activations: rows that come as the model runs.

    x' = round_rows(x, format, fixed)          x [tokens, in]

| scales per | format | decided |
|---|---|---|
| token | `int8-token` | as it comes, each token alone |
| group of a token | `fp8_e4m3-g128`, `mxfp4` | as it comes, each token alone |
| tensor | `int8-tensor` | as it comes, by all tokens of the call: what a token becomes depends on its neighbours |
| tensor, group of channels | `int8-tensor-static`, `int8-g64-static` | by calibration: `fixed`, in the checkpoint |

A static scale costs nothing when the model runs and clips what calibration never saw. It has one enemy of its own: the
first token of a text is a *sink* in most models, and its largest values are thousands of times those of all others, so
that a scale that reaches them rounds everything else to 0. With `-sinks` calibration leaves tokens out whose largest
magnitude exceeds the median token's `SINK_RATIO` times, and a token that reaches beyond the range when the model runs
takes a scale of its own, as if it were dynamic: nothing is clipped. Tokens are told by their size and not by their
position, so caches, padding and batches change nothing.

E4M3 scales under an outer float32 (NVFP4) get an outer scale per token here, where a weight has one per tensor;
checkpoints of the ecosystem fix one per layer by calibration, which this is never worse than by range. Formats whose
blocks reach over rows, or whose levels are fitted to a tensor, are for weights only.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch
from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.formats.base import Format
from fewbits.formats.scales import FloatScale, Layout, PlainScale, State

SINK_RATIO = 4.0  # times the median over tokens of their largest magnitude

Params = tuple[Tensor, Tensor | None]  # scale and zero, [rows or 1, groups]


def check_rows(format: Format) -> None:
    """BadInput where activations cannot be rounded to `format`."""
    scaling = format.scaling
    if scaling.block not in ("token", "group", "tensor") or format.fit:
        raise BadInput(
            f"activations as {format.name}; their scales are per token, per group of a token or per tensor, "
            "e.g. int8-token, fp8_e4m3-g128, mxfp4, int8-tensor-static"
        )
    plain = type(scaling.store) is FloatScale and type(format) is Format
    if scaling.store.nested and not plain:
        raise BadInput(f"activations as {format.name}: its scales are decided for a whole tensor; use nvfp4 or mxfp4")
    if scaling.static and (scaling.block == "token" or not isinstance(scaling.store, PlainScale)):
        raise BadInput(f"activations as {format.name}: static scales are plain ones, per tensor or group of channels")


def input_layout(format: Format | None, in_features: int) -> Layout:
    """Name -> (shape, dtype) of the tensors beside a weight whose input is rounded to `format`: none unless static."""
    if format is None or not format.scaling.static:
        return {}
    shape = 1, format.scaling.groups(in_features)
    found: Layout = {"input_scale": (shape, torch.float32)}
    if format.scaling.zero_point:
        found["input_zero"] = shape, torch.uint8
    return found


def check_inputs(state: State, layout: Layout) -> None:
    """BadInput where static parameters read from a file are not what `input_layout` says."""
    for name, (shape, dtype) in layout.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise BadInput(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; expected {dtype} {shape}")
        if name == "input_scale" and not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
            raise BadInput(f"{name} is not finite and above 0")


def fixed_params(state: State) -> Params | None:
    """The static parameters among `state`, or None where there are none."""
    return (state["input_scale"], state.get("input_zero")) if "input_scale" in state else None


@lru_cache(maxsize=64)
def by_token(format: Format) -> Format:
    """`format` with a dynamic scale per token, or per group of a token."""
    block = "group" if format.scaling.block == "group" else "token"
    return dataclasses.replace(
        format, scaling=dataclasses.replace(format.scaling, block=block, static=False, sinks=False)
    )


def sinks(x: Tensor) -> Tensor:
    """bool [tokens]: which tokens of `x` [tokens, in] tower over the others."""
    magnitude = x.abs().amax(dim=1)
    return magnitude > SINK_RATIO * magnitude.median()


@lru_cache(maxsize=64)
def sparing_sinks(format: Format) -> Format:
    """`format`, of one scale for all tokens, with that of sinks apart."""
    return dataclasses.replace(format, scaling=dataclasses.replace(format.scaling, static=True, sinks=True))


def range_params(x: Tensor, format: Format) -> Params:
    """The static parameters that `x` [rows, in] alone would give by its range."""
    low, high = format.ranges(x[~sinks(x)] if format.scaling.sinks else x)
    return format.params_from_range(low.amin(0, keepdim=True), high.amax(0, keepdim=True))


def row_params(x: Tensor, format: Format, fixed: Params | None = None) -> Params:
    """Scale and zero for the rows of `x` [rows, in] float32: `fixed` where static and not exceeded, else from x.

    Static formats for which nothing is fixed yet take the range of x.
    """
    if not format.scaling.static:
        return format.params(x)
    fixed = fixed or range_params(x, format)
    if not format.scaling.sinks:
        return fixed
    scale, zero = by_token(format).params(x)
    apart = scale > fixed[0]
    known = None if zero is None or fixed[1] is None else torch.where(apart, zero, fixed[1])
    return torch.where(apart, scale, fixed[0]), known


def round_rows(x: Tensor, format: Format, fixed: Params | None = None) -> Tensor:
    """`x` [rows, in] moved to what `format` can say, float32. BadInput for NaN or infinity."""
    x = x.float()
    if not x.shape[0]:
        return x
    format.check(x, "activations")
    scale, zero = row_params(x, format, fixed)
    if isinstance(format.scaling.store, FloatScale):
        scale = format.scaling.store.by_row(scale)
    return format.snap(x, *format.expand(scale, zero, (x.shape[0], x.shape[1])))
