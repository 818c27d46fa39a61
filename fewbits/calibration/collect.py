"""Collects statistics of the linears of one block while calibration text runs through it.

Linears that receive the very same tensor (q, k, v; gate, up) share one statistic; this is seen from the
tensors, so it holds for architectures no table knows. Linears inside fused expert parameters have no
module to hook: their owner is hooked instead, and each expert's inputs are worked out from the routing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fewbits.calibration.stats import HessianSum
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


def collect_hessians(
    stages: Sequence[Sequence[Ref]], run: Callable[[Callable[[], None]], None]
) -> dict[str, HessianSum]:
    """Input statistics of every ref in `stages`; refs of one plain stage share one object.

    `run(guard)` sends all batches through the block, calling each forward inside the context that `guard`
    yields; a forward ends early once the last stage asked for has been seen.
    """
    sums: dict[str, HessianSum] = {}
    handles = []
    pending: set[str] = set()
    watched: list[str] = []

    def seen(label: str) -> None:
        pending.discard(label)
        if not pending:
            raise _Seen

    for members in stages:
        head = members[0]
        if isinstance(head, LinearRef):
            total = HessianSum(head.weight.shape[1], head.weight.device)
            sums.update({ref.name: total for ref in members})

            def linear_hook(
                module: nn.Module, args: tuple[Tensor, ...], total: HessianSum = total, label: str = head.name
            ) -> None:
                total.add(args[0])
                seen(label)

            handles.append(head.module.register_forward_pre_hook(linear_hook))
            watched.append(head.name)
    for owner, members in _owners([ref for stage in stages for ref in stage]).items():
        for ref in members:
            sums[ref.name] = HessianSum(ref.weight.shape[1], ref.weight.device)
        _share_expert_inputs(members, sums)

        def owner_hook(
            module: nn.Module,
            args: tuple[Tensor, ...],
            members: list[ExpertRef] = members,
            label: str = members[0].name,
        ) -> None:
            for total, ref in {id(sums[ref.name]): (sums[ref.name], ref) for ref in members}.values():
                total.add(ref.inputs(*args))
            seen(label)

        handles.append(owner.register_forward_pre_hook(owner_hook))
        watched.append(members[0].name)

    def begin() -> None:
        pending.clear()
        pending.update(watched)

    try:
        run(begin)
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _share_expert_inputs(members: Sequence[ExpertRef], sums: dict[str, HessianSum]) -> None:
    """gate and up of one expert receive the same tokens: one statistic serves both."""
    first: dict[int, HessianSum] = {}
    for ref in members:
        if ref.part != "down_proj":
            sums[ref.name] = first.setdefault(ref.index, sums[ref.name])


def run_guarded(forward: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> Callable[[Callable[[], None]], None]:
    """The `run` of `collect_hessians`: each batch through `forward`, ended early by the last hook."""

    def run(begin: Callable[[], None]) -> None:
        for batch in batches:
            begin()
            try:
                with torch.no_grad():
                    forward(batch)
            except _Seen:
                continue

    return run
