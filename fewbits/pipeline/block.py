"""One block: collect what its linears receive, quantize them, note what was lost.

With `sequential` (GPTQ's "true sequential") the linears are taken in the order the block runs them: o_proj
sees the attention of the quantized q, k, v, down_proj sees the quantized gate and up. Each stage costs
another partial forward of the calibration text.

Linears that receive the same input share one Hessian and one factorisation: their rows are stacked, solved
together and taken apart again, those of one format each. Rows do not influence each other, so this changes
nothing but the time. A residual is of one linear each.

A recipe that learns does so once all linears of the block have codes, and only then are they recorded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.algorithms.base import Block, Learned, Lesson, Pupil, Solved, Stage, proxy_loss
from fewbits.algorithms.compose import Recipe
from fewbits.algorithms.input_ranges import InputRange
from fewbits.algorithms.mixes import solve as solve_weight
from fewbits.calibration.collect import Original, Ref, collect_inputs, input_stages
from fewbits.calibration.coverage import cover
from fewbits.calibration.stats import Inputs, InputSum
from fewbits.formats import Format, Quantized
from fewbits.formats.low_rank import LowRank
from fewbits.formats.mix import Mixed, Weights
from fewbits.formats.outliers import Outliers
from fewbits.formats.scales import State
from fewbits.metrics import sqnr_db
from fewbits.metrics.error import relative_error as weight_error
from fewbits.metrics.estimate import finite
from fewbits.models.walk import ExpertRef
from fewbits.pipeline.job import main_format
from fewbits.pipeline.rounding import Apart, diagnoses, input_ranges, quantized_activations
from fewbits.pipeline.shell import ModelShell

_HISTOGRAM_BINS = 96


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A quantized linear: where it goes in the checkpoint, its codes, and what is recorded of it.

    name: in its block.  inputs: the parameters that static activations are rounded with (formats/rows.py).
    """

    name: str
    disk_name: str
    weight: Quantized | Mixed
    record: dict[str, Any]
    residual: LowRank | None = None
    outliers: Outliers | None = None
    inputs: State = dataclasses.field(default_factory=dict)


