"""Several formats for one linear: bits that vary within it, by groups of input channels.

    int4-asym-g64@25+int3-asym-g64      a quarter of the input channels in 4 bits, the rest in 3

Input channels differ in what an error of their weights costs, and EXL2 gives the dear ones more bits. Here the channels
of a linear are dealt into a few *parts*, the dearest into the first; each part is an ordinary quantized matrix of its
columns, and the product is a sum:

    y = sum_k  x[:, columns of k] Q_k^T                     Q_k [out, n_k]  in format k

so that every kernel, every scale store and every method serves a part as it serves a linear. Part k takes `share` per
cent of the columns, rounded to whole groups of its format, at least one and leaving one to each part behind it; the
last takes what is left. Within a part the channels stay in ascending order, so all there is to store of the order is
to which part each channel belongs: `part`, ceil(log2(parts)) bits a channel, 1/out bits per weight for two parts. (A
permutation in int32 would cost 32/out: .06 bits per weight in a linear 576 wide.)

Source: turboderp's ExLlamaV2, whose EXL2 files hold linears of several widths; it says what it stores, and nothing of
the choice was taken from it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.formats import bits as packing
from fewbits.formats.base import Format, Quantized
from fewbits.formats.parse import parse_format
from fewbits.formats.scales import Layout, State

MOST_PARTS = 4
PLACES = "part"  # the tensor that says which part a channel belongs to


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What is known of a linear of several formats before its values are.

    formats: of the parts, the dearest channels' first.  shares: per cent of the columns, of all parts but the last.
    """

    formats: tuple[Format, ...]
    shares: tuple[int, ...]

    @property
    def name(self) -> str:
        """What `parse_mix` reads."""
        shared = zip(self.formats, self.shares, strict=False)
        return "+".join([*(f"{format.name}@{share}" for format, share in shared), self.formats[-1].name])

    @property
    def main(self) -> Format:
        """The format that most columns have; the first of several."""
        shares = [*self.shares, 100 - sum(self.shares)]
        return self.formats[shares.index(max(shares))]

    @property
    def place_bits(self) -> int:
        """Bits that say to which part a channel belongs."""
        return (len(self.formats) - 1).bit_length()

    @property
    def rowwise(self) -> bool:
        """Whether each row is quantized as if it were alone; always, see `parse_mix`."""
        return True

    def with_scale_dtype(self, dtype: torch.dtype) -> Mix:
        """This mix with plain scales stored as `dtype`."""
        return Mix(formats=tuple(format.with_scale_dtype(dtype) for format in self.formats), shares=self.shares)

    def fitting(self, columns: int) -> Mix:
        """This mix; its parts have whole groups, but for the last."""
        return self

    def why_not(self, columns: int) -> str | None:
        """Why a linear of so many input channels cannot be of this mix, or None if it can."""
        widths = [format.scaling.width(1) for format in self.formats]
        if sum(widths) > columns:
            return f"its parts take {' + '.join(map(str, widths))} channels at the least, and {columns} come in"
        return None

    def columns(self, columns: int) -> tuple[int, ...]:
        """How many of so many input channels each part gets. BadInput where they are too few."""
        reason = self.why_not(columns)
        if reason is not None:
            raise BadInput(f"{self.name}: {reason}; choose smaller groups, or one format")
        found: list[int] = []
        for index, share in enumerate(self.shares):
            width = self.formats[index].scaling.width(1)
            behind = sum(format.scaling.width(1) for format in self.formats[index + 1 :])
            most = (columns - sum(found) - behind) // width
            wanted = (share * columns + 50 * width) // (100 * width)
            found.append(width * min(max(wanted, 1), most))
        return (*found, columns - sum(found))

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Name -> (shape, dtype) of the tensors `Mixed.to_state` gives for a matrix of `shape`."""
        found: Layout = {PLACES: ((packing.packed_length(shape[1], self.place_bits),), torch.uint8)}
        for index, (format, columns) in enumerate(zip(self.formats, self.columns(shape[1]), strict=True)):
            found.update({f"{index}.{name}": about for name, about in format.layout((shape[0], columns)).items()})
        return found

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Stored bits per element of a matrix of `shape`: of the parts, and which channel is in which."""
        parts = zip(self.formats, self.columns(shape[1]), strict=True)
        total = sum(format.bits_per_weight((shape[0], columns)) * shape[0] * columns for format, columns in parts)
        return (total + self.place_bits * shape[1]) / (shape[0] * shape[1])

    def check(self, w: Tensor, name: str = "weight") -> None:
        """Raises BadInput naming the tensor if `w` is no finite matrix that the parts fit."""
        self.columns(w.shape[-1])
        for format in self.formats:
            format.check(w, name)

    def places(self, w: Tensor, importance: Tensor | None = None) -> Tensor:
        """The part of each input channel of `w` [out, in], uint8 [in]: the dearest in the first, ties by number.

        Dear is channel j by importance_j ||w_:j||^2; importance: weight of each column's squared error, [in].
        """
        cost = w.double().square().sum(0)
        if importance is not None:
            cost = cost * importance.double()
        order = torch.argsort(cost, descending=True, stable=True)
        sizes = torch.tensor(self.columns(len(cost)), device=cost.device)
        part = torch.arange(len(sizes), dtype=torch.uint8, device=cost.device).repeat_interleave(sizes)
        return torch.empty_like(part).index_copy_(0, order, part)

    def quantize(self, w: Tensor, name: str = "weight", importance: Tensor | None = None) -> Mixed:
        """Round-to-nearest of `w` [out, in], each part as `Format.quantize` does it."""
        self.check(w, name)
        places = self.places(w, importance)
        columns = columns_of(places, len(self.formats))
        parts = [format.quantize(w[:, own], name) for format, own in zip(self.formats, columns, strict=True)]
        return Mixed(format=self.of(parts), places=places, parts=tuple(parts))

    def of(self, parts: Sequence[Quantized]) -> Mix:
        """This mix with its formats as `parts` have them: with the dtype of their scales."""
        return Mix(formats=tuple(part.format for part in parts), shares=self.shares)


