"""gpt-oss's experts: one tensor for all experts of a block, and the linears it is made of.

    experts.gate_up_proj       [E, in, 2 * I]   gate_proj of an expert in the even columns, up_proj in the odd ones
    experts.down_proj          [E, I, out]
    experts.gate_up_proj_bias  [E, 2 * I]       and down_proj_bias

Here they are linears as in families that keep their experts apart: experts.3.gate_proj, experts.3.up_proj and
experts.3.down_proj with weights [out, in], which convert as others do. (llm-compressor writes gpt-oss so, each with a
bias of its own.) What goes out in one of gpt-oss's own layouts, dense or MXFP4, is put together again.

Source: transformers 5.23 (models/gpt_oss).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.models.walk import MAX_EXPERTS

MODEL_TYPE = "gpt_oss"
PIECES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_LINEAR = re.compile(r"(?P<owner>.+\.experts)\.(?P<expert>0|[1-9][0-9]{0,8})\.(?P<piece>gate_proj|up_proj|down_proj)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused:
    """One parameter of all experts of a block. name: "model.layers.0.mlp.experts.gate_up_proj"."""

    name: str
    experts: int

    @property
    def pieces(self) -> tuple[str, ...]:
        """The linears of one expert, whose rows take turns."""
        return PIECES.get(self.name.rpartition(".")[2], (self.name.rpartition(".")[2],))

    def linears(self) -> list[list[str]]:
        """By expert, the names of its linears in the order of `pieces`."""
        owner = self.name.rpartition(".")[0]
        return [[f"{owner}.{expert}.{piece}" for piece in self.pieces] for expert in range(self.experts)]

    def join(self, read: Callable[[str], Tensor], *, transposed: bool = False) -> Tensor:
        """[E, rows, ...] of what `read` gives for each linear, [out, ...]; or [E, in, rows] of matrices [out, in]."""
        joined = None
        for expert, names in enumerate(self.linears()):
            parts = [read(name) for name in names]
            if any(part.shape != parts[0].shape for part in parts):
                raise BadInput(f"{names[0]} and {names[-1]} differ in shape: {self.name} holds linears of one shape")
            rows = torch.stack(parts, dim=1).flatten(0, 1)
            rows = rows.t() if transposed else rows
            if joined is None:
                joined = rows.new_empty((self.experts, *rows.shape))
            if rows.shape != joined.shape[1:]:
                raise BadInput(
                    f"{names[0]} is of another shape than expert 0's: {self.name} holds linears of one shape"
                )
            joined[expert] = rows
        assert joined is not None
        return joined

    def split(self, expert: int, piece: str, fused: Tensor) -> Tensor:
        """The rows of one linear in [E, rows, ...]."""
        return fused[expert, self.pieces.index(piece) :: len(self.pieces)].contiguous()


def is_expert(module: str) -> bool:
    """Whether `module` is the name of an expert's linear."""
    return _LINEAR.fullmatch(module) is not None


def fused_parameters(modules: Iterable[str]) -> list[Fused]:
    """The parameters that the experts' linears among `modules` are parts of; BadInput where one of them is missing."""
    numbers: dict[str, dict[str, set[int]]] = {}
    for match in filter(None, map(_LINEAR.fullmatch, modules)):
        parameter = next(name for name, pieces in PIECES.items() if match["piece"] in pieces)
        owner = numbers.setdefault(f"{match['owner']}.{parameter}", {})
        owner.setdefault(match["piece"], set()).add(int(match["expert"]))
    return [_complete(name, pieces) for name, pieces in sorted(numbers.items())]


def _complete(name: str, numbers: dict[str, set[int]]) -> Fused:
    count = 1 + max(max(found) for found in numbers.values())
    if count > MAX_EXPERTS:
        raise BadInput(f"{name}: {count} experts; {MAX_EXPERTS} are allowed")
    fused = Fused(name=name, experts=count)
    for expert, names in enumerate(fused.linears()):
        for piece, module in zip(fused.pieces, names, strict=True):
            if expert not in numbers.get(piece, ()):
                raise BadInput(f"{module} is not among the quantized layers: {name} holds those of all experts")
    return fused


def bias_names(fused: Fused, names: Sequence[str] | set[str]) -> list[str]:
    """The biases of the linears, where the checkpoint keeps them apart; BadInput where it has only some."""
    wanted = [f"{module}.bias" for linears in fused.linears() for module in linears]
    found = [name for name in wanted if name in names]
    if found and len(found) != len(wanted):
        absent = next(name for name in wanted if name not in names)
        raise BadInput(f"{absent} is missing, and other experts have theirs")
    return found
