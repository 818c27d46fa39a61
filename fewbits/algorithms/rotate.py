"""Rotate: the model in another basis, in which no channel and no weight stands out; then the codes are made.

A transformer of RMS norms does not notice when its residual stream is rotated, x' = x R, once the gains of its norms
are folded into the linears that read them: a norm without gains commutes with every rotation. Three rotations:

| option | what is rotated | folded into | cost when it runs |
|---|---|---|---|
| residual | the residual stream | embeddings, every linear that reads or adds to it, routers, the head | none |
| values | each head's values | rows of v, columns of o, head by head (grouped queries share theirs) | none |
| online | what down_proj reads | columns of down; its input is transformed as the model runs | a transform per block |

Where inputs are rounded too (W4A4, W8A8), `online` is on unless it is switched off: what down_proj reads has the
largest outliers of all. `block=32` rotates in blocks of that many numbers instead of all at once, for formats whose
scales cover so many (MX): an outlier then stays in its own block and does not raise the scales of the others.

The first two change numbers, not shapes: any format that can hold the weights can hold the rotated ones. Two prices.
A head that shares the embeddings' tensor takes the final norm's gains and is no longer equal to it, so it is stored
apart (`residual=false` avoids that). And `online` needs a reader that transforms the input: the native format states
it, compressed-tensors cannot.

The signs before `online`'s transform are folded into the rows of up_proj, so that what is left to do at run time is a
plain Hadamard transform. In the fused parameters of experts nothing can be transformed on the way: they go without.

Sources: Ashkboos et al. 2024, "SliceGPT" (arXiv 2401.15024) for the invariance; 2024, "QuaRot" (arXiv 2404.00456);
Tseng et al. 2024, "QuIP#" (arXiv 2402.04396).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fewbits.algorithms.base import Rewritten
from fewbits.algorithms.rotation import Rotation, hadamard_rotation, rotation
from fewbits.checkpoints.base import Source, TensorInfo
from fewbits.checkpoints.changed import ChangedSource
from fewbits.core.errors import BadInput, Unsupported
from fewbits.core.units import bytes_text
from fewbits.formats import hadamard
from fewbits.models.skeleton import skeleton
from fewbits.models.topology import Topology, find_topology
from fewbits.models.walk import LinearRef, Ref, blocks, linears


@dataclass(frozen=True, kw_only=True)
class Rotate:
    """Randomised Hadamard rotations folded into the weights. online: transform what down_proj reads, too; by default
    where inputs are rounded. block: rotate so many numbers together, a power of two; by default all."""

    role: ClassVar[str] = "rewrite"
    statistics: ClassVar[frozenset[str]] = frozenset()

    residual: bool = True
    values: bool = True
    online: bool | None = None
    block: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block is not None and (self.block < 2 or self.block & (self.block - 1)):
            raise BadInput(f"rotations in blocks of {self.block}; a power of two, 32 for MX formats")
        if not (self.residual or self.values or self.online):
            raise BadInput(f"{self}: nothing is to be rotated; switch on residual, values or online")

    def rewrite(self, source: Source, kept: Callable[[str], bool], rounded: bool = False) -> Rewritten:
        """`source` with rotated tensors; linears that stay dense (`kept`) get no transform of their input."""
        plan = _Plan(source, self.seed, self.block)
        if plan.topology is None:
            kind = source.config().get("model_type")
            return Rewritten(
                source=source, notes=[f"rotate: no table says how {kind} hangs together; nothing was rotated"]
            )
        if self.values:
            plan.values()
        if rounded if self.online is None else self.online:
            plan.online(kept)
        if self.residual:
            plan.residual()
        rotated = RotatedSource(source, plan.changes, plan.untied)
        return Rewritten(source=rotated, input_hadamard=plan.input_hadamard, notes=plan.notes)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What becomes of one tensor: times the gains of a norm, its columns rotated, its rows; or all ones."""

    gain: str | None = None  # name of the norm's weight
    columns: tuple[Rotation, ...] = ()
    rows: tuple[Rotation, ...] = ()
    ones: bool = False


