"""EXL3 number by number, from its kernels' source: a trellis packed and walked in plain Python and numpy."""

from __future__ import annotations

import struct

import numpy as np
import torch
from torch import Tensor

MULTIPLIERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}


def half(bits: int) -> np.float16:
    return np.float16(struct.unpack("<e", struct.pack("<H", bits))[0])


def codeword(state: int, book: str) -> float:
    """One state, with float16 arithmetic as the instructions have it (the fused one rounds once)."""
    if book == "mul1":
        total = sum(struct.pack("<I", state * MULTIPLIERS[book] % 2**32))
        return float(np.float16(float(half(0x6400 + total)) * float(half(0x1EEE)) + float(half(0xC931))))
    word = (state * 89226354 + 64248484 if book == "3inst" else state * MULTIPLIERS[book]) % 2**32
    word = (word & 0x8FFF8FFF) ^ 0x3B603B60
    return float(half(word & 0xFFFF) + half(word >> 16))


def walk(codes: list[int], bits: int) -> list[int]:
    """The states of a tile: the path that enters as it will end."""
    state = 0
    for code in codes[-16:]:
        state = (state << bits | code) & 0xFFFF
    states = []
    for code in codes:
        state = (state << bits | code) & 0xFFFF
        states.append(state)
    return states


def packed(codes: list[int], bits: int) -> list[int]:
    """16-bit words, most significant code first, exchanged in pairs."""
    text = "".join(f"{code:0{bits}b}" for code in codes)
    words = [int(text[place : place + 16], 2) for place in range(0, len(text), 16)]
    return [words[index ^ 1] for index in range(len(words))]


def lane_values(values: list[float]) -> np.ndarray:
    """[16 input, 16 output] from the fragments of 32 lanes."""
    tile = np.zeros((16, 16))
    for lane in range(32):
        for half_of_columns in (0, 1):
            for step, row in enumerate((0, 1, 8, 9)):
                column = lane // 4 + 8 * half_of_columns
                tile[lane % 4 * 2 + row, column] = values[lane * 8 + half_of_columns * 4 + step]
    return tile


def butterflies(x: np.ndarray) -> np.ndarray:
    """Walsh-Hadamard transform of 128 along axis 0, in float64."""
    x, step = x.copy(), 1
    while step < 128:
        for low in range(128):
            if not low & step:
                a, b = x[low].copy(), x[low + step].copy()
                x[low], x[low + step] = a + b, a - b
        step *= 2
    return x / np.sqrt(128.0)


def random_linear(
    bits: int, book: str, rows: int = 128, columns: int = 256, *, old: bool = False
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Tensors of a random linear and its weight [out, in] by the definition above, float64."""
    draw = np.random.default_rng(bits)
    trellis = np.zeros((rows // 16, columns // 16, 16 * bits), dtype=np.uint16)
    inner = np.zeros((rows, columns))
    for i in range(rows // 16):
        for j in range(columns // 16):
            codes = [int(code) for code in draw.integers(0, 1 << bits, 256)]
            trellis[i, j] = packed(codes, bits)
            values = [codeword(state, book) for state in walk(codes, bits)]
            inner[16 * i : 16 * i + 16, 16 * j : 16 * j + 16] = lane_values(values)
    tensors = {"m.trellis": torch.from_numpy(trellis.view(np.int16))}
    scales = {}
    for name, count in (("su", rows), ("sv", columns)):
        minus = draw.integers(0, 2, count)
        if old:
            words = [sum(int(bit) << place for place, bit in enumerate(part)) for part in minus.reshape(-1, 16)]
            tensors[f"m.{name}"] = torch.from_numpy(np.array(words, dtype=np.uint16).view(np.int16))
            scales[name] = 1.0 - 2.0 * minus
        else:
            scale = ((1.0 - 2.0 * minus) * draw.uniform(0.01, 2.0, count)).astype(np.float16)
            tensors[f"m.{name}h"] = torch.from_numpy(scale)
            scales[name] = scale.astype(np.float64)
    if book in MULTIPLIERS:
        number = np.array(MULTIPLIERS[book], dtype=np.uint32).view(np.int32)
        tensors[f"m.{book}"] = torch.from_numpy(number.copy())
    inner = np.concatenate([butterflies(part) for part in np.split(inner, rows // 128)])
    inner = np.concatenate([butterflies(part.T).T for part in np.split(inner, columns // 128, axis=1)], axis=1)
    return tensors, (scales["su"][:, None] * inner * scales["sv"]).T
