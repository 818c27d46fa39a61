"""What a kernel is: an admission test, a prepack and a product.

    y = x @ W.T        x [..., in], W [out, in] quantized, y [..., out] in x's dtype

A kernel is a row in the table of `fewbits.kernels.dispatch`. It says itself what it can do (`accepts`), turns
canonical codes into the layout it wants once (`prepack`), multiplies (`linear`), and states how close to the
reference it stays (`floor_db`, signal to noise in decibels), which the contract tests hold it to.

Where activations are quantized as well, x is first written as levels times a scale per token,

    x[m, k] ~ level[m, k] * s[m]        y = (level @ W.T) * s

and a kernel multiplies the *levels*. Levels of at most 8 bits (less a zero point: 9) are exact in bfloat16,
so a bfloat16 kernel adds no rounding of its own to x. Where the scales of x are per group of a token, nothing can be
taken out of the product: x is rounded and multiplied as it is, by kernels that do not round it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewbits.formats import Format, Quantized
from fewbits.formats.outliers import Outliers
from fewbits.formats.rows import fixed_params, round_rows, row_params

# What a kernel keeps between calls. Plain tensors, except where torch wraps a packed weight in its own type.
Packed = dict[str, Tensor]
Bound = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """One product to be dispatched: weight `format`, `shape` (out, in), where it runs, and the dtype of x."""

    format: Format
    shape: tuple[int, int]
    device: torch.device
    dtype: torch.dtype = torch.float32
    activations: Format | None = None


@dataclass(frozen=True)
class Yes:
    """The kernel takes the product; `note` says anything a user should know (memory, rounding)."""

    note: str = ""

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"yes: {self.note}" if self.note else "yes"


@dataclass(frozen=True)
class No:
    """The kernel does not take the product, because of `reason`."""

    reason: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"no: {self.reason}"


class Plain:
    """What a kernel does about `bind` and `join` when it has nothing to gain from them."""

    def bind(self: Kernel, packed: Packed, spec: LinearSpec) -> Bound:
        return lambda x: self.linear(x, packed, spec)

    def join(self, parts: Sequence[Packed], specs: Sequence[LinearSpec]) -> tuple[Packed, list[Packed]] | None:
        return None


class Kernel(Protocol):
    """A way to multiply by a quantized weight.

    name: the key in the registry.
    floor_db: least SQNR against the reference on Gaussian data, decibels.
    input_dtype: the dtype of x it computes in; a caller that can choose saves a cast. None: any.
    recovers_codes: whether `codes` gives the canonical codes back from the packed layout, exactly; if not,
        whoever holds the weight keeps them beside the packed tensors.
    """

    name: str
    floor_db: float
    input_dtype: torch.dtype | None
    recovers_codes: bool

    def accepts(self, spec: LinearSpec) -> Yes | No: ...

    def prepack(self, weight: Quantized) -> Packed:
        """The kernel's own layout of `weight`."""
        ...

    def linear(self, x: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        """x [..., in] -> [..., out], in x's dtype. Without bias."""
        ...

    def codes(self, packed: Packed, spec: LinearSpec) -> Tensor:
        """Codes, uint8 [out, in], from the packed layout; only where `recovers_codes`."""
        ...

    def bind(self, packed: Packed, spec: LinearSpec) -> Bound:
        """`linear` with its decisions made beforehand, for a caller that multiplies often.

        x is [T, in], contiguous and in `input_dtype`; y may be in any float dtype.
        """
        ...

    def join(self, parts: Sequence[Packed], specs: Sequence[LinearSpec]) -> tuple[Packed, list[Packed]] | None:
        """Weights that read the same x as one taller weight: (the whole, each part as a view of the whole).

        The specs differ in `out` alone. None where the layout does not allow it.
        """
        ...


def split_levels(x: Tensor, activations: Format, packed: Packed) -> tuple[Tensor, Tensor]:
    """x [M, in] -> (levels less zero point, float32 [M, in]; scale, float32 [M, 1]).

    Static parameters are in `packed`. Of groups within a row the levels are times their scales already, and the scale
    is 1.
    """
    fixed = fixed_params(packed)
    if activations.scaling.block == "group":
        return round_rows(x, activations, fixed), torch.ones(x.shape[0], 1, device=x.device)
    x = x.float()
    if not x.shape[0]:  # no rows: nothing to take a range of
        return x, x.new_ones(0, 1)
    scale, zero = row_params(x, activations, fixed)
    return activations.levels(x, scale, zero), scale.float().expand(x.shape[0], 1)


def affine(format: Format) -> No | None:
    """None where levels are consecutive integers, so that value = code * scale + offset; else No.

    (`No` is false, so what these two return is to be compared with None.)
    """
    if format.grid.kind != "integer":
        return No(f"{format.grid.name} levels are a table, not consecutive integers")
    if format.scaling.minimum:
        return No("it knows integer zero points, not real minima")
    if format.scaling.block == "tile":
        return No("it has no scales per tile")
    return None


def middle_code(format: Format) -> int:
    """The code kernels centre on: that of level 0, or the middle of the range where a zero point moves it."""
    return 1 << (format.bits - 1) if format.scaling.zero_point else -int(format.grid.levels[0])


def whole_tokens(spec: LinearSpec) -> No | None:
    """None where x is not rounded, or with one scale a token or tensor; else No: for products in 16 bits."""
    if spec.activations is None or spec.activations.scaling.block in ("token", "tensor"):
        return None
    return No(f"it multiplies levels, and {spec.activations.name} has several scales in a token")


def whole_rows(spec: LinearSpec) -> No | None:
    """None where each row of the weight has one scale; else No."""
    size = spec.format.scaling.group_size
    if size is None or size >= spec.shape[1]:
        return None
    return No("it has one scale per row, the format one per group")


def outliers_within(kernel: Kernel, outliers: Outliers, spec: LinearSpec) -> Packed:
    """What `kernel` adds to its packed tensors to multiply `outliers` in the same launch, if it knows how."""
    prepack = getattr(kernel, "prepack_outliers", None)
    return {} if prepack is None else prepack(outliers, spec)


def multiplies_outliers(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether a product of x in `dtype` with `packed` has its outlier columns in it."""
    return outliers_name(dtype) in packed


def outliers_name(dtype: torch.dtype) -> str:
    """Of the weights of outlier columns that go with x in `dtype`."""
    return f"outliers_{str(dtype).removeprefix('torch.')}"


def on_cpu(spec: LinearSpec) -> No | None:
    return None if spec.device.type == "cpu" else No(f"runs on cpu, not on {spec.device.type}")


def joined_rows(
    parts: Sequence[Packed], specs: Sequence[LinearSpec], dims: dict[str, int]
) -> tuple[Packed, list[Packed]] | None:
    """`Kernel.join` for layouts in which out runs along dimension `dims[key]` of each tensor, unpadded.

    The big tensors ("weight") of the parts become views, so joining takes no memory but for scales.
    """
    rows = [spec.shape[0] for spec in specs]
    if any(part["weight"].shape[0] != count for part, count in zip(parts, rows, strict=True)):
        return None  # padded rows would come to lie between the parts
    if any(spec.format.scaling.block == "tensor" for spec in specs):
        return None  # one scale each, and the whole would need several
    whole = {key: torch.cat([part[key] for part in parts], dims[key]) for key in parts[0]}
    views = [{**part, "weight": weight} for part, weight in zip(parts, whole["weight"].split(rows), strict=True)]
    return whole, views


def operator_exists(namespace: str, name: str) -> bool:
    """Whether this build of torch has the operator."""
    return hasattr(getattr(torch.ops, namespace), name)