class _Plan:
    """The changes, tensor by tensor, from the family's table and the modules of the model (none of its weights)."""

    def __init__(self, source: Source, seed: int, block: int | None = None) -> None:
        self.source, self.seed, self.block = source, seed, block
        config = source.config()
        self.topology = find_topology(config)
        self.changes: dict[str, Change] = {}
        self.untied: dict[str, str] = {}  # a head's tensor that gets a life of its own -> what it was tied to
        self.input_hadamard: dict[str, tuple[int, ...]] = {}
        self.notes: list[str] = []
        if self.topology is not None:
            self.model: Any = skeleton(config)
            self.blocks = blocks(self.model, self.topology)
            self._stored = {*source.names(), *source.tied()}

    def _change(self, name: str, **fields: Any) -> None:
        """Adds to what becomes of tensor `name`; rotations go behind those that are there."""
        if name not in self._stored:
            raise Unsupported(f"{name} is fused in the source file; it cannot be rotated: split the source first")
        found = self.changes.get(name, Change())
        merged = {
            key: getattr(found, key) + value if isinstance(value, tuple) else value for key, value in fields.items()
        }
        self.changes[name] = dataclasses.replace(found, **merged)

    def _rows(self, module: str, rotation: Rotation) -> None:
        self._change(f"{module}.weight", rows=(rotation,))
        if f"{module}.bias" in self._stored:
            self._change(f"{module}.bias", rows=(rotation,))

    def _turn(self, size: int, what: str) -> Rotation:
        if self.block is None:
            return rotation(size, f"{self.seed} {what}")
        return hadamard_rotation(size, self._orders(size), f"{self.seed} {what}")

    def _orders(self, size: int) -> tuple[int, ...]:
        """Of the Hadamard transform of `size` numbers."""
        return hadamard.block_factors(size) if self.block is None else (math.gcd(self.block, size),)

    def _refs(self, block: nn.Module) -> list[Ref]:
        return linears(block, self.topology)

    def values(self) -> None:
        """Head by head between v and o."""
        assert self.topology is not None
        if self.topology.value_output is None:
            self.notes.append(
                f"rotate: {self.topology.name} fuses its values with queries and keys; they keep their basis"
            )
            return
        writer, reader = self.topology.value_output
        for prefix, block in self.blocks:
            refs = {ref.name: ref for ref in self._refs(block)}
            v, o = refs[writer], refs[reader]
            width = int(getattr(block.get_submodule(reader.rpartition(".")[0]), "head_dim", 0))
            if not width or v.shape[0] % width or o.shape[1] % width:
                raise Unsupported(
                    f"{prefix}: {v.shape[0]} values do not divide into heads of {width}; use values=false"
                )
            turn = self._turn(width, f"values {prefix}")
            self._rows(f"{prefix}.{v.disk_name}", turn)
            self._change(f"{prefix}.{o.disk_name}.weight", columns=(turn,))

    def online(self, kept: Callable[[str], bool]) -> None:
        """A Hadamard transform of what each down_proj reads, its signs in the rows of up_proj."""
        assert self.topology is not None
        readers = [pair[1] for pair in self.topology.products if pair != self.topology.value_output]
        experts, sizes = 0, set()
        for prefix, block in self.blocks:
            refs = {ref.name: ref for ref in self._refs(block)}
            for name, ref in refs.items():
                if not _any(name, readers) or kept(f"{prefix}.{name}"):
                    continue
                if not isinstance(ref, LinearRef):
                    experts += 1
                    continue
                size = ref.shape[1]
                orders = self._orders(size)
                sizes |= {(size, math.prod(orders))}
                disk = f"{prefix}.{ref.disk_name}"
                turn = hadamard_rotation(size, orders, f"{self.seed} online {prefix}.{name}")
                up = refs.get(f"{name.rpartition('.')[0]}.up_proj")
                if up is None:  # nothing to hold the signs
                    turn = dataclasses.replace(turn, signs=torch.ones(size))
                else:
                    self._rows(f"{prefix}.{up.disk_name}", Rotation(signs=turn.signs))
                self._change(f"{disk}.weight", columns=(turn,))
                self.input_hadamard[disk] = orders
        if experts:
            self.notes.append(
                f"rotate: {experts} experts' down_proj are fused in the running model; their inputs keep their basis"
            )
        self.notes += [
            f"rotate: no Hadamard matrix of order {size} is known; inputs are transformed in blocks of {part}"
            for size, part in sorted(sizes)
            if part != size and self.block is None
        ]

    def residual(self) -> None:
        """The residual stream of the whole model, or a note why not."""
        topology = self.topology
        assert topology is not None
        reason = self._refuses_residual(topology)
        if reason is not None:
            self.notes.append(f"rotate: {reason}; the residual stream keeps its basis")
            return
        embeddings, head, last = (
            f"{name}.weight" for name in (topology.embeddings, topology.head, topology.final_norm)
        )
        turn = self._turn(self.source.info(embeddings).shape[1], "residual")
        self._change(embeddings, columns=(turn,))
        for prefix, block in self.blocks:
            for ref in self._refs(block):
                if _any(ref.name, topology.writers):
                    self._rows(f"{prefix}.{ref.disk_name}", turn)
            for norm, readers in topology.norms:
                gain = topology.disk_name(f"{prefix}.{norm}.weight")
                for name in readers_on_disk(topology, block, readers):
                    self._change(f"{prefix}.{name}.weight", gain=gain, columns=(turn,))
                self._change(gain, ones=True)
        if head in self.source.tied() or self.source.config().get("tie_word_embeddings"):
            self.untied[head] = embeddings
            count = math.prod(self.source.info(embeddings).shape)
            more = bytes_text(count * self.source.dtype.itemsize)
            self.notes.append(
                f"rotate: the head takes the final norm's gains and no longer shares the embeddings' tensor: "
                f"{more} more (residual=false avoids it)"
            )
        self._change(head, gain=last, columns=(turn,))
        self._change(last, ones=True)

    def _refuses_residual(self, topology: Topology) -> str | None:
        if not topology.norms:
            return f"{topology.name} normalises what its layers write, not what they read"
        norms = [(topology.final_norm, self.model.get_submodule(topology.final_norm))]
        for prefix, block in self.blocks:
            norms += [(f"{prefix}.{norm}", block.get_submodule(norm)) for norm, _ in topology.norms]
            known = [pattern for _, readers in topology.norms for pattern in readers] + list(topology.writers)
            strange = [ref.name for ref in self._refs(block) if not _any(ref.name, known)]
            if strange:
                return f"no table says what {prefix}.{strange[0]} reads and writes"
        for name, norm in norms:
            if "RMSNorm" not in type(norm).__name__ or [n for n, _ in norm.named_parameters()] != ["weight"]:
                return f"{name} is a {type(norm).__name__}, which subtracts a mean or adds a bias"
        return None


