"""`plan`: what each format would cost each group of layers, measured in two passes, and the best choice of them.

    forward    the calibration text through the original model, block by block; what enters each block is kept
    head       labels drawn from the model's own predictions; the gradient of their negative log-likelihood
    backward   the blocks from last to first: each runs again, its linears' inputs and gradients are summed up
               (planner/sensitivity.py), every candidate is quantized, its cost noted, the gradient passed on

One block in memory, and one hidden state per token and block: 16 windows of 512 tokens of an 8B model take 4 GB. The
costs are written after every block, so a killed measurement runs both passes again but quantizes nothing twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.algorithms.base import Residual, WeightMethod
from fewbits.algorithms.compose import compose
from fewbits.calibration.data import TextSpec, TokenSet
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, unknown
from fewbits.core.progress import OnProgress, Progress
from fewbits.formats.mix import Weights
from fewbits.models.walk import ExpertRef, Ref, linears
from fewbits.pipeline.job import DTYPES, calibration_tokens, check_ignored, choose_device, compiled, ignored
from fewbits.pipeline.shell import ModelShell, check_vocabulary
from fewbits.planner.candidates import Group, candidates, check_target, groups
from fewbits.planner.measurements import Cost, Measurements, read_measurements
from fewbits.planner.plan import LEAST_BITS, Plan, check_budget, make_plan
from fewbits.planner.sensitivity import Sums, cost, parts, watched

_BATCH_TOKENS = 2048
METHODS = ("gptq", "rtn")


def plan(
    model: str | Path,
    bits: float,
    *,
    formats: Sequence[str] = (),
    group_size: int | None = None,
    target: str = "any",
    measurements: str | Path | None = None,
    method: str = "gptq",
    method_options: dict[str, Any] | None = None,
    calibration: TextSpec | TokenSet = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    ignore: Sequence[str] = ("lm_head",),
    dtype: str | None = None,
    device: str | None = None,
    on_progress: OnProgress | None = None,
    residual: Residual | None = None,
    within: bool = False,
) -> Plan:
    """The format of every layer of `model` that loses least at `bits` per weight on average, scales included.

    formats: names to choose from; default: integers of 2, 3, 4, 5, 6 and 8 bits under groups of `group_size` (64).
    target: who must be able to run it (`planner.candidates.TARGETS`). measurements: file that keeps what was measured,
    for other budgets to reuse. method: how codes are chosen while measuring, gptq or rtn.
    residual: goes beside the codes of every layer; the plan has what it leaves of `bits`.
    within: let bits vary within a linear too, by groups of input channels: mixes of the formats (formats/mix.py).
    The rest as for `quantize`. Raises BadInput before any work for arguments that make no sense.
    """
    check_target(target)
    recipe = compose(method, method_options)
    if recipe.name not in METHODS:
        raise unknown("method to measure a plan with", recipe.name, METHODS)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    for pattern in ignore:
        compiled(pattern)
    place = choose_device(device)
    source = open_source(model)
    stored = DTYPES[dtype] if dtype else source.dtype
    found = candidates(formats, group_size, stored, target, within)
    tokens = calibration_tokens(source, calibration, samples, sequence_length, seed)
    settings = {
        "source": source.identity,
        "method": repr(recipe.weights),
        "text": tokens.sha256,
        "seed": seed,
        "dtype": str(stored).removeprefix("torch."),
        "ignore": list(ignore),
    }
    path = None if measurements is None else Path(measurements)
    known = Measurements(settings=settings) if path is None else read_measurements(path, settings)
    shell = ModelShell(source, place, torch.float32 if place.type == "cpu" else source.dtype)
    check_ignored(ignore, shell.layers())
    check_vocabulary(tokens.ids, shell.model.config)
    chosen = [_chosen(shell, index, ignore) for index in range(len(shell.blocks))]
    every = [group for block in chosen for group, _ in block]
    if not every:
        raise BadInput(f"nothing to plan: every linear matches an ignore pattern ({', '.join(ignore)})")
    if residual is not None:
        bits = _less(bits, residual, every)
    refused = check_budget(every, found, bits, target=target, device=place)
    lacking = {
        group.name: [f for f in found if f.name not in refused[group.name] and f.name not in known.of(group)]
        for group in every
    }
    if any(lacking.values()):
        measure(shell, chosen, lacking, known, recipe.weights, tokens, path, on_progress or (lambda _: None))
    return make_plan(known, found, bits, target=target, device=place, model=source.path)


def _less(bits: float, residual: Residual, groups: Sequence[Group]) -> float:
    """What `residual` leaves of `bits` per weight."""
    shapes = [shape for group in groups for shape in group.members.values()]
    taken = sum(spec.bits(shape) for shape in shapes if (spec := residual.spec(shape)) is not None)
    taken_each = taken / sum(rows * columns for rows, columns in shapes)
    if bits - taken_each < LEAST_BITS:
        raise BadInput(
            f"{bits:g} bits per weight, of which the residual takes {taken_each:.3f}: less than {LEAST_BITS} are left "
            "for the codes; ask for more bits or a lower rank"
        )
    return bits - taken_each


def measure(
    shell: ModelShell,
    chosen: Sequence[list[tuple[Group, list[Ref]]]],
    lacking: Mapping[str, list[Weights]],
    known: Measurements,
    method: WeightMethod,
    tokens: TokenSet,
    path: Path | None,
    report: OnProgress,
) -> None:
    """Adds to `known` the costs of the formats that each group is `lacking`, writing it to `path` after every block."""
    wanted = [[(group, refs) for group, refs in block if lacking[group.name]] for block in chosen]
    first = next(index for index, block in enumerate(wanted) if block)
    # The gradient of a fused parameter is a window's own only where it is alone in its batch.
    experts = any(isinstance(ref, ExpertRef) for block in wanted for _, refs in block for ref in refs)
    batches = list(tokens.ids.split(1 if experts else max(1, _BATCH_TOKENS // tokens.ids.shape[1])))
    entering, gradients = _forward(shell, batches, known.settings["seed"], report)
    for index in range(len(shell.blocks) - 1, first - 1, -1):
        prefix, block = shell.blocks[index]
        with shell.resident(prefix, block):
            sums = {group.name: [Sums(refs=part) for part in parts(refs)] for group, refs in wanted[index]}
            with watched([each for inside in sums.values() for each in inside]) as (fused, take):
                for position, hidden in enumerate(entering.pop()):
                    gradients[position], others = shell.backward(index, hidden, gradients[position], fused)
                    take(others, hidden.shape[1])
            for group, _ in wanted[index]:
                found = [each.sensitivity(group.name) for each in sums.pop(group.name)]
                for format in lacking[group.name]:
                    loss, error = cost(found, format, method, group.name)
                    known.add(group, format.name, Cost(bits=group.bits(format), loss=loss, error=error))
        if path is not None:
            known.write(path)
        report(Progress("measure", len(shell.blocks) - index, len(shell.blocks) - first, f"block {index}"))


def _chosen(shell: ModelShell, index: int, ignore: Sequence[str]) -> list[tuple[Group, list[Ref]]]:
    prefix, block = shell.blocks[index]
    refs = [ref for ref in linears(block, shell.topology) if not ignored(f"{prefix}.{ref.name}", ignore)]
    return groups(prefix, index, refs, shell.topology)


def _forward(
    shell: ModelShell, batches: Sequence[Tensor], seed: int, report: OnProgress
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """What enters each block, by block and batch, and the gradients of what leaves the last."""
    total = len(shell.blocks)
    with shell.resident_outside(head=False):
        entering = [shell.embed(batches)]
    for index, (prefix, block) in enumerate(shell.blocks):
        with shell.resident(prefix, block):
            entering.append([shell.forward(index, hidden) for hidden in entering[-1]])
        report(Progress("forward", index + 1, total, "original"))
    generator = torch.Generator(device=shell.device).manual_seed(seed)
    gradients = []
    with shell.resident_outside(head=True):
        for ids, hidden in zip(batches, entering.pop(), strict=True):
            rows = [
                shell.sampled_gradient(ids[row : row + 1], hidden[row : row + 1], generator) for row in range(len(ids))
            ]
            gradients.append(torch.cat(rows))
            report(Progress("head", len(gradients), len(batches), "gradients"))
    return entering, gradients
