"""The formats a plan chooses from, the layers that must agree, and what rules a format out.

Linears that read one input are one product in a fast runtime: vLLM, SGLang and TensorRT-LLM fuse q, k, v and gate, up,
and a fused product has one format. The experts of a block run in one grouped kernel. So each of these is one *group*,
chosen together. A group may also be denied a format:

| target | a format must |
|---|---|
| `any` | fit the layers (groups no larger than the input) |
| `compressed-tensors` | be one that this checkpoint format can say (and be symmetric, for transformers to read a mix) |
| `vllm` | be that, and of 4 or 8 bits: of the others vLLM reads files it has no product for |
| `here` | have a kernel on this device that multiplies the codes as they are stored |

Averages count what is stored, scales and zero points included: int3-asym-g64 takes 3 + (16 + 3) / 64 = 3.297 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fewbits.calibration.collect import Ref
from fewbits.checkpoints import compressed_tensors
from fewbits.core.errors import BadInput, unknown
from fewbits.formats import Format
from fewbits.formats.mix import Mix, Weights, parse_weights
from fewbits.kernels import KERNELS, LinearSpec, choose
from fewbits.models.topology import Topology
from fewbits.models.walk import ExpertRef, input_groups

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUP_SIZE = 64
# Of a mix: how many formats wider that of the dearest channels is, and their share of the channels in per cent.
STEPS_UP = ((1, 33), (2, 12))
TARGETS = ("any", "compressed-tensors", "vllm", "here")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Linears of one block that get one format. name: what tables call it; members: name in the model -> shape."""

    name: str
    block: int
    kinds: tuple[str, ...]
    members: dict[str, tuple[int, int]]

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in self.members.values())

    def bits(self, format: Weights) -> int:
        """What the group takes in `format`, exactly."""
        return sum(round(format.bits_per_weight(shape) * shape[0] * shape[1]) for shape in self.members.values())


def candidates(
    names: Sequence[str], group_size: int | None, scale_dtype: torch.dtype, target: str = "any", within: bool = False
) -> list[Weights]:
    """The formats called `names`, or integers of every width under groups of `group_size`; fewest bits first.

    within: mixes of them too (`mixes`).
    The integers have zero points unless the target is a checkpoint format in which a mix of such is not read.
    Raises BadInput for names that mean nothing or twice the same, and for fewer than two formats.
    """
    if names and group_size is not None:
        raise BadInput(f"group size {group_size} given beside formats that name their own; leave one of the two out")
    if group_size is not None and group_size < 1:
        raise BadInput(f"group size {group_size}; a group holds at least 1 weight: common sizes are 32, 64 and 128")
    zero = "" if target in ("compressed-tensors", "vllm") else "-asym"
    wanted = list(names) or [f"int{bits}{zero}-g{group_size or GROUP_SIZE}" for bits in WIDTHS]
    found = [parse_weights(name).with_scale_dtype(scale_dtype) for name in wanted]
    if twice := next((name for name in wanted if wanted.count(name) > 1), None):
        raise BadInput(f"format {twice} is listed twice; list each once")
    if len(found) < 2:
        raise BadInput(f"{wanted[0]} alone leaves nothing to choose; name two formats or more, or quantize to it")
    found = sorted(found, key=size_of)
    if within:
        named = {format.name for format in found}
        found = sorted([*found, *(mix for mix in mixes(found) if mix.name not in named)], key=size_of)
    return found


def size_of(format: Weights) -> float:
    """Bits per weight in a large matrix: what formats are ordered by."""
    return format.bits_per_weight((4096, 4096))


def mixes(formats: Sequence[Weights]) -> list[Mix]:
    """Linears whose dearest channels are of one of `formats` and the rest of another (formats/mix.py)."""
    plain = [format for format in formats if isinstance(format, Format) and format.rowwise]
    return [
        Mix(formats=(plain[place + steps], plain[place]), shares=(share,))
        for steps, share in STEPS_UP
        for place in range(len(plain) - steps)
    ]


def groups(prefix: str, block: int, refs: Sequence[Ref], topology: Topology | None) -> list[tuple[Group, list[Ref]]]:
    """The linears `refs` of the block called `prefix`, in groups that must agree, each with its refs."""
    found = []
    owners: dict[int, list[Ref]] = {}
    for ref in refs:
        if isinstance(ref, ExpertRef):
            owners.setdefault(id(ref.owner), []).append(ref)
    linears = [ref for ref in refs if not isinstance(ref, ExpertRef)]
    for members in [*input_groups(linears, topology), *owners.values()]:
        kinds = tuple(dict.fromkeys(ref.kind for ref in members))
        parent = members[0].name.rpartition(".")[0]
        if isinstance(members[0], ExpertRef):
            parent = parent.rpartition(".")[0]  # without the expert's number
        name = ".".join(part for part in (prefix, parent, "+".join(kinds)) if part)
        shapes = {f"{prefix}.{ref.name}": ref.shape for ref in members}
        found.append((Group(name=name, block=block, kinds=kinds, members=shapes), members))
    return found


def check_target(target: str) -> None:
    if target not in TARGETS:
        raise unknown("target of a plan", target, TARGETS)


def why_not(format: Weights, group: Group, target: str, device: torch.device) -> str | None:
    """Why `group` cannot be of `format` for `target`, or None if it can."""
    if isinstance(format, Mix):
        return _why_no_mix(format, group, target, device)
    scaling = format.scaling
    for name, shape in group.members.items():
        if scaling.block == "group" and scaling.group_size and scaling.group_size > shape[1]:
            return f"groups of {scaling.group_size} are larger than the input dimension {shape[1]} of {name}"
        if target in ("compressed-tensors", "vllm"):
            reason = compressed_tensors.refuses(format, None, shape)
            if reason is None and target == "compressed-tensors" and scaling.zero_point:
                reason = "transformers reads no zero points from a file of several formats"
            if reason is not None:
                return f"compressed-tensors cannot say it: {reason}"
        if target == "vllm" and format.bits not in (4, 8):
            return f"vLLM has no product for {format.bits}-bit weights"
        if target == "here" and not _multiplied_packed(format, shape, device):
            return f"no kernel on this {device.type} multiplies it as stored"
    return None


def _why_no_mix(mix: Mix, group: Group, target: str, device: torch.device) -> str | None:
    if target in ("compressed-tensors", "vllm"):
        return "compressed-tensors cannot say it: one linear has one format there"
    for name, (rows, columns) in group.members.items():
        if reason := mix.why_not(columns):
            return f"{reason} to {name}"
        for format, width in zip(mix.formats, mix.columns(columns), strict=True):
            if target == "here" and not _multiplied_packed(format, (rows, width), device):
                return f"no kernel on this {device.type} multiplies {format.name} as stored"
    return None


def _multiplied_packed(format: Format, shape: tuple[int, int], device: torch.device) -> bool:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    chosen = choose(LinearSpec(format=format, shape=shape, device=device, activations=None, dtype=dtype))
    return chosen.name != "reference" and bool(KERNELS.get(chosen.name).recovers_codes)