Weights = Format | Mix  # what a linear may be quantized to


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """A matrix [out, in] of several formats. places: uint8 [in], the part of each column; parts: their columns, in
    ascending order, quantized."""

    format: Mix
    places: Tensor
    parts: tuple[Quantized, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape[0], len(self.places)

    def columns(self) -> list[Tensor]:
        """The columns of each part, int64, ascending."""
        return columns_of(self.places, len(self.parts))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values the codes stand for, [out, in], every column in its place."""
        out = torch.empty(self.shape, dtype=dtype, device=self.places.device)
        for columns, part in zip(self.columns(), self.parts, strict=True):
            out.index_copy_(1, columns, part.dequantize(dtype))
        return out

    def to_state(self) -> State:
        """Canonical storage: that of part k under names that begin with "k.", and `part`, packed."""
        state: State = {PLACES: packing.pack(self.places, self.format.place_bits)}
        for index, part in enumerate(self.parts):
            state.update({f"{index}.{name}": tensor for name, tensor in part.to_state().items()})
        return state

    @staticmethod
    def from_state(mix: Mix, shape: tuple[int, int], state: State) -> Mixed:
        """The inverse of `to_state`; raises BadInput where shapes, dtypes or the dealing of channels do not fit."""
        places, sizes = unpacked_places(mix, shape[1], state[PLACES]), mix.columns(shape[1])
        parts = tuple(
            Quantized.from_state(format, (shape[0], columns), part_state(state, index))
            for index, (format, columns) in enumerate(zip(mix.formats, sizes, strict=True))
        )
        return Mixed(format=mix.of(parts), places=places, parts=parts)


def unpacked_places(mix: Mix, columns: int, packed: Tensor) -> Tensor:
    """The part of each of so many channels, uint8; BadInput where the parts are not of the sizes `mix` gives them."""
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise BadInput(f"{PLACES} is {packed.dtype} of {packed.dim()} dimensions; a row of uint8 is expected")
    places = packing.unpack(packed, mix.place_bits, columns)
    counts = torch.bincount(places.long(), minlength=len(mix.formats)).tolist()
    if tuple(counts) != mix.columns(columns):
        raise BadInput(f"{PLACES} deals {counts} channels; {mix.name} has {list(mix.columns(columns))} of {columns}")
    return places


def columns_of(places: Tensor, parts: int) -> list[Tensor]:
    """The columns of each of so many parts, int64, ascending."""
    return [(places == index).nonzero().flatten() for index in range(parts)]


def part_state(state: State, index: int) -> State:
    """The tensors of part `index`, under the names they have in a linear of one format."""
    prefix = f"{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


_PART = re.compile(r"(?P<format>.+)@(?P<share>[0-9]{1,2})")


@cache
def parse_mix(name: str) -> Mix:
    """The mix called `name`; BadInput for one that cannot be."""
    *head, last = name.split("+")
    formats, shares = [], []
    for part in head:
        match = _PART.fullmatch(part)
        if match is None or int(match["share"]) < 1:
            raise BadInput(f"{name!r}: {part!r} has no share; a part is a format and its per cent: int4-asym-g64@25")
        formats.append(parse_format(match["format"]))
        shares.append(int(match["share"]))
    formats.append(parse_format(last))
    if not 2 <= len(formats) <= MOST_PARTS or sum(shares) >= 100:
        raise BadInput(f"{name!r}: from 2 to {MOST_PARTS} parts, the last of which takes what the others leave of 100")
    if any(before == after for before, after in itertools.pairwise(formats)):
        raise BadInput(f"{name!r}: two neighbouring parts are of one format; make them one")
    for format in formats:
        if not format.rowwise or format.scaling.static:
            raise BadInput(f"{name!r}: scales of {format.name} are shared between rows; use groups or channels")
    return Mix(formats=tuple(formats), shares=tuple(shares))


def parse_weights(name: str) -> Weights:
    """The format, or the mix of formats, called `name`."""
    return parse_mix(name) if "+" in name else parse_format(name)
