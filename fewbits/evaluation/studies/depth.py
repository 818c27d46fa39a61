"""Smaller models out of one: the same model with some of its blocks left out.

A block adds to the residual stream, so a model runs without it. What is left out matters: the first and the last
block turn the stream far and stay. In between, ShortGPT (Men et al. 2024, arXiv 2403.03853) leaves out first what
turns the stream least:

    importance of a block = 1 - E[cos(x, block(x))]        over tokens, the first of each window left out

(the first token's states are huge, whatever the text, and would decide alone). The alternative is a seeded draw.
Nothing is trained afterwards: a truncated model is worse than a model of its size that was trained as it is.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fewbits.core.errors import BadInput
from fewbits.evaluation.forward import Forward

TRUNCATIONS = ("importance", "random")
_FRACTIONS = (1.0, 0.9, 0.8, 2 / 3)


def default_depths(blocks: int) -> tuple[int, ...]:
    """All blocks, nine tenths, eight tenths and two thirds of them, as far as they differ."""
    found = {max(1, round(blocks * fraction)): None for fraction in _FRACTIONS}
    return tuple(found)


def check_depths(depths: Sequence[int], blocks: int, name: str) -> tuple[int, ...]:
    """`depths` without repeats, deepest first; BadInput for one that the model does not have."""
    for depth in depths:
        if not 1 <= depth <= blocks:
            raise BadInput(f"depth {depth}: {name} has {blocks} blocks; depths are 1 to {blocks}")
    return tuple(sorted(set(depths), reverse=True))


@torch.inference_mode()
def importances(forward: Forward, blocks: Sequence[nn.Module], ids: torch.Tensor) -> list[float]:
    """1 - cosine of each block's input and output, the mean over the windows `ids` [samples, length]."""
    found = torch.zeros(len(blocks), dtype=torch.float64)

    def hook(index: int) -> Callable[..., None]:
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
            found[index] += 1 - float(cosine[:, 1:].double().mean())

        return measure

    hooks = [block.register_forward_hook(hook(index), with_kwargs=True) for index, block in enumerate(blocks)]
    try:
        for window in ids:
            for _ in forward.slabs(window):
                pass
    finally:
        for handle in hooks:
            handle.remove()
    return (found / len(ids)).tolist()


@torch.inference_mode()
def returns_tuples(forward: Forward, block: nn.Module) -> bool:
    """Whether `block` gives its states in a tuple, as older families do."""
    seen: list[bool] = []
    handle = block.register_forward_hook(lambda module, args, output: seen.append(isinstance(output, tuple)))
    try:
        for _ in forward.slabs(torch.zeros(2, dtype=torch.int64)):
            pass
    finally:
        handle.remove()
    return seen[0]


def by_importance(values: Sequence[float]) -> list[int]:
    """Blocks in the order in which they leave; the first and the last never do."""
    return sorted(range(1, len(values) - 1), key=lambda index: values[index])


def by_chance(blocks: int, seed: int, draw: int) -> list[int]:
    """The same, drawn. Models of one draw are nested: a smaller one has no block that a larger one lacks."""
    order = list(range(1, blocks - 1))
    random.Random(f"{seed}/{draw}").shuffle(order)
    return order


def kept(order: Sequence[int], blocks: int, depth: int) -> tuple[int, ...]:
    """The blocks left when `depth` of them remain; a depth of one keeps the first."""
    gone = {*order, blocks - 1} if depth == 1 else set(order[: blocks - depth])
    return tuple(index for index in range(blocks) if index not in gone)


@contextlib.contextmanager
def truncated(blocks: Sequence[nn.Module], keep: Sequence[int], tuples: bool = False) -> Iterator[None]:
    """Inside, only the blocks `keep` do anything; the others give back what they are given.

    The modules stay where they are, with whatever the model asks of them. tuples: the blocks return tuples.
    """

    def skip(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden_states,) if tuples else hidden_states

    gone = [block for index, block in enumerate(blocks) if index not in set(keep)]
    for block in gone:
        block.forward = skip  # on the instance: the class's own comes back when it is deleted
    try:
        yield
    finally:
        for block in gone:
            del block.forward
