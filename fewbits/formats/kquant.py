"""GGUF's block formats: legacy blocks of 32 weights and K-quants, super-blocks of 256.

    q4_0 q5_0 q8_0     w = d * q                            d: fp16 per 32, and signed: the largest weight of
                                                            a block falls on the lowest level, which reaches one further
    q4_1 q5_1          w = d * q - m                        d, m: fp16 per 32
    q3_k q6_k          w = (d * sc) * q                     sc: 6 bits or int8 per 16, d: fp16 per 256
    q2_k q4_k q5_k     w = (d * sc) * q - (dmin * mn)       sc, mn: 4 bits per 16, or 6 bits per 32; d, dmin per 256

A K-quant is a quantized tensor whose scales are quantized too: scales for 16 weights in 6 bits cost 0.375 bit per
weight, where fp16 would cost a whole one. (ggml adds the legacy minimum, m = min; here it is subtracted
everywhere.)

Legacy types without importances are quantized exactly as ggml's reference does, to the byte: levels come from the
float32 scale, before it is rounded to fp16. All others are searched (kquant_search.py). Methods that decide ranges
themselves (GPTQ, a range search) go through `params`, `settle` and `encode` as with any format.

Stored, for a matrix [out, in], as canonical tensors: `codes`; `scale` and `minimum` either fp16 or packed integers;
`scale_super` and `minimum_super`, the fp16 per 256. ggml's byte order is in checkpoints/gguf_pack.py.
Sources: ggml-quants.c and ggml-common.h of llama.cpp; gguf-py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.formats import bits as packing
from fewbits.formats.base import Format, Quantized
from fewbits.formats.blocks import Scaling
from fewbits.formats.grid import integer_grid
from fewbits.formats.kquant_search import Columns, Stored, descend, half, store
from fewbits.formats.scales import Layout, State

# Weights searched at once: on a CPU their temporaries stay in a cache; elsewhere, few launches.
_CHUNK = {"cpu": 1 << 18}
_LARGE_CHUNK = 1 << 23
_F16 = 16
# The float32 below 0.5: added before truncation it rounds as C's roundf does, also next to a tie.
_BELOW_HALF = 0.49999997


@dataclass(frozen=True)
class BlockScale:
    """Scales (or minima) as fp16, or as integers of `bits` under one fp16 per `count` of them."""

    bits: int
    count: int
    signed: bool
    prefix: str = "scale"
    nested = True

    @property
    def limits(self) -> tuple[int, int]:
        """The integers' range; negative ones are stored with this offset."""
        low = -(1 << (self.bits - 1)) if self.signed else 0
        return low, low + (1 << self.bits) - 1

    def round(self, raw: Tensor, top: float) -> Tensor:
        return half(raw).float() if self.bits == _F16 else raw.float()

    def settle(self, scale: Tensor) -> tuple[Tensor, State]:
        if self.bits == _F16:
            stored = half(scale)
            return stored.float(), {self.prefix: stored}
        found = store(scale.float().reshape(-1, self.count), *self.limits)
        return self.stored(found, scale.shape[0])

    def stored(self, found: Stored, rows: int) -> tuple[Tensor, State]:
        """Values [rows, G] and tensors of super-blocks that are decided."""
        codes = (found.integer - self.limits[0]).to(torch.uint8).view(rows, -1)
        state = {
            self.prefix: packing.pack(codes, self.bits),
            f"{self.prefix}_super": found.unit.half().view(rows, -1),
        }
        return self.value(state, rows, codes.shape[1]), state

    def layout(self, rows: int, groups: int) -> Layout:
        if self.bits == _F16:
            return {self.prefix: ((rows, groups), torch.float16)}
        return {
            self.prefix: ((rows, packing.packed_length(groups, self.bits)), torch.uint8),
            f"{self.prefix}_super": ((rows, groups // self.count), torch.float16),
        }

    def integers(self, state: State, groups: int) -> Tensor:
        """The stored integers as codes, uint8 [rows, groups]."""
        return packing.unpack(state[self.prefix], self.bits, groups)

    def value(self, state: State, rows: int, groups: int) -> Tensor:
        if self.bits == _F16:
            return state[self.prefix].float()
        unit = state[f"{self.prefix}_super"].float().repeat_interleave(self.count, dim=1)
        return unit * (self.integers(state, groups).float() + self.limits[0])


@dataclass(frozen=True, kw_only=True)
class BlockFormat(Format):
    """One GGUF type. `block`: weights per block of bytes.  fallback: for rows that blocks of 256 do not fit."""

    block: int
    fallback: str

    @property
    def legacy(self) -> bool:
        """Whether scales are fp16 of their own."""
        return self.block == self.scaling.group_size

    @property
    def symmetric(self) -> bool:
        return False  # signed scales: the side matters

    @property
    def affine(self) -> bool:
        return self.scaling.minimum

    @property
    def scales(self) -> BlockScale:
        assert isinstance(self.scaling.store, BlockScale)
        return self.scaling.store

    @property
    def minima(self) -> BlockScale:
        return BlockScale(self.scales.bits, self.scales.count, signed=False, prefix="minimum")

    @property
    def ends(self) -> tuple[float, float]:
        return self.grid.levels[0], self.grid.levels[-1]

    def layout(self, shape: tuple[int, int]) -> Layout:
        rows, groups = self.parameter_shape(shape)
        return {**super().layout(shape), **(self.minima.layout(rows, groups) if self.affine else {})}

    def fitting(self, columns: int) -> Format:
        if columns % self.block == 0 or columns % 32 or not self.fallback:
            return self
        return _format(self.fallback, *_TYPES[self.fallback])

    def check_shape(self, w: Tensor, name: str = "weight") -> None:
        if w.dim() == 2 and w.shape[1] % self.block:
            way = f"use {self.fallback}" if w.shape[1] % 32 == 0 else "keep it in 16 bits"
            raise BadInput(f"{name}: input dimension {w.shape[1]} is no multiple of {self.name}'s {self.block}: {way}")
        super().check_shape(w, name)

    def params_from_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and minimum of [low, high]; symmetric types put the larger end on their lowest level."""
        low, high = low.float(), high.float()
        bottom, top = self.ends
        if self.affine:
            if not self.legacy:  # whose minima are stored without a sign
                low, high = low.clamp(max=0), high.clamp(min=0)
            return self.scales.round((high - low) / top, top), self.minima.round(-low, top)
        largest = torch.where(-low > high, low, high)
        raw = largest.abs() / top if self.name == "q8_0" else largest / bottom
        return self.scales.round(raw, top), None

    def params(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and minimum of each sub-block: of its range for legacy types, searched for K types."""
        if self.legacy:
            return super().params(w)
        found = [self._columns(w[rows], None).search() for rows in self._chunks(w)]
        shape = self.parameter_shape((w.shape[0], w.shape[1]))
        scale, minimum = (torch.cat(part).view(shape) for part in zip(*found, strict=True))
        return scale, minimum if self.affine else None

    def settle(self, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor | None, State]:
        scale, state = self.scales.settle(scale)
        if zero is not None:
            zero, more = self.minima.settle(zero)
            state = {**state, **more}
        return scale, zero, state

    def unsettle(self, shape: tuple[int, int], state: State) -> tuple[Tensor, Tensor | None]:
        size = self.parameter_shape(shape)
        return self.scales.value(state, *size), self.minima.value(state, *size) if self.affine else None

    def _scaled(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        # A scale of 0 is stored for blocks of zeros and for the smallest sub-blocks: level 0, not 0 / 0.
        scaled = super()._scaled(x, scale, zero)
        return scaled.masked_fill_((scale == 0).expand_as(scaled), 0)

    def quantize(self, w: Tensor, name: str = "weight", importance: Tensor | None = None) -> Quantized:
        """Codes of `w` [out, in]; `importance` [in], not negative, weighs the squared error of columns.

        Raises BadInput for values that are not finite and for rows that blocks do not fit.
        """
        self.check(w, name)
        if importance is not None:
            importance = self._checked(importance, w, name)
        one = self._reference if self.legacy and importance is None else partial(self._searched, v=importance)
        parts = [one(w[rows].float()) for rows in self._chunks(w)]
        codes, states = torch.cat([codes for codes, _ in parts]), [state for _, state in parts]
        state = {key: torch.cat([part[key] for part in states]) for key in states[0]}
        scale, zero = self.unsettle((w.shape[0], w.shape[1]), state)
        return self.quantized(codes, scale, zero, state)

    def _checked(self, importance: Tensor, w: Tensor, name: str) -> Tensor:
        if importance.shape != w.shape[1:] or not bool((importance.isfinite() & (importance >= 0)).all()):
            raise BadInput(
                f"{name}: importance {tuple(importance.shape)} for {w.shape[1]} columns; one finite value >= 0 each"
            )
        # Columns never seen keep a little weight: a block of them would have no best scale.
        importance = importance.float()
        return (importance / importance.mean().clamp(min=1e-30)).clamp(min=1e-6)

    def _chunks(self, w: Tensor) -> list[slice]:
        step = max(1, _CHUNK.get(w.device.type, _LARGE_CHUNK) // w.shape[1])
        return [slice(start, start + step) for start in range(0, w.shape[0], step)]

    def _columns(self, w: Tensor, v: Tensor | None) -> Columns:
        size = self.scaling.group_size
        assert size is not None
        weights = None if v is None else v.expand(w.shape).reshape(-1, size).t().contiguous()
        return Columns(w.float().reshape(-1, size).t().contiguous(), weights, *self.ends)

    def _searched(self, w: Tensor, v: Tensor | None) -> tuple[Tensor, State]:
        columns = self._columns(w, v)
        scale, minimum = columns.search()
        shape = self.parameter_shape((w.shape[0], w.shape[1]))
        if self.legacy:
            found = scale.view(shape), minimum.view(shape) if self.affine else None
            settled, zero, state = self.settle(*found)
        else:
            state = self._descended(columns, scale, minimum, w.shape[0])
            settled, zero = self.unsettle((w.shape[0], w.shape[1]), state)
        level = columns.levels(settled.flatten(), None if zero is None else zero.flatten())
        return (level - self.ends[0]).to(torch.uint8).t().reshape(w.shape), state

    def _descended(self, columns: Columns, scale: Tensor, minimum: Tensor, rows: int) -> State:
        """The tensors of scales and minima after the joint descent."""
        count, limits = self.scales.count, self.scales.limits
        first = store(scale.view(-1, count), *limits)
        second = store(minimum.view(-1, count), *self.minima.limits)
        first, second = descend(columns, first, second, limits)
        state = self.scales.stored(first, rows)[1]
        return {**state, **(self.minima.stored(second, rows)[1] if self.affine else {})}

    def _reference(self, w: Tensor) -> tuple[Tensor, State]:
        """ggml's own rounding: multiply by the reciprocal, add a half, truncate; the first of equal magnitudes wins."""
        blocks = w.reshape(-1, self.block)
        low, high = torch.aminmax(blocks, dim=1, keepdim=True)
        bottom, top = self.ends
        if self.affine:
            scale, offset = (high - low) / top, 0.5
        elif self.name == "q8_0":
            scale, offset = torch.maximum(-low, high) / top, 0.0
        else:
            largest = torch.where(-low > high, low, high)
            tied = (-low == high).squeeze(1).nonzero().squeeze(1)
            first = blocks[tied].abs().argmax(dim=1, keepdim=True)
            largest[tied] = blocks[tied].gather(1, first)
            scale, offset = largest / bottom, 0.5 - bottom
        inverse = 1 / scale
        inverse = torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))
        scaled = ((blocks - low) if self.affine else blocks) * inverse
        if self.name == "q8_0":  # rounded half away from zero
            scaled.add_(scaled.new_tensor(_BELOW_HALF).copysign(scaled))
        else:
            scaled.add_(offset)
        # By way of int16, which truncates: no vector instruction takes floats to uint8.
        codes = scaled.to(torch.int16)
        if self.name == "q8_0":
            codes.sub_(int(bottom))
        codes = codes.clamp_(max=int(top - bottom)).to(torch.uint8)
        shape = self.parameter_shape((w.shape[0], w.shape[1]))
        state = {"scale": half(scale).view(shape)}
        if self.affine:
            state["minimum"] = half(-low).view(shape)
        return codes.view(w.shape), state


def _format(name: str, bits: int, size: int, block: int, scale_bits: int, affine: bool, fallback: str) -> BlockFormat:
    store = BlockScale(scale_bits, block // size, signed=not affine and scale_bits != _F16)
    return BlockFormat(
        name=name,
        grid=integer_grid(bits, signed=not affine),
        scaling=Scaling(block="group", group_size=size, minimum=affine, store=store),
        block=block,
        fallback=fallback,
    )


# name: bits, weights per scale, per block, bits of a scale, with a minimum, llama.cpp's fallback for rows of 32 n
_TYPES: dict[str, tuple[int, int, int, int, bool, str]] = {
    "q4_0": (4, 32, 32, _F16, False, ""),
    "q4_1": (4, 32, 32, _F16, True, ""),
    "q5_0": (5, 32, 32, _F16, False, ""),
    "q5_1": (5, 32, 32, _F16, True, ""),
    "q8_0": (8, 32, 32, _F16, False, ""),
    "q2_k": (2, 16, 256, 4, True, "q4_0"),
    "q3_k": (3, 16, 256, 6, False, "q4_0"),
    "q4_k": (4, 32, 256, 6, True, "q5_0"),
    "q5_k": (5, 32, 256, 6, True, "q5_1"),
    "q6_k": (6, 16, 256, 8, False, "q8_0"),
}

FORMATS: dict[str, Callable[[], Format]] = {name: partial(_format, name, *row) for name, row in _TYPES.items()}
