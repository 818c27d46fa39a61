"""What the linears of a block receive, rounded as the quantized model will, and the ranges of static rounding."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.algorithms.diagnosis import ROWS, diagnose
from fewbits.algorithms.input_ranges import InputRange
from fewbits.calibration.activations import watched
from fewbits.calibration.collect import Ref, input_stages
from fewbits.core.errors import Unsupported
from fewbits.formats import Format
from fewbits.formats.outliers import Outliers, round_rest
from fewbits.formats.rows import Params, fixed_params, round_rows
from fewbits.formats.scales import State
from fewbits.models.walk import ExpertRef


def input_ranges(
    refs: Sequence[Ref],
    forward: Callable[[Tensor], Tensor],
    hidden: Sequence[Tensor],
    activations: Format | None,
    estimator: str,
) -> dict[str, InputRange]:
    """The range of each ref's input over the calibration text, one for all that share an input; none if dynamic."""
    if activations is None or not activations.scaling.static or not refs:
        return {}
    stages = input_stages(refs, lambda: forward(hidden[0]))
    found = {stage[0].name: InputRange(format=activations, estimator=estimator) for stage in stages}
    with watched(stages, lambda name, x: found[name].add(x)):
        for batch in hidden:
            forward(batch)
    return {ref.name: found[stage[0].name] for stage in stages for ref in stage}


def diagnoses(
    refs: Sequence[Ref],
    forward: Callable[[Tensor], Tensor],
    sample: Tensor | None,
    formats: Mapping[str, Format],
    activations: Format | None,
) -> dict[str, dict[str, Any]]:
    """What rounding costs the linears that share an input (algorithms/diagnosis.py), by the name of the first of them.

    sample: hidden states [1, T, H] that enter the block; None where there are none to look at.
    """
    if activations is None or sample is None or any(isinstance(ref, ExpertRef) for ref in refs):
        return {}
    stages = input_stages(refs, lambda: forward(sample))
    seen: dict[str, Tensor] = {}
    with watched(stages, lambda name, x: seen.setdefault(name, x.detach().reshape(-1, x.shape[-1]))):
        forward(sample)
    found = {}
    for stage in stages:
        rows = seen.get(stage[0].name)
        if rows is not None:
            every = max(1, len(rows) // ROWS)
            weights = [ref.weight for ref in stage]
            found[stage[0].name] = diagnose(rows[::every], weights, formats[stage[0].name], activations)
    return found


# Of a method that keeps outlier columns: those of each linear that is solved, by name.
Apart = dict[str, Outliers | None]


@contextlib.contextmanager
def quantized_activations(
    refs: Sequence[Ref],
    format: Format | None,
    states: Mapping[str, State] | None = None,
    apart: Apart | None = None,
) -> Iterator[None]:
    """Rounds what `refs` receive to `format`, as the quantized model will, which reads one sequence at a time.

    states: of static formats, the parameters by the name of a ref; without them the range is that of what comes.
    apart: of a method that keeps outlier columns, those of each linear; what is not in it yet is not rounded.
    """
    if format is None:
        yield
        return
    handles = []
    last: list[Tensor] = []  # an input and what became of it: q, k and v receive the same, and still do

    def pre(name: str, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if apart is not None and name not in apart:
            return args
        if not last or last[0] is not x:
            fixed = fixed_params((states or {}).get(name, {}))
            rounded = _rounded(x.detach(), format, fixed, apart and apart[name]).to(x.dtype)
            if x.requires_grad:  # the gradient passes the rounding as if it were not there
                rounded = x + (rounded - x).detach()
            last[:] = x, rounded
        return (last[1], *args[1:])

    def post(name: str, module: nn.Module, y: Tensor) -> Tensor | None:
        """Original weights of the columns that only the run knows, in place of what the codes say."""
        kept = apart and apart.get(name)
        if not kept or kept.columns is not None or kept.weight is None:
            return None
        rows = last[0].reshape(-1, last[0].shape[-1])
        columns = kept.find(rows)
        change = kept.weight[:, columns].float() - module.get_parameter("weight")[:, columns].float()
        return y + (rows[:, columns].float() @ change.t()).reshape(y.shape).to(y.dtype)

    try:
        for ref in refs:
            if isinstance(ref, ExpertRef):
                raise Unsupported(
                    f"{ref.name}: activations of fused experts are not quantized; "
                    "choose a weight-only scheme such as W4A16"
                )
            before = functools.partial(lambda name, _, args: pre(name, args), ref.name)
            handles.append(ref.module.register_forward_pre_hook(before))
            if apart is not None:
                after = functools.partial(lambda name, module, _, y: post(name, module, y), ref.name)
                handles.append(ref.module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(x: Tensor, format: Format, fixed: Params | None, kept: Outliers | None) -> Tensor:
    """`x` [B, T, in] or [T, in]; one dynamic scale per tensor is one per sequence."""
    rows = x.reshape(-1, x.shape[-1])
    if kept:
        return round_rest(rows, format, kept.find(rows), fixed).reshape(x.shape)
    alone = format.scaling.block == "tensor" and not format.scaling.static and x.dim() == 3
    parts = rows.split(x.shape[1]) if alone else [rows]
    return torch.cat([round_rows(part, format, fixed) for part in parts]).reshape(x.shape)
