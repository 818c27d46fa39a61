"""Walking a model: its blocks, the linears of a block, and the matrices inside fused expert parameters.

This works on any transformers model. Blocks are where the family's table says, or else the list of modules
that holds most of the parameters. Linears are `nn.Linear` modules, and the per-expert slices of the 3-D
parameters in which transformers 5 keeps the experts of a mixture:

    gate_up_proj  [E, 2I, H] (or transposed, [E, H, 2I]), gate rows first, or gate and up interleaved
    down_proj     [E, H, I]  (or transposed, [E, I, H])

A slice is as good as a linear: `ExpertRef.weight` is its [out, in] view and writing to the view writes to
the parameter. Routers choose experts with one small matrix; an error there sends tokens to the wrong place,
so they are not listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fewbits.core.errors import BadInput, Unsupported
from fewbits.models.topology import ExpertLayout, Topology

MAX_EXPERTS = 1 << 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRef:
    """A linear of a block. `name` is relative to the block; `disk_name` is the same in the checkpoint."""

    name: str
    module: nn.Linear
    disk_name: str

    @property
    def kind(self) -> str:
        """The last component of the name: "q_proj", "down_proj", ..."""
        return self.name.rpartition(".")[2]

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], sharing memory with the module."""
        return self.module.weight.detach()

    @property
    def holder(self) -> nn.Parameter:
        """The parameter that is the weight."""
        found = self.module.weight
        assert isinstance(found, nn.Parameter)
        return found

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of the weight [out, in], where there is one."""
        return self.module.weight.grad

    @property
    def bias(self) -> Tensor | None:
        return None if self.module.bias is None else self.module.bias.detach()

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.weight.shape[0], self.module.weight.shape[1]

    def write(self, value: Tensor) -> None:
        """Replaces the weight by `value` [out, in], cast to the weight's dtype."""
        self.weight.copy_(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertRef:
    """One expert's matrix inside a fused 3-D parameter of `owner`; see `LinearRef` for the names."""

    name: str
    owner: nn.Module
    disk_name: str
    index: int  # of the expert
    part: str  # gate_proj, up_proj or down_proj
    parameter: str  # the owner's parameter that holds the slice
    rows: slice  # of the [out, in] matrix of the expert inside the parameter
    transposed: bool

    @property
    def kind(self) -> str:
        return self.part

    @property
    def weight(self) -> Tensor:
        """The [out, in] view of the slice, sharing memory with the fused parameter."""
        return self.slice_of(self.holder.detach())

    @property
    def holder(self) -> nn.Parameter:
        """The parameter that the weight is a slice of."""
        found = getattr(self.owner, self.parameter)
        assert isinstance(found, nn.Parameter)
        return found

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of the weight [out, in], where there is one."""
        return None if self.holder.grad is None else self.slice_of(self.holder.grad)

    def slice_of(self, fused: Tensor) -> Tensor:
        """This matrix's [out, in] view of a tensor laid out as the fused parameter is."""
        matrix = fused[self.index]
        return (matrix.T if self.transposed else matrix)[self.rows]

    @property
    def bias(self) -> Tensor | None:
        fused = getattr(self.owner, f"{self.parameter}_bias", None)
        return None if fused is None else fused.detach()[self.index][self.rows]

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def write(self, value: Tensor) -> None:
        """Replaces the slice by `value` [out, in], cast to the parameter's dtype."""
        self.weight.copy_(value)

    def inputs(self, hidden: Tensor, chosen: Tensor, weights: Tensor | None = None) -> Tensor:
        """The rows this matrix multiplies when the owner is called with these arguments.

        `hidden` [..., H] are the tokens, `chosen` [..., k] the experts each is sent to. gate and up receive
        the tokens of their expert; down receives what the expert computed from them, act(gate) * up.
        """
        hidden = hidden.reshape(-1, hidden.shape[-1])
        tokens = hidden[(chosen.reshape(len(hidden), -1) == self.index).any(dim=-1)]
        return self._middle(tokens) if self.part == "down_proj" else tokens

    def _middle(self, tokens: Tensor) -> Tensor:
        fused = "gate_up_proj" if hasattr(self.owner, "gate_up_proj") else "up_proj"
        matrix = getattr(self.owner, fused).detach()[self.index]
        bias = getattr(self.owner, f"{fused}_bias", None)
        bias = None if bias is None else bias.detach()[self.index]
        product = nn.functional.linear(tokens, matrix.T if self.transposed else matrix, bias)
        owner: Any = self.owner
        if fused == "up_proj":
            middle = owner.act_fn(product)
        elif hasattr(owner, "_apply_gate"):  # transformers' own hook, for experts with a gate of their own
            middle = owner._apply_gate(product)
        elif getattr(owner, "is_concatenated", True):
            gate, up = product.chunk(2, dim=-1)
            middle = owner.act_fn(gate) * up
        else:
            middle = owner.act_fn(product[..., 0::2]) * product[..., 1::2]
        assert isinstance(middle, Tensor)
        return middle


Ref = LinearRef | ExpertRef


def blocks(model: nn.Module, topology: Topology | None = None) -> list[tuple[str, nn.Module]]:
    """(name, module) of the model's blocks, in order. Raises Unsupported when there is no list of blocks."""
    if topology is not None:
        owner: nn.Module | None = dict(model.named_modules()).get(topology.blocks)
        if isinstance(owner, nn.ModuleList):
            return [(f"{topology.blocks}.{index}", block) for index, block in enumerate(owner)]
    lists = [
        (sum(parameter.numel() for parameter in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        raise Unsupported(f"{type(model).__name__} has no list of blocks; fewbits quantizes models made of blocks")
    # the outermost list holds whatever the lists inside its blocks hold, and comes first among equals
    _, name, owner = max(lists, key=lambda item: item[0])
    return [(f"{name}.{index}" if name else str(index), block) for index, block in enumerate(owner)]


def linears(block: nn.Module, topology: Topology | None = None) -> list[Ref]:
    """Every matrix of `block` that can be quantized, in the order of its modules; routers left out."""
    found: list[Ref] = []
    disk = topology.disk_name if topology else (lambda name: name)
    routers = topology.routers if topology else ()
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            if name not in routers and "Router" not in type(module).__name__:
                # the dots make a rename such as ".mlp." match at the start of a relative name too
                found.append(LinearRef(name=name, module=module, disk_name=disk(f".{name}.").strip(".")))
        else:
            found.extend(expert_refs(name, module, topology))
    return found


def input_groups(refs: list[Ref], topology: Topology | None = None) -> list[list[Ref]]:
    """`refs` in groups that read the same input according to the table; without a table each is alone."""
    groups: dict[object, list[Ref]] = {}
    for ref in refs:
        parent, _, kind = ref.name.rpartition(".")
        shared = next((group for group in topology.shared_inputs if kind in group), None) if topology else None
        groups.setdefault((parent, shared) if shared else ref.name, []).append(ref)
    return list(groups.values())


def expert_refs(name: str, module: nn.Module, topology: Topology | None = None) -> Iterator[ExpertRef]:
    """The matrices inside the fused 3-D parameters of `module`, if it has any, expert by expert."""
    fused = {key: value for key, value in module.named_parameters(recurse=False) if value.dim() == 3}
    if "down_proj" not in fused or not fused.keys() & {"gate_up_proj", "up_proj"}:
        return
    if fused["down_proj"].shape[0] > MAX_EXPERTS:
        raise BadInput(f"{name or 'the model'} has {fused['down_proj'].shape[0]} experts; {MAX_EXPERTS} are allowed")
    transposed = _is_transposed(module, fused)
    layout = (topology and topology.experts) or ExpertLayout(module=name, disk=f"{name}.{{expert}}.{{part}}")
    above = name.removesuffix(layout.module)  # what stands before the block-relative names
    pieces = _pieces(module, fused, transposed)
    for index in range(fused["down_proj"].shape[0]):
        for part, (parameter, rows) in pieces.items():
            yield ExpertRef(
                name=f"{name}.{index}.{part}",
                owner=module,
                disk_name=above + layout.disk_name(index, part),
                index=index,
                part=part,
                parameter=parameter,
                rows=rows,
                transposed=transposed,
            )


def _is_transposed(module: nn.Module, fused: dict[str, nn.Parameter]) -> bool:
    """Whether the parameters are [E, in, out]: the module says so, or the shapes do."""
    stated = getattr(module, "is_transposed", None)
    if stated is not None:
        return bool(stated)
    first = fused.get("gate_up_proj", fused.get("up_proj"))
    assert first is not None
    factor = 2 if "gate_up_proj" in fused else 1
    return first.shape[1] != factor * fused["down_proj"].shape[2]


def _pieces(module: nn.Module, fused: dict[str, nn.Parameter], transposed: bool) -> dict[str, tuple[str, slice]]:
    """part -> (parameter, rows of the expert's [out, in] matrix)."""
    everything = slice(None)
    if "gate_up_proj" not in fused:
        return {"up_proj": ("up_proj", everything), "down_proj": ("down_proj", everything)}
    rows = fused["gate_up_proj"].shape[2 if transposed else 1]
    if getattr(module, "is_concatenated", True):
        gate, up = slice(0, rows // 2), slice(rows // 2, rows)
    else:
        gate, up = slice(0, rows, 2), slice(1, rows, 2)
    return {
        "gate_proj": ("gate_up_proj", gate),
        "up_proj": ("gate_up_proj", up),
        "down_proj": ("down_proj", everything),
    }
