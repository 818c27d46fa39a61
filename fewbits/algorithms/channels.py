"""Channels that can be scaled for free: whatever writes a linear's input divides by s, the linear multiplies by s.

    X W^T = (X diag(1/s)) (W diag(s))^T

The division costs nothing where it can be folded into what produces X:

| producer | linears that read it | folded into |
|---|---|---|
| a norm | q, k, v; gate, up (of every expert, and their router) | its weight and bias |
| v_proj | o_proj | rows of v, one s per key-value channel: query heads that share a head share its s |
| up_proj | down_proj | rows of up: down reads act(gate) * up |

AWQ and SmoothQuant choose s, each in its way; both find the places here. Which norm feeds what is the topology's
to say (`fewbits.models.topology`); a family without a table has no such places.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbits.algorithms.base import Block, Stage
from fewbits.calibration.collect import Ref
from fewbits.formats.rows import round_rows, sinks
from fewbits.models.walk import ExpertRef, LinearRef


@dataclass(frozen=True, kw_only=True)
class Scalable:
    """One producer and the `stages` that read it. `scale` applies s [in]; `repeat`: see `tie`."""

    producer: str
    stages: Sequence[Stage]
    fold: Callable[[Tensor], frozenset[str]]  # divides the producer's output by s; names of parameters changed
    repeat: tuple[int, int] | None = None  # (query heads per key-value head, head width)

    def tie(self, x: Tensor) -> Tensor:
        """`x` [in] averaged over the channels that must share one s."""
        if self.repeat is None:
            return x
        share, width = self.repeat
        return x.view(-1, share, width).mean(1, keepdim=True).expand(-1, share, width).reshape(-1)

    def scale(self, s: Tensor) -> frozenset[str]:
        """Folds 1/s into the producer, s into the linears, and tells their statistics."""
        changed = self.fold(s)
        for stage in self.stages:
            for ref in stage.refs:
                ref.write(ref.weight * s.to(ref.weight.dtype))
            stage.inputs = stage.inputs.divided(s)
        return changed


def scalables(block: Block) -> Iterator[Scalable]:
    """The places in `block`, in the order they run; none for a family that no table lists."""
    if block.topology is None:
        return
    modules = dict(block.module.named_modules())
    for norm, readers in block.topology.norms:
        found = _behind_norm(block, modules, norm, readers)
        if found is not None:
            yield found
    for stage in block.stages:
        for writer, reader in block.topology.products:
            found = _product(block, modules, stage, writer, reader)
            if found is not None:
                yield found


def _behind_norm(block: Block, modules: dict[str, nn.Module], norm: str, readers: Sequence[str]) -> Scalable | None:
    if norm not in modules:
        return None
    stages = [stage for stage in block.stages if all(_any(ref.name, readers) for ref in stage.refs)]
    reached = {ref.name for stage in stages for ref in stage.refs}
    # Who reads the norm without being quantized (a router, an ignored layer) must be scaled along.
    along = [name for name in modules if _any(name, readers) and name not in reached]
    whole = all(isinstance(modules[name], nn.Linear) or hasattr(modules[name], "weight") for name in along)
    if not stages or not whole or not _complete(block, readers, reached, along):
        return None

    def fold(s: Tensor) -> frozenset[str]:
        changed = {f"{norm}.{name}" for name, _ in modules[norm].named_parameters(recurse=False)}
        for parameter in modules[norm].parameters(recurse=False):
            parameter.data.div_(s.to(parameter.dtype))
        for name in along:
            weight = modules[name].get_parameter("weight")
            weight.data.mul_(s.to(weight.dtype))
            changed.add(f"{name}.weight")
        return frozenset(changed)

    return Scalable(producer=norm, stages=stages, fold=fold)


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _complete(block: Block, readers: Sequence[str], reached: set[str], along: Sequence[str]) -> bool:
    """Whether every reader is accounted for: a fused expert that is kept has no weight of its own to scale."""
    present = reached | set(along)
    plain = [reader for reader in readers if "*" not in reader]
    experts = [reader for reader in readers if "*" in reader]
    counts = {sum(fnmatch.fnmatchcase(name, reader) for name in present) for reader in experts}
    owners = [m for m in block.module.modules() if getattr(m, "down_proj", None) is not None]
    fused = [m.down_proj.shape[0] for m in owners if isinstance(m.down_proj, nn.Parameter)]
    return all(reader in present for reader in plain) and (not experts or counts == set(fused))


def _product(block: Block, modules: dict[str, nn.Module], stage: Stage, writer: str, reader: str) -> Scalable | None:
    refs = stage.refs
    if len(refs) != 1 or not fnmatch.fnmatchcase(refs[0].name, reader):
        return None
    if getattr(modules.get(refs[0].name), "input_hadamard", None):
        return None  # a transform stands between the two
    other = _sibling(block, refs[0], writer.rpartition(".")[2].lstrip("*"))
    if other is None or not isinstance(modules.get(other.name), nn.Linear | None):
        return None
    rows, columns = other.shape[0], refs[0].shape[1]
    repeat = None
    if rows != columns:
        width = int(getattr(modules.get(refs[0].name.rpartition(".")[0]), "head_dim", 0) or 0)
        if not width or columns % rows or rows % width:
            return None
        repeat = columns // rows, width

    def fold(s: Tensor) -> frozenset[str]:
        own = s if repeat is None else s.view(-1, repeat[0], repeat[1])[:, 0].reshape(-1)
        other.write(other.weight / own[:, None].to(other.weight.dtype))
        if other.bias is None:
            return frozenset()
        other.bias.div_(own.to(other.bias.dtype))
        return frozenset({f"{other.name}.bias"}) if isinstance(other, LinearRef) else frozenset()

    return Scalable(producer=other.name, stages=[stage], fold=fold, repeat=repeat)


def _sibling(block: Block, ref: Ref, kind: str) -> Ref | None:
    """The matrix called `kind` beside `ref`: of the same module, or of the same expert. None if it is kept."""
    for stage in block.stages:
        for other in stage.refs:
            if other.name.rpartition(".")[0] != ref.name.rpartition(".")[0] or other.kind != kind:
                continue
            if isinstance(other, ExpertRef) and other.bias is not None:
                return None  # its bias would have to change inside the fused parameter
            return other
    return None


class RoundedLoss:
    """Squared error of the outputs of `stages` with x / s and W * s both rounded, over the sampled inputs x.

    apart: of sinks (formats/rows.py) and of all other tokens, each as a share of its own energy. A sink can hold a
    thousand times the energy of all others together, and half of a model's attention rests on it: summed up, neither
    would be seen beside the other.
    """

    def __init__(self, stages: Sequence[Stage], block: Block, *, apart: bool = False) -> None:
        self._block = block
        self._parts: list[tuple[Tensor, list[Tensor], list[tuple[Ref, Tensor, Tensor]]]] = []
        self._energy = [0.0, 0.0] if apart else [1.0]
        for stage in stages:
            rows = stage.inputs.rows
            assert rows is not None
            towering = sinks(rows)
            kinds = [~towering, towering] if apart else [torch.ones_like(towering)]
            weights = [(ref, ref.weight.float()) for ref in stage.refs]
            exact = [(ref, weight, rows @ weight.t()) for ref, weight in weights]
            self._parts.append((rows, kinds, exact))
            if apart:
                self._add(self._energy, [y for _, _, y in exact], kinds)

    @staticmethod
    def _add(totals: list[float], outputs: Sequence[Tensor], kinds: Sequence[Tensor]) -> None:
        """Adds the energy of the rows of each kind."""
        by_row = torch.stack([y.square().sum(1, dtype=torch.float64) for y in outputs]).sum(0)
        for place, rows in enumerate(kinds):
            totals[place] += float(by_row[rows].sum())

    def __call__(self, s: Tensor | None) -> float:
        assert self._block.activations is not None
        lost = [0.0] * len(self._energy)
        for rows, kinds, parts in self._parts:
            factor = torch.ones((), device=rows.device) if s is None else s
            rounded = round_rows(rows / factor, self._block.activations)
            errors = []
            for ref, weight, exact in parts:
                smoothed = self._block.format_of(ref).quantize(weight * factor, ref.name).dequantize()
                errors.append(exact - rounded @ smoothed.t())
            self._add(lost, errors, kinds)
        return sum(error / energy for error, energy in zip(lost, self._energy, strict=True) if energy)


def row_parameters(weights: Sequence[Tensor]) -> Tensor:
    """The weights of a stage as one matrix, float32 [rows, in]."""
    return torch.cat([weight.float() for weight in weights])