def readers_on_disk(topology: Topology, block: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Names on disk of the linears and routers of `block` that `patterns` name, relative to the block."""
    found = [ref.disk_name for ref in linears(block, topology) if _any(ref.name, patterns)]
    present = dict(block.named_modules())
    routers = [name for name in topology.routers if name in present and _any(name, patterns)]
    return found + [topology.disk_name(f".{name}.").strip(".") for name in routers]


def _any(name: str, patterns: list[str] | tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class RotatedSource(ChangedSource):
    """`inner` with some tensors changed, each when it is read; changed tensors are float32."""

    def __init__(self, inner: Source, changes: dict[str, Change], untied: dict[str, str]) -> None:
        super().__init__(inner)
        self._changes, self._untied = changes, untied

    def config(self) -> dict[str, Any]:
        config = self._inner.config()
        if self._untied:
            config["tie_word_embeddings"] = False
        return config

    def names(self) -> list[str]:
        return sorted({*self._inner.names(), *self._untied})

    def tied(self) -> dict[str, str]:
        return {name: origin for name, origin in self._inner.tied().items() if name not in self._untied}

    def info(self, name: str) -> TensorInfo:
        info = self._inner.info(self._untied.get(name, name))
        if name in self._untied and name not in self._inner.names():
            # Nothing of it is in the source: it counts neither as bytes nor as parameters there.
            return dataclasses.replace(info, dtype=torch.float32, nbytes=0, note="rotated apart from the embeddings")
        if name not in self._changes:
            return info
        note = "gains folded into the linears behind it" if self._changes[name].ones else "rotated"
        return dataclasses.replace(info, dtype=torch.float32, note=note)

    def tensor(self, name: str) -> Tensor:
        value = self._inner.tensor(self._untied.get(name, name))
        change = self._changes.get(name)
        if change is None:
            return value
        value = value.float()
        if change.ones:
            return torch.ones_like(value)
        if change.gain is not None:
            value = value * self._inner.tensor(change.gain).float()
        for turn in change.columns:
            value = turn.columns(value)
        for turn in change.rows:
            value = turn.rows(value)
        return value