def solve_block(
    shell: ModelShell,
    index: int,
    refs: Sequence[Ref],
    formats: Mapping[str, Weights],
    recipe: Recipe,
    hidden: Sequence[Tensor],
    reference: Sequence[Tensor] = (),
    targets: Sequence[Tensor] = (),
    *,
    sequential: bool,
    experts: str = "borrow",
    activations: Format | None = None,
    act_range: str = "absmax",
    scale_dtype: torch.dtype = torch.float32,
    sample: Tensor | None = None,
) -> tuple[list[Layer], dict[str, Tensor]]:
    """Quantizes `refs` of block `index`, resident in `shell`; leaves the decoded weights in the block.

    Inputs are rounded to `activations` for every step but transforms: those must see what there is to be rounded.
    Static ones are given the range that the estimator `act_range` finds behind the transforms, their scale rounded to
    `scale_dtype`.

    sample: hidden states to look at what rounding inputs costs, or None.

    `formats` are theirs by name; `hidden` the calibration inputs of the block, `reference` and `targets` the same
    text's inputs and outputs in the original model. Recipes that need no statistics see no text. experts: what is done
    for those that calibration hardly reached, of POLICIES in calibration/coverage.py. Returns the layers, and other
    parameters of the block that changed.
    """
    prefix, module = shell.blocks[index]

    def forward(batch: Tensor) -> Tensor:
        return shell.forward(index, batch)

    for ref in refs:  # before a NaN spreads to the inputs of every linear behind it
        formats[ref.name].check(ref.weight, f"{prefix}.{ref.name}.weight")
    # One sequence is enough to see who shares an input, and nothing of it is kept.
    calibrated = bool(recipe.statistics)
    stages = input_stages(refs, lambda: forward(hidden[0])) if calibrated else [[ref] for ref in refs]
    original = None
    if "cross" in recipe.statistics:
        kept = _copies(refs) if sequential else {}
        original = Original(forward=forward, batches=reference, weights=lambda: _restored(refs, kept))

    def collected(wanted: Sequence[Sequence[Ref]]) -> list[Stage]:
        sums: dict[str, InputSum] = {}
        if calibrated:
            sums = collect_inputs(wanted, forward, hidden, recipe.statistics, original)
        ordered = [ref for stage in wanted for ref in stage]
        few = cover(ordered, sums, experts, prefix)
        return [_stage(members, sums, few, prefix) for members in _sharing(ordered, sums)]

    changed: dict[str, Tensor] = {}
    notes: dict[str, list[str]] = {}
    planned: Iterable[Sequence[Stage]] = map(collected, [[stage] for stage in stages] if sequential else [stages])
    main = {name: main_format(format) for name, format in formats.items()}  # what transforms judge by
    if recipe.transforms:
        found = collected(stages)
        for transform in recipe.transforms:
            block = Block(
                name=prefix, module=module, topology=shell.topology, stages=found, format=main[refs[0].name],
                formats=main, activations=activations,
            )  # fmt: skip
            done = transform.apply(block)
            changed.update({name: module.get_parameter(name).detach() for name in done.changed})
            for name, lines in done.notes.items():
                notes.setdefault(name, []).extend(lines)
        if not sequential and activations is None:  # rounded inputs are no function of what was seen before
            planned = [found]
        elif original is not None:
            kept.update(_copies(refs))
    ranges = input_ranges(refs, forward, hidden, activations, act_range)
    states = {name: found.state(f"{prefix}.{name}", scale_dtype) for name, found in ranges.items()}
    causes = diagnoses(refs, forward, sample, main, activations)
    # Which columns of an input are outliers is known once its linears are solved; until then it is not rounded.
    apart: Apart | None = {} if recipe.keeps_outliers else None
    with quantized_activations(refs, activations, states, apart):
        parts: Iterable[_Part] = (
            part for found in planned for part in _solve_stages(found, prefix, formats, recipe, apart)
        )
        for learner in recipe.learners if refs else ():
            started = time.perf_counter()
            parts = list(parts)
            lesson = Lesson(
                name=prefix,
                pupils=[part.pupil for part in parts],
                forward=lambda batch: shell.forward(index, batch, grad=torch.is_grad_enabled()),
                inputs=[sequence for batch in hidden for sequence in batch],
                targets=[sequence for batch in targets for sequence in batch],
            )
            parts = _learned(parts, learner.learn(lesson), time.perf_counter() - started)
        layers = [_layer(part, index, prefix, notes) for part in parts]
        return [_with_inputs(layer, states, ranges, causes) for layer in layers], changed


def _with_inputs(
    layer: Layer,
    states: Mapping[str, State],
    ranges: Mapping[str, InputRange],
    causes: Mapping[str, dict[str, Any]],
) -> Layer:
    if layer.name in causes:
        layer = dataclasses.replace(layer, record={**layer.record, "rounding": causes[layer.name]})
    if layer.name not in states:
        return layer
    record = {**layer.record, "input_range": ranges[layer.name].describe()}
    return dataclasses.replace(layer, inputs=states[layer.name], record=record)


def _copies(refs: Sequence[Ref]) -> dict[str, Tensor]:
    return {ref.name: ref.weight.clone() for ref in refs}


