"""A format is a grid times a scaling.

    value = (level[code] - zero) * scale          or, with a minimum,   level[code] * scale - minimum

The grid says which levels a code can name; the scaling says which block of the tensor shares a scale (blocks.py) and
how that scale is stored (scales.py). `Format.snap(x, scale, zero)` on any slice is all that round-to-nearest,
GPTQ, or quantization-aware training needs.

A weight is [out, in], and blocks run along the input dimension (blocks.py). Zero points have the scales' shape, are
integers in the grid's own range and stored as uint8; minima are real and stored in the scales' dtype, or as GGUF's
K-quants say. A zero point keeps zero exact; a minimum reaches both ends of a block exactly, for more bits.

Scales are rounded to what is stored *before* anything is snapped: what is decoded later is what was
optimised. `params` and `params_from_range` round what can be rounded block by block; `settle` does the rest,
once, for stores whose scales share something (double quantization, E4M3 under an outer scale). A method that
chooses ranges itself calls them in that order, then `encode` with the settled scales.

A format with `fit` (Lloyd-Max codebooks) first becomes the format of one tensor: its grid is computed from
the data and stored beside the codes.

Trade-off: a smaller block follows the data more closely and costs more bits: group 64 with a 16-bit scale
adds 0.25 bit per weight, with a 4-bit zero point 0.3125.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.formats import bits as packing
from fewbits.formats.blocks import Blocks
from fewbits.formats.grid import Grid
from fewbits.formats.scales import Layout, PlainScale, State

_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """A quantized matrix: codes uint8 [out, in] (one per byte), scale, zero, and the format that reads them.

    `scale` and `zero` are what is computed with; `stored` is how a nested store writes them (see `Format.settle`),
    empty where scale and zero are stored as they are.
    """

    format: Format
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    stored: State = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values the codes stand for, [out, in]; computed in float32, then cast."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        format = self.format
        for rows, scale, zero in format.row_chunks(self.shape, self.scale, self.zero):
            out[rows] = format.decode(self.codes[rows], scale, zero)
        return out

    def to_state(self) -> State:
        """Canonical storage: `codes` (and `zero`) packed at true density, scales as their store writes them."""
        state = {"codes": packing.pack(self.codes, self.format.bits)}
        return {**state, **(self.stored or self.format.settle(self.scale, self.zero)[2])}

    @staticmethod
    def from_state(format: Format, shape: tuple[int, int], state: State) -> Quantized:
        """The inverse of `to_state`; raises BadInput where shapes or dtypes do not fit."""
        if isinstance(format.scaling.store, PlainScale):
            format = format.with_scale_dtype(state["scale"].dtype)
        for name, (expected, dtype) in format.layout(shape).items():
            found = state[name]
            if tuple(found.shape) != expected or found.dtype != dtype:
                raise BadInput(
                    f"{name} is {found.dtype} {tuple(found.shape)}; {format.name} on {shape} has {dtype} {expected}"
                )
        format = format.fitted_from(state)
        scale, zero = format.unsettle(shape, state)
        nested = format.nested or format.fit
        return Quantized(
            format=format,
            codes=packing.unpack(state["codes"], format.bits, shape[1]),
            scale=scale,
            zero=zero,
            stored={name: tensor for name, tensor in state.items() if name != "codes"} if nested else {},
        )


@dataclass(frozen=True, kw_only=True)
class Format(Blocks):
    """A data type for tensors: `grid` x `scaling`, under the `name` that `parse_format` reads.

    fit: the grid is computed per tensor (`fitted`); `grid` is then the one to begin with.
    """

    name: str
    grid: Grid
    fit: bool = False

    @property
    def bits(self) -> int:
        """Bits per code, scales not counted."""
        return self.grid.bits

    @property
    def wider(self) -> tuple[float, ...]:
        """Multiples above 1 of a block's range that are worth a try beside shrunk ones; none for most formats."""
        return ()

    @property
    def nested(self) -> bool:
        """Whether scales must be settled for the whole tensor before anything is snapped."""
        return self.scaling.store.nested

    @property
    def rowwise(self) -> bool:
        """Whether each row is quantized as if it were alone, so that rows may be stacked and taken apart."""
        return self.scaling.rowwise and not self.fit

    def fitting(self, columns: int) -> Format:
        """This format, or the one to take in its place for rows of `columns` that its blocks do not divide."""
        return self

    def with_scale_dtype(self, dtype: torch.dtype) -> Format:
        """This format with plain scales stored as `dtype` (float32, float16 or bfloat16).

        A format that says itself how its scales are stored (E8M0, ...) stays as it is.
        """
        if dtype not in _SCALE_DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in _SCALE_DTYPES)
            raise BadInput(f"scales cannot be stored as {dtype}; allowed: {allowed}")
        if not isinstance(self.scaling.store, PlainScale):
            return self
        return dataclasses.replace(self, scaling=dataclasses.replace(self.scaling, store=PlainScale(dtype)))

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Name -> (shape, dtype) of the tensors `Quantized.to_state` gives for a matrix of `shape`."""
        rows, groups = self.parameter_shape(shape)
        found: Layout = {"codes": ((shape[0], packing.packed_length(shape[1], self.bits)), torch.uint8)}
        found.update(self.scaling.store.layout(rows, groups))
        if self.scaling.zero_point:
            found["zero"] = ((rows, packing.packed_length(groups, self.bits)), torch.uint8)
        if self.scaling.minimum:
            found["minimum"] = ((rows, groups), self.scaling.scale_dtype)
        if self.fit:
            found["levels"] = ((1 << self.bits,), torch.float32)
        return found

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits per element of a matrix of `shape`: codes, scales, zero points, codebook."""
        total = float(self.bits * shape[0] * shape[1])
        for name, (size, dtype) in self.layout(shape).items():
            if name == "zero":  # counted without the padding of its last byte
                rows, groups = self.parameter_shape(shape)
                total += self.bits * rows * groups
            elif name != "codes":
                total += 8 * dtype.itemsize * torch.Size(size).numel()
        return total / (shape[0] * shape[1])

    def check(self, w: Tensor, name: str = "weight") -> None:
        """Raises BadInput naming the tensor if `w` is no finite matrix that this format's blocks fit."""
        self.check_shape(w, name)
        # A finite sum has finite terms, and takes a twentieth of the time to see.
        if not bool(torch.isfinite(w.sum(dtype=torch.promote_types(w.dtype, torch.float32)))):
            bad = int((~torch.isfinite(w)).sum())
            if bad:
                raise BadInput(f"{name}: {bad} of {w.numel()} values are NaN or infinite; repair the source tensor")
        moved = self.scaling.zero_point or self.scaling.minimum
        if self.grid.levels[0] >= 0 and not moved and bool((w < 0).any()):
            raise BadInput(f"{name}: it has negative values, and {self.grid.name} has no level below 0")

    def check_shape(self, w: Tensor, name: str = "weight") -> None:
        """The part of `check` that reads no values."""
        if w.dim() != 2 or not w.numel():
            raise BadInput(f"{name}: shape {tuple(w.shape)}; a non-empty matrix [out, in] is needed")
        size = self.scaling.group_size
        if size is not None and self.scaling.block == "group" and size > w.shape[1]:
            raise BadInput(f"{name}: group size {size} is larger than its input dimension {w.shape[1]}")

    def params_from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale (rounded as far as its store can alone) and zero (uint8 or None) covering [low, high] per block.

        Zero is always representable, the range being widened to include it, unless the scaling has a minimum. An
        empty range gives scale 1.
        Raises BadInput where a scale overflows its stored dtype.
        """
        levels = self.grid.levels
        if self.scaling.minimum:
            return self._params_with_minimum(low.float(), high.float())
        low, high = low.clamp(max=0).float(), high.clamp(min=0).float()
        if self.scaling.zero_point:
            reach, top = high - low, levels[-1] - levels[0]
        else:
            reach, top = torch.maximum(-low, high), self.grid.top
        # By a tensor: CUDA divides by a number as a product with its reciprocal, one bit off a CPU's quotient.
        raw = reach / torch.full_like(reach, top)
        scale = self.scaling.store.round(raw, top)
        if not self.nested:  # a nested store decides itself, knowing the other scales
            scale = torch.where(raw == 0, torch.ones_like(scale), scale)
        if not self.scaling.zero_point:
            return scale, None
        zero = torch.round(-low / scale.float()).clamp_(levels[0], levels[-1])
        return scale, zero.to(torch.uint8)

    def _params_with_minimum(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        levels, store = self.grid.levels, self.scaling.store
        reach = high - low
        raw = reach / torch.full_like(reach, levels[-1] - levels[0])
        scale = store.round(raw, self.grid.top)
        scale = torch.where(raw == 0, torch.ones_like(scale), scale)
        minimum = (levels[0] * scale.float() - low).to(scale.dtype)
        if not bool(torch.isfinite(minimum).all()):
            raise BadInput(f"a minimum of {float(-low.min()):.3g} overflows {scale.dtype}: store scales as bfloat16")
        return scale, minimum

    def params(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of each block of `w` [out, in] by its minimum and maximum (absmax if symmetric)."""
        return self.params_from_range(*self.ranges(w))

    def settle(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None, State]:
        """Scale and zero as they will be read back, and the tensors that store them (all but `codes`)."""
        scale, state = self.scaling.store.settle(scale)
        if zero is not None:
            state |= {"minimum": zero} if self.scaling.minimum else {"zero": packing.pack(zero, self.bits)}
        if self.fit:
            levels = torch.tensor(self.grid.levels, device=scale.device)
            state["levels"] = torch.cat([levels, levels[-1:].expand((1 << self.bits) - len(levels))])
        return scale, zero, state

    def unsettle(self, shape: tuple[int, int], state: State) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of a matrix of `shape` from the tensors that `settle` gave."""
        rows, groups = self.parameter_shape(shape)
        scale = self.scaling.store.value(state, rows, groups)
        if self.scaling.minimum:
            return scale, state["minimum"]
        return scale, packing.unpack(state["zero"], self.bits, groups) if self.scaling.zero_point else None

    def fitted(self, w: Tensor, importance: Tensor | None = None) -> Format:
        """This format with its grid fitted to `w` [out, in]; itself where nothing is to be fitted.

        importance: weight of each column's squared error, [in].
        """
        if not self.fit:
            return self
        from fewbits.formats import lloyd_max

        scale = self.ranges(w)[1].float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        scaled = w.float() / self.expand(scale, None, (w.shape[0], w.shape[1]))[0]
        weights = None if importance is None else importance.expand_as(w).flatten()
        levels = lloyd_max.fit(scaled.flatten(), 1 << self.bits, weights)
        return self.with_levels(levels)

    def with_levels(self, levels: tuple[float, ...]) -> Format:
        """This format with another table of levels; zero is always one of them."""
        kept = set(levels)
        if len(kept) == 1 << self.bits and 0.0 not in kept:
            kept.remove(min(kept, key=abs))
        # A tensor of zeros fits one level; a grid has two.
        exact = sorted(kept | {0.0}) if kept != {0.0} else [0.0, 1.0]
        single = torch.tensor(exact).tolist()  # as stored: float32
        return dataclasses.replace(self, grid=Grid(self.grid.name, self.bits, tuple(single)))

    def choices(self, w: Tensor, importance: Tensor | None = None) -> Iterator[Format]:
        """The formats that this one may become for `w`, for a method that judges them itself; most become one."""
        yield self.fitted(w, importance)

    def fitted_from(self, state: State) -> Format:
        """This format with the grid that `state` holds, where it holds one."""
        if not self.fit:
            return self
        levels = state["levels"]
        if not bool(torch.isfinite(levels).all()) or not bool((levels.diff() >= 0).all()):
            raise BadInput(f"{self.name}: the codebook is not finite and ascending: the checkpoint is damaged")
        return dataclasses.replace(self, grid=Grid(self.grid.name, self.bits, tuple(levels.unique().tolist())))

    def encode(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Codes (uint8) of `x`; scale and zero broadcast against it."""
        return self.grid.nearest(self._scaled(x, scale, zero))

    def levels(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """What the codes of `x` stand for before they are scaled, less the zero point: for products of levels."""
        levels = self.grid.snap_(self._scaled(x, scale, zero))
        return levels if zero is None else levels - zero.to(levels.dtype)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of `codes`; scale and zero broadcast against them."""
        return self._valued(self.grid.value(codes, dtype), scale, zero)

    def snap(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """`x` moved to the nearest value the format can say, elementwise; equals decode(encode(x)) bit for bit."""
        return self._valued(self.grid.snap(self._scaled(x, scale, zero)), scale, zero)

    def _valued(self, levels: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        scale = scale.to(levels.dtype)
        if zero is None:
            return levels * scale
        zero = zero.to(levels.dtype)
        return levels * scale - zero if self.scaling.minimum else (levels - zero) * scale

    def _scaled(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if zero is not None and self.scaling.minimum:
            return (x.to(dtype) + zero.to(dtype)) / scale.to(dtype)
        scaled = x.to(dtype) / scale.to(dtype)
        # Rounded before the zero point is added: round(x/s) + z. Ties then fall on the even *difference*,
        # so x and the zero point do not interact.
        return scaled if zero is None else torch.round(scaled) + zero.to(dtype)

    def quantize(self, w: Tensor, name: str = "weight", importance: Tensor | None = None) -> Quantized:
        """Round-to-nearest of `w` [out, in] with min-max (absmax) ranges. BadInput for non-finite values.

        importance: weight of each column's squared error, [in], for formats that fit or search something.
        """
        self.check(w, name)
        format = self.fitted(w, importance)
        return format.quantize_with(w, *format.params(w))

    def quantize_with(self, w: Tensor, scale: Tensor, zero: Tensor | None) -> Quantized:
        """`w` [out, in] to nearest with the given parameters, settled first."""
        scale, zero, stored = self.settle(scale, zero)
        shape = (w.shape[0], w.shape[1])
        codes = torch.empty(shape, dtype=torch.uint8, device=w.device)
        for rows, row_scale, row_zero in self.row_chunks(shape, scale, zero):
            codes[rows] = self.encode(w[rows], row_scale, row_zero)
        return self.quantized(codes, scale, zero, stored)

    def quantized(self, codes: Tensor, scale: Tensor, zero: Tensor | None, stored: State) -> Quantized:
        """What `settle` and `encode` gave, put together."""
        return Quantized(
            format=self.with_scale_dtype(scale.dtype),
            codes=codes,
            scale=scale,
            zero=zero,
            stored=stored if self.nested or self.fit else {},
        )
