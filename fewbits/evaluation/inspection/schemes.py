"""The schemes `inspect` tries, and what each asks of this machine and of other readers.

TRIED holds what `fewbits quantize` writes. DIAGNOSED schemes are measured for what they tell about the activations:
fewbits writes no checkpoints of them. One scale for all tokens fails where a few channels or tokens tower over the
rest; 4-bit activations fail for the same reason even with a scale per token.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from fewbits.checkpoints import compressed_tensors
from fewbits.core.errors import BadInput
from fewbits.formats import Format, Scheme, parse_format, parse_scheme
from fewbits.kernels import KERNELS, LinearSpec, choose, explain
from fewbits.models.walk import ExpertRef, Ref

# (scheme, group size or None for the scheme's own), most bits first.
TRIED: tuple[tuple[str, int | None], ...] = (
    ("W8A16", None),
    ("W8A8", None),
    ("FP8_DYNAMIC", None),
    ("NVFP4A16", None),
    ("NF4", None),
    ("W4A16_ASYM", 64),
    ("W4A16", 64),
    ("W4A16_ASYM", None),
    ("W4A16", None),
    ("MXFP4A16", None),
    ("W4A8", None),
    ("W3A16_ASYM", 64),
    ("W3A16", None),
    ("W2A16_ASYM", 64),
)
# name -> weights, activations. A static scale with nothing calibrated takes the range of the text it is measured on.
DIAGNOSED: dict[str, tuple[str, str]] = {
    "W8A8, one scale per tensor": ("int8-channel", "int8-tensor-static"),
    "W4A4, a scale per token": ("int4-g128", "int4-token"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A scheme to try. label: what tables call it; scheme: its name on the command line, None where it has none."""

    label: str
    weights: Format
    activations: Format | None = None
    scheme: str | None = None
    group_size: int | None = None

    def command(self, model: str) -> str | None:
        """The command line that makes the checkpoint."""
        if self.scheme is None:
            return None
        name = model.rstrip("/").rpartition("/")[2].removesuffix(".gguf")
        words = ["fewbits", "quantize", model, "-o", f"{name}-{self.label.lower().replace(' ', '-')}"]
        words += ["--scheme", self.scheme]
        words += ["--group-size", str(self.group_size)] if self.group_size else []
        words += ["--method", "rtn"] if self.weights.bits >= 8 else []  # 8 bits leave GPTQ nothing to repair
        return shlex.join(words)


def candidates(names: Sequence[str], dtype: torch.dtype) -> list[Candidate]:
    """The candidates of these names (scheme, format, or SCHEME-gSIZE), or all that are tried; scales in `dtype`.

    Raises BadInput for an unknown name.
    """
    if names:
        named = [_named(name, dtype) for name in names]
        labels = [each.label for each in named]
        if twice := next((label for label in labels if labels.count(label) > 1), None):
            raise BadInput(f"scheme {twice} is listed twice; list each once")
        return named
    found = [_tried(name, size, dtype) for name, size in TRIED]
    for label, (weights, activations) in DIAGNOSED.items():
        format = parse_format(weights).with_scale_dtype(dtype)
        found.append(Candidate(label=label, weights=format, activations=parse_format(activations)))
    return found


def _named(name: str, dtype: torch.dtype) -> Candidate:
    head, _, size = name.rpartition("-g")
    if head and size.isdigit() and head.upper() in {scheme for scheme, _ in TRIED}:
        return _tried(head, int(size), dtype)
    return _tried(name, None, dtype)


def _tried(name: str, size: int | None, dtype: torch.dtype) -> Candidate:
    scheme: Scheme = parse_scheme(name, size)
    group = scheme.weights.scaling.group_size
    label = scheme.name if scheme.weights.name == scheme.name else _label(scheme.name, scheme.weights, group)
    return Candidate(
        label=label,
        weights=scheme.weights.with_scale_dtype(dtype),
        activations=scheme.activations,
        scheme=scheme.name,
        group_size=size,
    )


def _label(name: str, weights: Format, group: int | None) -> str:
    """'W4A16 g64': the group size where the scheme leaves it open."""
    return f"{name} g{group}" if weights.grid.kind == "integer" and group else name


def why_not(candidate: Candidate, refs: Sequence[Ref]) -> str | None:
    """Why `candidate` cannot be tried on the linears `refs` of one block, or None."""
    scaling = candidate.weights.scaling
    for ref in refs:
        if candidate.activations is not None and isinstance(ref, ExpertRef):
            return "activations of fused experts are not quantized"
        if scaling.block == "group" and scaling.group_size and scaling.group_size > ref.shape[1]:
            return f"groups of {scaling.group_size} are larger than the input dimension {ref.shape[1]} of {ref.name}"
    return None


def loads(candidate: Candidate, shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Who reads the checkpoint besides fewbits: {"readers": [...], "why": why compressed-tensors cannot say it}.

    vLLM has products for 4-bit and 8-bit weights, and for W8A8; of the rest it reads files it cannot run.
    """
    if candidate.scheme is None:
        return {"readers": [], "why": "fewbits writes no such checkpoint"}
    reasons = Counter(
        reason
        for shape in shapes
        if (reason := compressed_tensors.refuses(candidate.weights, candidate.activations, shape))
    )
    if reasons:
        return {"readers": [], "why": reasons.most_common(1)[0][0]}
    bits, both = candidate.weights.bits, candidate.activations is not None
    vllm = bits == 8 or (bits == 4 and not both)
    return {"readers": ["transformers", *(["vLLM"] if vllm else [])], "why": ""}


def kernels(candidate: Candidate, shapes: Sequence[tuple[int, int]], device: torch.device) -> dict[str, Any]:
    """Which kernels multiply on `device`: {"kernels": share of the weights by kernel, "packed": ..., "why": ...}.

    packed: whether every weight is multiplied as it is stored, not decoded first. why: the answer of the first
    kernel that refused for another reason than the device.
    """
    if candidate.scheme is None:
        return {"kernels": {}, "packed": False, "why": "fewbits runs no such checkpoint"}
    weights: Counter[str] = Counter()
    packed, why = True, ""
    for shape in set(shapes):
        spec = LinearSpec(
            format=candidate.weights, shape=shape, device=device, activations=candidate.activations,
            dtype=torch.float32 if device.type == "cpu" else torch.bfloat16,
        )  # fmt: skip
        chosen = choose(spec)
        weights[chosen.name] += shape[0] * shape[1] * list(shapes).count(shape)
        if chosen.name == "reference" or not KERNELS.get(chosen.name).recovers_codes:
            packed = False
            said = [f"{name}: {answer.reason}" for name, answer in explain(spec) if not answer and device.type in name]
            why = why or "; ".join(said)
    total = sum(weights.values())
    return {"kernels": {name: count / total for name, count in weights.items()}, "packed": packed, "why": why}


def size(candidate: Candidate, shapes: Sequence[tuple[int, int]], kept: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of the weights in this scheme, with `kept` parameters in `dtype`, and bits per quantized weight."""
    quantized = sum(rows * columns for rows, columns in shapes)
    bits = sum(candidate.weights.bits_per_weight(shape) * shape[0] * shape[1] for shape in shapes)
    return {"bytes": round(bits / 8) + kept * dtype.itemsize, "bits_per_weight": bits / quantized}
