"""EXL3 checkpoints of exllamav3 (quant_method "exl3"): read, decoded to float32.

    trellis    int16 [in/16, out/16, 16 K]   K = 1 to 8 bits a weight, in tiles of 16 x 16
    suh, svh   float16 [in], [out]           signs with the scales of channels
    su, sv     int16 [in/16], [out/16]       in old files, signs alone: bit i of a word is that of channel i, 1 is minus
    mcg, mul1  int32, one number             says which code book; neither means "3inst"

A weight has no code of its own. The 256 K bits of a tile are a ring; weight t of the tile is named by the 16 bits of
the ring that end with its own K, so that neighbours share 16 - K bits (a trellis, walked tail-biting) and each weight
takes a value out of 2**16 for the price of K bits. What the 16 bits stand for is computed, not looked up:

    3inst, mcg   x = (a s + b) mod 2**32 then (x & 0x8fff8fff) ^ 0x3b603b60, which fixes exponents;
                 the sum of its two halves as float16 numbers: about Gaussian
    mul1         the sum of the four bytes of a s mod 2**32, centred and scaled: about Gaussian too

The ring's first bit is the most significant of the first of its 16-bit words, and the words lie swapped in pairs.
Tiles are in the order in which a tensor core wants them: weights 8 l to 8 l + 7 are, for lane l, rows
2 (l mod 4) + (0, 1, 8, 9) of column l / 4 and of column l / 4 + 8, a row being an input channel.

    weight [in, out] = diag(suh) H tiles H diag(svh)

with Sylvester's Hadamard matrix of 128 along both sides, in blocks. Dimensions that 128 does not divide were filled up
with zeros; they are cut to what config.json asks for. exllamav3 transforms activations instead and rounds them to
float16; here the transforms of the weight are in float32 and nothing else is rounded. There is nothing to run its
kernels on where the tests run: the layout is checked against a second reading of their source, not against them.

Source: exllamav3 1.4 (exllamav3_ext/quant/codebook.cuh, exl3_dq.cuh, pack.cu, reconstruct.cu; modules/quant/exl3.py);
QTIP, Tseng et al. 2024, arXiv 2406.11235.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import Codec, Dense, Entry, modules_with, tensor_named
from fewbits.core.errors import BadInput, FewbitsError, Unsupported
from fewbits.formats import hadamard
from fewbits.models.skeleton import skeleton
from fewbits.models.topology import find_topology

TILE, BLOCK = 16, 128
_PARTS = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1")
# code book -> (a, b) of a s + b
BOOKS = {"3inst": (89226354, 64248484), "mcg": (0xCBAC1FED, 0), "mul1": (0x83DCD12D, 0)}
_KEPT, _FIXED = 0x8FFF8FFF, 0x3B603B60
_SIZES = ("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size")
_NOTE = "EXL3: decoded in float32; exllamav3 transforms activations instead, in float16"


class EXL3(Codec):
    holds = "1 to 8 bits a weight by trellis codes, decoded to float32; loads in exllamav3, TabbyAPI"

    def claims(self, quantization: dict[str, Any]) -> bool:
        return bool(quantization.get("quant_method") == "exl3")

    def entries(self, source: Source) -> dict[str, Entry]:
        names, shapes = source.names(), _shapes(source)
        present, stated = set(names), source.config().get("quantization_config", {}).get("codebook")
        return {
            module: Entry(
                tensor=f"{module}.weight",
                parts=tuple(name for part in _PARTS if (name := f"{module}.{part}") in present),
                about=(shapes.get(module), stated),
            )
            for module in modules_with(names, "trellis")
        }

    def read(self, source: Source, module: str, entry: Entry) -> Dense:
        trellis = tensor_named(source, f"{module}.trellis", 3, torch.int16)
        rows, columns, width = trellis.shape
        if width % TILE or not 1 <= width // TILE <= 8:
            raise BadInput(f"{module}.trellis: tiles of {width} words; 16 to 128, by sixteens, are 1 to 8 bits")
        if not rows * columns or rows * TILE % BLOCK or columns * TILE % BLOCK:
            raise BadInput(f"{module}.trellis: {rows} x {columns} tiles are no whole blocks of {BLOCK}")
        before = _scales(source, module, entry, "su", rows * TILE)
        after = _scales(source, module, entry, "sv", columns * TILE)
        shape = entry.about[0] or (columns * TILE, rows * TILE)
        if (columns * TILE, rows * TILE) != tuple(-(-size // BLOCK) * BLOCK for size in shape):
            raise BadInput(f"{module}: {columns * TILE} x {rows * TILE} weights; config.json asks for {shape}")
        book, value = _book(source, module, entry), torch.empty(shape)
        for start in range(0, shape[1], BLOCK):  # a block of input channels at a time, which bounds the temporaries
            tiles = _tiles(trellis[start // TILE : (start + BLOCK) // TILE], book)
            block = hadamard.transform(hadamard.transform(tiles, (BLOCK,)).t(), (BLOCK,))
            block = block * after[:, None] * before[start : start + BLOCK]
            value[:, start : start + BLOCK] = block[: shape[0], : shape[1] - start]
        return Dense(value=value, note=_NOTE)


def _tiles(trellis: Tensor, book: str) -> Tensor:
    """Values [16 R, 16 C] of int16 trellis [R, C, 16 K], float32."""
    rows, columns, width = trellis.shape
    bits = width // TILE
    words = trellis.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).int() & 0xFFFF
    start = (_order() + 1) * bits - 16
    word, shift = start % (width * 16) // 16, 16 - start % 16
    both = words[..., word] << 16 | words[..., (word + 1) % width]
    states = (both >> shift.int()) & 0xFFFF  # the sign that >> brings in is cut off: shift is at most 16
    values = _values(book)[states]
    return values.view(rows, columns, TILE, TILE).transpose(1, 2).reshape(rows * TILE, columns * TILE)


@cache
def _order() -> Tensor:
    """Place on the ring of each weight of a tile, row by row: int64 [256]."""
    lane, which = torch.arange(32)[:, None], torch.arange(8)[None]
    row = lane % 4 * 2 + which % 2 + which // 2 % 2 * 8
    column = lane // 4 + which // 4 * 8
    return (row * TILE + column).flatten().argsort()


@cache
def _values(book: str) -> Tensor:
    """What each of the 2**16 states stands for, float32 [65536]; rounded to float16 once, as the kernels do."""
    factor, added = BOOKS[book]
    x = (torch.arange(1 << 16) * factor + added) & 0xFFFFFFFF
    if book == "mul1":
        total = sum((x >> shift) & 0xFF for shift in (0, 8, 16, 24)) + 0x6400  # as float16: 1024 and the sum
        number, scale, bias = (_half(torch.as_tensor(bits)) for bits in (total, 0x1EEE, 0xC931))
        return (number * scale + bias).half().float()
    x = (x & _KEPT) ^ _FIXED
    return (_half(x & 0xFFFF) + _half(x >> 16)).half().float()


def _half(bits: Tensor) -> Tensor:
    """Bits of float16 as float32: sums and products of two are exact there."""
    return bits.to(torch.int32).to(torch.uint16).view(torch.float16).float()


def _book(source: Source, module: str, entry: Entry) -> str:
    named = [book for book in ("mcg", "mul1") if f"{module}.{book}" in entry.parts]
    if len(named) == 2:
        raise BadInput(f"{module}: names two code books, mcg and mul1: the checkpoint is damaged")
    for book in named:
        stated = source.tensor(f"{module}.{book}")
        if stated.dtype not in (torch.int32, torch.uint32) or stated.numel() != 1:
            raise BadInput(f"{module}.{book}: {stated.dtype} {tuple(stated.shape)}; one 32-bit number is expected")
        factor = int(stated.reshape(-1).view(torch.int32)) & 0xFFFFFFFF
        if factor != BOOKS[book][0]:
            raise Unsupported(f"{module}: a code book with the factor {factor:#x}; {book} has {BOOKS[book][0]:#x}")
        return book
    if entry.about[1] in ("mcg", "mul1"):
        raise BadInput(f"{module} has no {entry.about[1]}, the code book that config.json states: a tensor is missing")
    return "3inst"


def _scales(source: Source, module: str, entry: Entry, name: str, count: int) -> Tensor:
    """suh or svh [count], float32; of old files, which have signs alone, +-1."""
    if f"{module}.{name}h" in entry.parts:
        scale = tensor_named(source, f"{module}.{name}h", 1, torch.float16).float()
    else:
        words = tensor_named(source, f"{module}.{name}", 1, torch.int16).int()
        scale = 1.0 - 2.0 * ((words[:, None] >> torch.arange(16)) & 1).flatten().float()
    if len(scale) != count:
        raise BadInput(f"{module}: {len(scale)} scales of {name} for {count} channels")
    return scale


def _shapes(source: Source) -> dict[str, tuple[int, int]]:
    """(out, in) of the model's linears by their names on disk; empty where nothing can have been filled up."""
    config = source.config()
    if not _may_be_filled_up(config) and not _may_be_filled_up(config.get("text_config")):
        return {}
    try:
        model, topology = skeleton(config), find_topology(config)
    except FewbitsError:
        return {}  # whoever builds the model says what is wrong with it
    to_disk = topology.disk_name if topology else (lambda name: name)
    return {
        to_disk(name): (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def _may_be_filled_up(config: Any) -> bool:
    """Whether a dimension of some linear may not be whole blocks; heads of 128 make whole blocks."""
    if not isinstance(config, dict):
        return False
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    head = config.get("head_dim") or (
        hidden / heads if isinstance(hidden, int) and isinstance(heads, int) and heads else 0
    )
    return any(isinstance(size, int | float) and size % BLOCK for size in (head, *map(config.get, _SIZES)))


CODEC = EXL3()
