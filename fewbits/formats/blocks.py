"""Which elements of a tensor share a scale, and where their parameters lie.

A weight is [out, in]; blocks run along the input dimension. Scales are [out, G] for groups (column c belongs to group
c // group_size, so the last group is shorter when group_size does not divide in), [out, 1] per channel (or token),
[1, 1] per tensor, [ceil(out/128), ceil(in/128)] for 128 x 128 tiles. Zero points and minima have the scales' shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewbits.formats.scales import PlainScale, ScaleStore

# Elements worked on at once: on a CPU a few passes over them stay in a core's cache; elsewhere, few launches.
_CHUNK = {"cpu": 1 << 18}
_LARGE_CHUNK = 1 << 24
_NARROW = 32  # columns: along narrower blocks a reduction costs more than a pass that writes magnitudes first


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Which block shares a scale (`block`: tensor, channel, token, group or tile) and how it is stored.

    group_size: columns per group, or the side of a square tile.  zero_point: integer, in the grid's range.
    minimum: a real offset per block instead, subtracted from the scaled level.
    static, sinks: of activations (rows.py), whose ranges are known before they come; all but those of some tokens.
    """

    block: str
    group_size: int | None = None
    zero_point: bool = False
    minimum: bool = False
    store: ScaleStore = field(default_factory=PlainScale)
    static: bool = False
    sinks: bool = False

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype scales are computed with: their stored one, or float32 where storage is not a float."""
        return self.store.dtype if isinstance(self.store, PlainScale) else torch.float32

    @property
    def rowwise(self) -> bool:
        """Whether each row is quantized as if it were alone, so that rows may be stacked and taken apart."""
        return self.block in ("channel", "token", "group") and not self.store.nested

    def groups(self, in_features: int) -> int:
        """How many blocks lie along a row of `in_features`."""
        return -(-in_features // self.group_size) if self.group_size else 1

    def width(self, in_features: int) -> int:
        """Columns per block (the last may have fewer)."""
        return self.group_size or in_features


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks that `scaling` makes of a matrix."""

    scaling: Scaling

    @property
    def symmetric(self) -> bool:
        """Whether only the largest magnitude of a block counts, not on which side of zero it is."""
        return not (self.scaling.zero_point or self.scaling.minimum)

    def parameter_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Shape of scale and zero for a matrix of `shape`."""
        block, size = self.scaling.block, self.scaling.group_size
        rows = 1 if block == "tensor" else shape[0]
        if block == "tile":
            assert size is not None
            rows = -(-shape[0] // size)
        return rows, self.scaling.groups(shape[1])

    def blocks(self, w: Tensor) -> Tensor:
        """`w` [out, in] as [rows, G, elements of a block]; rows and G as in `parameter_shape`.

        Short blocks at the edges are padded by repeating their last row or column, which changes neither a
        block's minimum nor its maximum.
        """
        rows = w.shape[0]
        if self.scaling.block == "tensor":
            return w.reshape(1, 1, -1)
        width = self.scaling.width(w.shape[1])
        missing = self.scaling.groups(w.shape[1]) * width - w.shape[1]
        if missing:
            w = torch.cat([w, w[:, -1:].expand(rows, missing)], dim=1)
        if self.scaling.block != "tile":
            return w.reshape(rows, -1, width)
        if rows % width:
            w = torch.cat([w, w[-1:].expand(-rows % width, -1)])
        tiles = w.reshape(w.shape[0] // width, width, w.shape[1] // width, width)
        return tiles.transpose(1, 2).flatten(2)

    def ranges(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each block; of symmetric formats minus and plus the largest magnitude."""
        found = [self._row_ranges(w[rows]) for rows in self._slices((w.shape[0], w.shape[1]), w.device)]
        low, high = (torch.cat(parts) for parts in zip(*found, strict=True))
        if self.scaling.block == "tensor":
            return low.amin(0, keepdim=True), high.amax(0, keepdim=True)
        if self.scaling.block == "tile":
            size = self.scaling.width(w.shape[1])
            low, high = (torch.cat([end, end[-1:].expand(-len(end) % size, -1)]) for end in (low, high))
            return low.unflatten(0, (-1, size)).amin(1), high.unflatten(0, (-1, size)).amax(1)
        return low, high

    def _row_ranges(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """`ranges` of each row's own blocks. One extreme at a time: torch's aminmax takes four times as long."""
        width = self.scaling.width(w.shape[1])
        rest = w.shape[1] % width

        def extreme(of: Callable[..., Tensor]) -> Tensor:
            found = of(w[:, : w.shape[1] - rest].unflatten(1, (-1, width)), dim=-1)
            return torch.cat([found, of(w[:, -rest:], dim=1, keepdim=True)], dim=1) if rest else found

        if self.symmetric and width < _NARROW:
            w = w.abs()
            high = extreme(torch.amax)
            return -high, high
        low, high = extreme(torch.amin), extreme(torch.amax)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        return low, high

    def expand(self, scale: Tensor, zero: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """Scale and zero per element of a matrix of `shape`, or broadcasting against it ([out, 1], [1, 1])."""
        size = self.scaling.group_size
        if size is None or (self.scaling.block == "group" and size >= shape[1]):
            return scale, zero

        def spread(values: Tensor) -> Tensor:
            values = values.repeat_interleave(size, dim=1)[:, : shape[1]]
            return values.repeat_interleave(size, dim=0)[: shape[0]] if self.scaling.block == "tile" else values

        return spread(scale), None if zero is None else spread(zero)

    def row_chunks(
        self, shape: tuple[int, int], scale: Tensor, zero: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Slices of rows, each with its scale and zero per element: small enough for a cache."""
        size = self.scaling.group_size
        for rows in self._slices(shape, scale.device):
            here = rows
            if self.scaling.block == "tensor":
                here = slice(None)
            elif self.scaling.block == "tile" and size is not None:
                here = slice(rows.start // size, -(-rows.stop // size))
            part = None if zero is None else zero[here]
            yield rows, *self.expand(scale[here], part, (rows.stop - rows.start, shape[1]))

    def _slices(self, shape: tuple[int, int], device: torch.device) -> list[slice]:
        """Slices of rows that a cache holds, whole tiles at a time."""
        step = max(1, _CHUNK.get(device.type, _LARGE_CHUNK) // shape[1])
        if self.scaling.block == "tile":
            assert self.scaling.group_size is not None
            step = -(-step // self.scaling.group_size) * self.scaling.group_size
        return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