@contextlib.contextmanager
def _restored(refs: Sequence[Ref], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The refs with `weights` in place of what they have now."""
    now = {ref.name: ref.weight.clone() for ref in refs if ref.name in weights}
    for ref in refs:
        if ref.name in weights:
            ref.write(weights[ref.name])
    try:
        yield
    finally:
        for ref in refs:
            if ref.name in now:
                ref.write(now[ref.name])


def _stage(members: Sequence[Ref], sums: Mapping[str, InputSum], few: Mapping[str, Inputs], prefix: str) -> Stage:
    head = members[0].name
    if head in few:
        return Stage(refs=members, inputs=few[head])
    return Stage(refs=members, inputs=sums[head].inputs(f"{prefix}.{head}.weight") if head in sums else Inputs())


def _sharing(refs: Sequence[Ref], sums: Mapping[str, InputSum]) -> list[list[Ref]]:
    """Refs in groups of one statistic; each alone where there is none."""
    groups: dict[object, list[Ref]] = {}
    for ref in refs:
        groups.setdefault(id(sums[ref.name]) if ref.name in sums else ref.name, []).append(ref)
    return list(groups.values())


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A linear with its solution: `pupil` holds its weight as it was and its codes. learned: loss before and after."""

    pupil: Pupil
    solved: Solved
    calibrated: bool
    seconds: float
    learned: tuple[float, float] | None = None


def _solve_stages(
    stages: Sequence[Stage], prefix: str, formats: Mapping[str, Weights], recipe: Recipe, apart: Apart | None
) -> Iterator[_Part]:
    for stage in stages:
        # Rows that are quantized each as if alone are solved together; other formats take a matrix at a time.
        parts: dict[str, list[Ref]] = {}
        for ref in stage.refs:
            format = formats[ref.name]
            parts.setdefault(format.name if format.rowwise else ref.name, []).append(ref)
        for members in parts.values():
            for part in _solve(members, stage.inputs, prefix, formats[members[0].name], recipe):
                if apart is not None:
                    apart[part.pupil.ref.name] = part.solved.outliers
                yield part


def _solve(members: Sequence[Ref], inputs: Inputs, prefix: str, format: Weights, recipe: Recipe) -> list[_Part]:
    """The members' codes; their decoded values are in the block afterwards."""
    started = time.perf_counter()
    name = f"{prefix}.{members[0].name}.weight"
    weights = [ref.weight.to(torch.float32, copy=True) for ref in members]

    def solve(stacked: Tensor) -> Solved:
        return solve_weight(recipe.weights, recipe.refinements, stacked, format, inputs, name)

    solved = solve(torch.cat(weights))
    residuals: Sequence[LowRank | None] = [None] * len(weights)
    if recipe.residual is not None:
        done = recipe.residual.correct(solved, weights, inputs, name, solve)
        solved, residuals = done.solved, done.residuals
    seconds = (time.perf_counter() - started) / len(members)
    parts, start = [], 0
    for ref, weight, residual in zip(members, weights, residuals, strict=True):
        own = _rows(solved, start, len(weight))
        start += len(weight)
        pupil = Pupil(
            ref=ref, weight=weight, quantized=own.quantized, inputs=inputs, residual=residual, outliers=own.outliers
        )
        ref.write(pupil.values(own.quantized))
        calibrated = bool(recipe.statistics)
        parts.append(_Part(pupil=pupil, solved=own, calibrated=calibrated, seconds=seconds))
    return parts


def _learned(parts: Sequence[_Part], lesson: Learned, seconds: float) -> list[_Part]:
    """`parts` with what was learned in place of their codes, in the block too."""
    found = []
    for part, quantized in zip(parts, lesson.quantized, strict=True):
        decoded = part.pupil.values(quantized)
        part.pupil.ref.write(decoded)
        loss = part.solved.loss
        if loss is not None and part.pupil.inputs.hessian is not None:
            loss = proxy_loss(part.pupil.weight - decoded, part.pupil.inputs.hessian)
        solved = dataclasses.replace(part.solved, quantized=quantized, loss=loss)
        found.append(
            dataclasses.replace(
                part,
                pupil=dataclasses.replace(part.pupil, quantized=quantized),
                solved=solved,
                seconds=part.seconds + seconds / len(parts),
                learned=(lesson.before, lesson.after),
            )
        )
    return found


def _layer(part: _Part, index: int, prefix: str, notes: Mapping[str, list[str]]) -> Layer:
    ref, weight, solved = part.pupil.ref, part.pupil.weight, part.solved
    quantized, residual = solved.quantized, part.pupil.residual
    decoded = part.pupil.values(quantized)
    record = {
        "name": f"{prefix}.{ref.name}",
        "kind": ref.kind,
        "block": index,
        "shape": list(quantized.shape),
        "format": quantized.format.name,
        "bits": quantized.format.bits_per_weight(quantized.shape) + _bits(residual, quantized.shape),
        "parameters": weight.numel(),
        "tokens": part.pupil.inputs.tokens if part.calibrated else None,
        "expert": ref.index if isinstance(ref, ExpertRef) else None,
        "weight_sqnr_db": finite(sqnr_db(weight, decoded)),
        "relative_error": weight_error(weight, decoded),
        "rtn_relative_error": None,
        "error_of": "weights",
        "seconds": part.seconds,
        "notes": [*notes.get(ref.name, ()), *solved.notes],
        "distribution": _distribution(weight, quantized),
    }
    if solved.loss is not None and solved.rtn_loss is not None and solved.zero_loss is not None:
        total_loss = float(solved.zero_loss.sum())
        if total_loss > 0:
            record["error_of"] = "outputs"
            record["relative_error"] = float(solved.loss.sum()) / total_loss
            record["rtn_relative_error"] = float(solved.rtn_loss.sum()) / total_loss
    if solved.outliers is not None:
        kept = solved.outliers.spec
        record["bits"] += kept.bits(quantized.shape) / weight.numel()
        record["outliers"] = kept.entry()
    if residual is not None:
        spec = residual.spec
        record["residual"] = {"rank": spec.rank, "dtype": spec.dtype_name, "bits": _bits(residual, quantized.shape)}
    if part.learned is not None:
        record["block_loss"] = dict(zip(("before", "after"), map(finite, part.learned), strict=True))
    return Layer(
        name=ref.name,
        disk_name=f"{prefix}.{ref.disk_name}",
        weight=quantized,
        record=record,
        residual=residual,
        outliers=solved.outliers,
    )


def _bits(residual: LowRank | None, shape: tuple[int, int]) -> float:
    """What a residual adds per weight of a linear of `shape`."""
    return 0.0 if residual is None else residual.spec.bits(shape) / (shape[0] * shape[1])


def _rows(whole: Solved, start: int, count: int) -> Solved:
    """The solution of `count` rows from `start`, of weights that were solved stacked."""
    if count == whole.quantized.shape[0]:
        return whole

    def part(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows[start : start + count].contiguous()

    def some(stacked: Quantized) -> Quantized:
        return dataclasses.replace(
            stacked, codes=part(stacked.codes), scale=part(stacked.scale), zero=part(stacked.zero)
        )

    stacked = whole.quantized
    if isinstance(stacked, Mixed):
        quantized = dataclasses.replace(stacked, parts=tuple(map(some, stacked.parts)))
    else:
        quantized = some(stacked)
    losses = {name: part(getattr(whole, name)) for name in ("loss", "rtn_loss", "zero_loss")}
    outliers = whole.outliers and dataclasses.replace(whole.outliers, weight=part(whole.outliers.weight))
    return dataclasses.replace(whole, quantized=quantized, outliers=outliers, **losses)


def _distribution(weight: Tensor, quantized: Quantized | Mixed) -> dict[str, Any]:
    """A histogram of the weight and the levels of the grid (of most columns) at the median scale and zero point."""
    part = max(quantized.parts, key=lambda each: each.shape[1]) if isinstance(quantized, Mixed) else quantized
    bound = float(weight.abs().max()) or 1.0
    counts = torch.histc(weight.cpu(), _HISTOGRAM_BINS, -bound, bound)
    edges = torch.linspace(-bound, bound, _HISTOGRAM_BINS + 1)
    zero = None if part.zero is None else part.zero.float().median().cpu()
    every = torch.arange(len(part.format.grid.levels), dtype=torch.uint8)
    levels = part.format.decode(every, part.scale.float().median().cpu(), zero)
    return {
        "edges": [round(value, 8) for value in edges.tolist()],
        "counts": [int(value) for value in counts.tolist()],
        "levels": levels.tolist(),
    }
