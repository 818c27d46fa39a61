"""Collects statistics of the linears of one block while calibration text runs through it.

Linears that receive the very same tensor (q, k, v; gate, up) share one statistic; this is seen from the
tensors, so it holds for architectures no table knows. Linears inside fused expert parameters have no
module to hook: their owner is hooked instead, and each expert's inputs are worked out from the routing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fewbits.calibration.stats import InputSum
from fewbits.models.walk import ExpertRef, LinearRef

Ref = LinearRef | ExpertRef


class _Seen(Exception):
    """Raised by the last hook of a stage: what comes after need not be computed."""


def input_stages(refs: Sequence[Ref], run: Callable[[], object]) -> list[list[Ref]]:
    """Groups `refs` by the tensor they receive, in the order `run()` reaches them.

    `run` sends one batch through the block. Experts of one owner form two stages: gate and up, then down.
    Linears that `run` does not reach come last, each on its own.
    """
    stages: list[tuple[object, list[Ref]]] = []
    handles = []

    def linear_hook(ref: LinearRef) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            for key, members in stages:
                if key is x:
                    members.append(ref)
                    return
            stages.append((x, [ref]))

        return hook

    def owner_hook(members: list[ExpertRef]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            first: list[Ref] = [ref for ref in members if ref.part != "down_proj"]
            second: list[Ref] = [ref for ref in members if ref.part == "down_proj"]
            stages.extend((object(), stage) for stage in (first, second) if stage)

        return hook

    for ref in refs:
        if isinstance(ref, LinearRef):
            handles.append(ref.module.register_forward_pre_hook(linear_hook(ref)))
    for owner, members in _owners(refs).items():
        handles.append(owner.register_forward_pre_hook(owner_hook(members)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    grouped = [members for _, members in stages]
    reached = {ref.name for members in grouped for ref in members}
    return grouped + [[ref] for ref in refs if ref.name not in reached]


def _owners(refs: Sequence[Ref]) -> dict[nn.Module, list[ExpertRef]]:
    owners: dict[nn.Module, list[ExpertRef]] = {}
    for ref in refs:
        if isinstance(ref, ExpertRef):
            owners.setdefault(ref.owner, []).append(ref)
    return owners


def collect_inputs(
    stages: Sequence[Sequence[Ref]],
    forward: Callable[[Tensor], object],
    batches: Sequence[Tensor],
    wanted: frozenset[str],
    original: Original | None = None,
) -> dict[str, InputSum]:
    """Sums over the inputs of every ref in `stages`; refs of one plain stage, gate and up of one expert share one.

    `forward` sends a batch through the block, which ends early once the last stage asked for has been seen.
    wanted: names of STATISTICS. original: how the same tokens run through the original block; needed for "cross".
    """
    heads, owners = _watched(stages)
    sums = _sums(stages, owners, wanted)
    seen: dict[str, Tensor] = {}  # what the stages received in the original model

    def one(name: str, x: Tensor) -> None:
        sums[name].add(x, seen.get(name))

    def keep(name: str, x: Tensor) -> None:
        seen[name] = x.detach()

    for position, batch in enumerate(batches):
        if original is not None and "cross" in wanted:
            with original.weights():
                _run(heads, {}, keep, lambda position=position: original.forward(original.batches[position]))
        _run(heads, owners, one, lambda batch=batch: forward(batch))
        seen.clear()
    return sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Original:
    """The original block: `forward` sends a batch through it while `weights()` is open."""

    forward: Callable[[Tensor], object]
    batches: Sequence[Tensor]
    weights: Callable[[], contextlib.AbstractContextManager[None]]


def _watched(stages: Sequence[Sequence[Ref]]) -> tuple[list[LinearRef], dict[nn.Module, list[ExpertRef]]]:
    heads = [stage[0] for stage in stages]
    return [ref for ref in heads if isinstance(ref, LinearRef)], _owners([ref for stage in stages for ref in stage])


def _sums(
    stages: Sequence[Sequence[Ref]], owners: dict[nn.Module, list[ExpertRef]], wanted: frozenset[str]
) -> dict[str, InputSum]:
    sums: dict[str, InputSum] = {}
    for members in stages:
        head = members[0]
        if isinstance(head, LinearRef):
            total = InputSum(head.weight.shape[1], wanted, head.weight.device)
            sums.update({ref.name: total for ref in members})
    for experts in owners.values():
        shared: dict[int, InputSum] = {}
        for ref in experts:
            total = InputSum(ref.weight.shape[1], wanted, ref.weight.device)
            # gate and up of one expert receive the same tokens: one statistic serves both.
            sums[ref.name] = total if ref.part == "down_proj" else shared.setdefault(ref.index, total)
    return sums


def _run(
    heads: Sequence[LinearRef],
    owners: dict[nn.Module, list[ExpertRef]],
    see: Callable[[str, Tensor], None],
    forward: Callable[[], object],
) -> None:
    """One forward in which `see(name, input)` is called once for each sum, ended by the last of them."""
    pending = {ref.name for ref in heads} | {members[0].name for members in owners.values()}

    def done(label: str) -> None:
        pending.discard(label)
        if not pending:
            raise _Seen

    def linear_hook(ref: LinearRef) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(ref.name, args[0])
            done(ref.name)

        return hook

    def owner_hook(members: list[ExpertRef]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            told: set[tuple[int, bool]] = set()
            for ref in members:
                key = ref.index, ref.part == "down_proj"
                if key not in told:
                    told.add(key)
                    see(ref.name, ref.inputs(*args))
            done(members[0].name)

        return hook

    handles = [ref.module.register_forward_pre_hook(linear_hook(ref)) for ref in heads]
    handles += [owner.register_forward_pre_hook(owner_hook(members)) for owner, members in owners.items()]
    try:
        with torch.no_grad():
            forward()
    except _Seen:
        pass
    finally:
        for handle in handles:
            handle.remove()
