"""Experts of a block in one tensor, and the linears it is made of.

Here an expert is linears of its own, as in families that keep them apart on disk: experts.3.gate_proj, up_proj and
down_proj with weights [out, in], which convert as others do. Two layouts hold all experts of a block together, and
what goes out in one of them is put together again.

gpt-oss, dense and in MXFP4 (llm-compressor writes it apart, each linear with a bias of its own):

    experts.gate_up_proj       [E, in, 2 * I]   gate_proj of an expert in the even columns, up_proj in the odd ones
    experts.down_proj          [E, I, out]
    experts.gate_up_proj_bias  [E, 2 * I]       and down_proj_bias

MLX, of any family:

    switch_mlp.gate_proj       [E, I, in]       and up_proj, down_proj: the linears, stacked

Source: transformers 5.23 (models/gpt_oss), mlx-lm 0.32 (models/switch_layers.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.models.topology import ExpertLayout
from fewbits.models.walk import MAX_EXPERTS

GPT_OSS = "gpt_oss"
_GPT_OSS_PIECES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_LINEAR = re.compile(r"(?P<owner>.+)\.experts\.(?P<expert>0|[1-9][0-9]{0,8})\.(?P<part>[a-z0-9_]+)")
_STACK = "switch_mlp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused:
    """A tensor of all experts of a block.  linears: by expert, those whose rows take turns in it.  bias: its name."""

    name: str
    linears: tuple[tuple[str, ...], ...]
    bias: str

    @property
    def modules(self) -> list[str]:
        """All linears, expert by expert."""
        return [module for linears in self.linears for module in linears]

    def join(self, read: Callable[[str], Tensor], *, transposed: bool = False) -> Tensor:
        """[E, rows, ...] of what `read` gives for each linear, [out, ...]; or [E, in, rows] of matrices [out, in]."""
        joined = None
        for expert, names in enumerate(self.linears):
            parts = [read(name) for name in names]
            if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
                raise BadInput(f"{names[0]} and {names[-1]} differ in shape: {self.name} holds linears of one shape")
            rows = parts[0] if len(parts) == 1 else torch.stack(parts, dim=1).flatten(0, 1)
            rows = rows.t() if transposed else rows
            if joined is None:
                joined = rows.new_empty((len(self.linears), *rows.shape))
            if rows.shape != joined.shape[1:] or rows.dtype != joined.dtype:
                raise BadInput(
                    f"{names[0]} is of another shape or type than expert 0's: {self.name} holds linears of one kind"
                )
            joined[expert] = rows
        assert joined is not None
        return joined

    def split(self, expert: int, place: int, fused: Tensor) -> Tensor:
        """The rows of one linear, `place` among its expert's, in [E, rows, ...]."""
        return fused[expert, place :: len(self.linears[0])].contiguous()


def gpt_oss_parameter(name: str, experts: int) -> Fused:
    """ "model.layers.0.mlp.experts.gate_up_proj" and its linears."""
    owner, _, leaf = name.rpartition(".")
    pieces = _GPT_OSS_PIECES.get(leaf, (leaf,))
    linears = tuple(tuple(f"{owner}.{expert}.{piece}" for piece in pieces) for expert in range(experts))
    return Fused(name=name, linears=linears, bias=f"{name}_bias")


def gpt_oss_parameters(modules: Iterable[str]) -> list[Fused]:
    """The parameters that the experts' linears among `modules` are parts of; BadInput where one of them is missing."""
    parameter = {piece: leaf for leaf, pieces in _GPT_OSS_PIECES.items() for piece in pieces}
    counts = _experts(modules, parameter, "experts")
    return [_complete(gpt_oss_parameter(name, experts), modules) for name, experts in counts.items()]


def mlx_stack(name: str, experts: int, layout: ExpertLayout) -> Fused:
    """ "model.layers.0.mlp.switch_mlp.gate_proj" and its linears."""
    owner, _, leaf = name.rpartition(f".{_STACK}.")
    spelled = {theirs: ours for ours, theirs in _spelled(layout).items()}.get(leaf, leaf)
    linears = tuple((f"{owner}.experts.{expert}.{spelled}",) for expert in range(experts))
    return Fused(name=name, linears=linears, bias=f"{name}.bias")


def mlx_stacks(modules: Iterable[str], layout: ExpertLayout) -> list[Fused]:
    """MLX's stacks of the experts' linears among `modules`; BadInput where one of them is missing."""
    counts = _experts(modules, _spelled(layout), _STACK)
    return [_complete(mlx_stack(name, experts, layout), modules) for name, experts in counts.items()]


def is_stack(module: str) -> bool:
    return f".{_STACK}." in module


def is_gpt_oss_expert(module: str) -> bool:
    """Whether `module` is the name of an expert's linear."""
    match = _LINEAR.fullmatch(module)
    return match is not None and match["part"] in ("gate_proj", "up_proj", "down_proj")


def _spelled(layout: ExpertLayout) -> dict[str, str]:
    """Part on disk -> its usual name."""
    return {layout.gate: "gate_proj", layout.up: "up_proj", layout.down: "down_proj"}


def _experts(modules: Iterable[str], leaves: Mapping[str, str], folder: str) -> dict[str, int]:
    """Name of the joint tensor -> how many experts its linears speak of, in order of names."""
    found: dict[str, int] = {}
    for match in filter(None, map(_LINEAR.fullmatch, modules)):
        if match["part"] in leaves:
            name = f"{match['owner']}.{folder}.{leaves[match['part']]}"
            found[name] = max(found.get(name, 0), int(match["expert"]) + 1)
    for name, count in found.items():
        if count > MAX_EXPERTS:
            raise BadInput(f"{name}: {count} experts; {MAX_EXPERTS} are allowed")
    return dict(sorted(found.items()))


def _complete(fused: Fused, modules: Iterable[str]) -> Fused:
    present = modules if isinstance(modules, Collection) else set(modules)
    absent = next((module for module in fused.modules if module not in present), None)
    if absent is not None:
        raise BadInput(f"{absent} is not among the quantized layers: {fused.name} holds those of all experts")
    return fused


def bias_names(fused: Fused, names: Collection[str]) -> list[str]:
    """The biases of the linears, where the checkpoint keeps them apart; BadInput where it has only some."""
    wanted = [f"{module}.bias" for module in fused.modules]
    found = [name for name in wanted if name in names]
    if found and len(found) != len(wanted):
        absent = next(name for name in wanted if name not in names)
        raise BadInput(f"{absent} is missing, and other experts have theirs")
    return found
