"""A format is a grid times a scaling.

    value = (level[code] - zero) * scale

The grid says which levels a code can name; the scaling says which block of the tensor shares a scale and
how that scale is stored. `Format.snap(x, scale, zero)` on any slice is all that round-to-nearest, GPTQ,
or quantization-aware training needs.

Layout. A weight is [out, in]; blocks run along the input dimension. Scales are [out, G] for groups
(column c belongs to group c // group_size, so the last group is shorter when group_size does not divide
in), [out, 1] per channel (or token), [1, 1] per tensor. Zero points have the scales' shape, are integers
in the grid's own range and stored as uint8. Scales are rounded to the dtype they are stored in *before*
anything is snapped: what is decoded later is what was optimised.

Trade-off: a smaller block follows the data more closely and costs more bits: group 64 with a 16-bit scale
adds 0.25 bit per weight, with a 4-bit zero point 0.3125.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.formats import bits as packing
from fewbits.formats.grid import Grid

_SCALE_BITS = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 16}


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Which block shares a scale (`block`: tensor, channel, token or group) and how it is stored."""

    block: str
    group_size: int | None = None
    zero_point: bool = False
    scale_dtype: torch.dtype = torch.float32

    def groups(self, in_features: int) -> int:
        """How many blocks lie along a row of `in_features`."""
        return -(-in_features // self.group_size) if self.group_size else 1

    def width(self, in_features: int) -> int:
        """Columns per block (the last may have fewer)."""
        return self.group_size or in_features


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantized matrix: codes uint8 [out, in] (one per byte), scale, zero, and the format that reads them."""

    format: Format
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values the codes stand for, [out, in]; computed in float32, then cast."""
        scale, zero = self.format.expand(self.scale, self.zero, self.shape[1])
        return self.format.decode(self.codes, scale, zero).to(dtype)

    def to_state(self) -> dict[str, Tensor]:
        """Canonical storage: `codes` (and `zero`) packed at true density, `scale` in its stored dtype."""
        state = {"codes": packing.pack(self.codes, self.format.bits), "scale": self.scale}
        if self.zero is not None:
            state["zero"] = packing.pack(self.zero, self.format.bits)
        return state

    @staticmethod
    def from_state(format: Format, shape: tuple[int, int], state: dict[str, Tensor]) -> Quantized:
        """The inverse of `to_state`; raises BadInput where shapes do not fit."""
        scale = state["scale"]
        expected = format.parameter_shape(shape)
        if tuple(scale.shape) != expected:
            raise BadInput(f"scale of shape {tuple(scale.shape)}; {format.name} on {shape} has {expected}")
        zero = None
        if format.scaling.zero_point:
            zero = packing.unpack(state["zero"], format.bits, expected[1])
        return Quantized(
            format=format.with_scale_dtype(scale.dtype),
            codes=packing.unpack(state["codes"], format.bits, shape[1]),
            scale=scale,
            zero=zero,
        )


@dataclass(frozen=True, kw_only=True)
class Format:
    """A data type for tensors: `grid` x `scaling`, under the `name` that `parse_format` reads."""

    name: str
    grid: Grid
    scaling: Scaling

    @property
    def bits(self) -> int:
        """Bits per code, scales not counted."""
        return self.grid.bits

    def with_scale_dtype(self, dtype: torch.dtype) -> Format:
        """This format with scales stored as `dtype` (float32, float16 or bfloat16)."""
        if dtype not in _SCALE_BITS:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in _SCALE_BITS)
            raise BadInput(f"scales cannot be stored as {dtype}; allowed: {allowed}")
        return dataclasses.replace(self, scaling=dataclasses.replace(self.scaling, scale_dtype=dtype))

    def parameter_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of scale and zero for a matrix of `shape`."""
        rows = 1 if self.scaling.block == "tensor" else shape[0]
        return rows, self.scaling.groups(shape[1])

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits per element of a matrix of `shape`: codes, scales and zero points."""
        rows, groups = self.parameter_shape(shape)
        each = _SCALE_BITS[self.scaling.scale_dtype] + (self.bits if self.scaling.zero_point else 0)
        return self.bits + rows * groups * each / (shape[0] * shape[1])

    def check(self, w: Tensor, name: str = "weight") -> None:
        """Raises BadInput naming the tensor if `w` is no finite matrix that this format's blocks fit."""
        if w.dim() != 2 or not w.numel():
            raise BadInput(f"{name}: shape {tuple(w.shape)}; a non-empty matrix [out, in] is needed")
        size = self.scaling.group_size
        if size is not None and size > w.shape[1]:
            raise BadInput(f"{name}: group size {size} is larger than its input dimension {w.shape[1]}")
        if not bool(torch.isfinite(w).all()):
            bad = int((~torch.isfinite(w)).sum())
            raise BadInput(f"{name}: {bad} of {w.numel()} values are NaN or infinite; repair the source tensor")

    def blocks(self, w: Tensor) -> Tensor:
        """`w` [out, in] as [rows, G, width] with the short last block padded by repeating its last column.

        Repeating a value changes neither a block's minimum nor its maximum.
        """
        rows = w.shape[0]
        if self.scaling.block == "tensor":
            return w.reshape(1, 1, -1)
        width = self.scaling.width(w.shape[1])
        missing = self.scaling.groups(w.shape[1]) * width - w.shape[1]
        if missing:
            w = torch.cat([w, w[:, -1:].expand(rows, missing)], dim=1)
        return w.reshape(rows, -1, width)

    def params_from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale (in its stored dtype) and zero (uint8 or None) covering [low, high] per block.

        Zero is always representable: the range is widened to include it. An empty range gives scale 1.
        Raises BadInput where a scale overflows its stored dtype.
        """
        levels, dtype = self.grid.levels, self.scaling.scale_dtype
        low, high = low.clamp(max=0).float(), high.clamp(min=0).float()
        if self.scaling.zero_point:
            raw = (high - low) / (levels[-1] - levels[0])
        else:
            raw = torch.maximum(-low, high) / self.grid.top
        # A block too small for the stored dtype would get scale 0 and decode to 0/0.
        scale = raw.clamp(min=torch.finfo(dtype).tiny).to(dtype)
        scale = torch.where(raw == 0, torch.ones_like(scale), scale)
        if not bool(torch.isfinite(scale).all()):
            raise BadInput(f"a scale of {float(raw.max()):.3g} overflows {dtype}: store scales as bfloat16 or float32")
        if not self.scaling.zero_point:
            return scale, None
        zero = torch.round(-low / scale.float()).clamp_(levels[0], levels[-1])
        return scale, zero.to(torch.uint8)

    def params(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of each block of `w` [out, in] by its minimum and maximum (absmax if symmetric)."""
        low, high = torch.aminmax(self.blocks(w), dim=-1)
        return self.params_from_range(low, high)

    def expand(self, scale: Tensor, zero: Tensor | None, in_features: int) -> tuple[Tensor, Tensor | None]:
        """Scale and zero per column: [rows, G] -> [rows, in] (or [rows, 1] where one block spans the row)."""
        size = self.scaling.group_size
        if size is None:
            return scale, zero
        column = torch.arange(in_features, device=scale.device) // size
        return scale[:, column], None if zero is None else zero[:, column]

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes (uint8) of `x`; scale and zero broadcast against it."""
        return self.grid.nearest(self._scaled(x, scale, zero))

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of `codes`; scale and zero broadcast against them."""
        levels = self.grid.value(codes, dtype)
        if zero is not None:
            levels = levels - zero.to(dtype)
        return levels * scale.to(dtype)

    def snap(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """`x` moved to the nearest value the format can say, elementwise; equals decode(encode(x)) bit for bit."""
        levels = self.grid.snap(self._scaled(x, scale, zero))
        if zero is not None:
            levels = levels - zero.to(levels.dtype)
        return levels * scale.to(levels.dtype)

    def _scaled(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        scaled = x.to(dtype) / scale.to(dtype)
        # Rounded before the zero point is added: round(x/s) + z. Ties then fall on the even *difference*,
        # so x and the zero point do not interact.
        return scaled if zero is None else torch.round(scaled) + zero.to(dtype)

    def quantize(self, w: Tensor, name: str = "weight") -> Quantized:
        """Round-to-nearest of `w` [out, in] with min-max (absmax) ranges. BadInput for non-finite values."""
        self.check(w, name)
        scale, zero = self.params(w)
        per_column = self.expand(scale, zero, w.shape[1])
        return Quantized(
            format=self.with_scale_dtype(scale.dtype),
            codes=self.encode(w, *per_column),
            scale=scale,
            zero=zero,
        )
