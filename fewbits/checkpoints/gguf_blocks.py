"""GGUF tensor types, decoded by vectorised torch.

Block types hold 32 or 256 consecutive weights of a row: integers of a few bits, one or two fp16 scales, and in
the K types small integer scales of sub-blocks (formats/kquant.py; their bytes are in gguf_pack.py). I-quants name
vectors of a list instead (gguf_iquants.py); they are read, not written. The order of the
floating-point operations is that of ggml's reference decoder, so values agree bit for bit. Temporaries are a
few times the size of the output, so a large tensor is decoded in pieces.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from fewbits.checkpoints import gguf_iquants
from fewbits.checkpoints.gguf_iquants import DECODERS
from fewbits.checkpoints.gguf_pack import from_blocks
from fewbits.core.errors import Unsupported
from fewbits.formats import parse_format

CHUNK_BLOCKS = 1 << 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockType:
    """A ggml tensor type: `values` weights in `nbytes` bytes. format: of a quantized type we can read.

    dtype: of the decoded tensor; that of the values themselves where `values` is 1.
    """

    name: str
    values: int
    nbytes: int
    dtype: torch.dtype = torch.float32
    format: str | None = None

    @property
    def readable(self) -> bool:
        return self.values == 1 or self.format is not None or self.name in DECODERS


TYPES: dict[int, BlockType] = {
    0: BlockType(name="F32", values=1, nbytes=4),
    1: BlockType(name="F16", values=1, nbytes=2, dtype=torch.float16),
    2: BlockType(name="Q4_0", values=32, nbytes=18, format="q4_0"),
    3: BlockType(name="Q4_1", values=32, nbytes=20, format="q4_1"),
    6: BlockType(name="Q5_0", values=32, nbytes=22, format="q5_0"),
    7: BlockType(name="Q5_1", values=32, nbytes=24, format="q5_1"),
    8: BlockType(name="Q8_0", values=32, nbytes=34, format="q8_0"),
    10: BlockType(name="Q2_K", values=256, nbytes=84, format="q2_k"),
    11: BlockType(name="Q3_K", values=256, nbytes=110, format="q3_k"),
    12: BlockType(name="Q4_K", values=256, nbytes=144, format="q4_k"),
    13: BlockType(name="Q5_K", values=256, nbytes=176, format="q5_k"),
    14: BlockType(name="Q6_K", values=256, nbytes=210, format="q6_k"),
    16: BlockType(name="IQ2_XXS", values=256, nbytes=66),
    17: BlockType(name="IQ2_XS", values=256, nbytes=74),
    18: BlockType(name="IQ3_XXS", values=256, nbytes=98),
    19: BlockType(name="IQ1_S", values=256, nbytes=50),
    20: BlockType(name="IQ4_NL", values=32, nbytes=18, format="iq4_nl"),
    21: BlockType(name="IQ3_S", values=256, nbytes=110),
    22: BlockType(name="IQ2_S", values=256, nbytes=82),
    23: BlockType(name="IQ4_XS", values=256, nbytes=136),
    29: BlockType(name="IQ1_M", values=256, nbytes=56),
    30: BlockType(name="BF16", values=1, nbytes=2, dtype=torch.bfloat16),
    34: BlockType(name="TQ1_0", values=256, nbytes=54, format="tq1_0"),
    35: BlockType(name="TQ2_0", values=256, nbytes=66, format="tq2_0"),
    39: BlockType(name="MXFP4", values=32, nbytes=17, format="mxfp4"),
    40: BlockType(name="NVFP4", values=64, nbytes=36),  # its tensors' scales are tensors of their own: not read
}


def readable() -> list[str]:
    """Names of the types `decode` can read."""
    return [kind.name for kind in TYPES.values() if kind.readable]


def decode(raw: Tensor, kind: BlockType, shape: tuple[int, ...]) -> Tensor:
    """Bytes (uint8, flat, whole blocks) of type `kind` -> dense tensor of `shape` and `kind.dtype`.

    Raises Unsupported for a type that cannot be decoded.
    """
    if kind.values == 1:
        return raw.view(kind.dtype).reshape(shape)
    if not kind.readable:
        raise Unsupported(f"GGUF type {kind.name} cannot be decoded; fewbits reads {', '.join(readable())}")
    blocks = raw.reshape(-1, kind.nbytes)
    out = torch.empty(len(blocks), kind.values, dtype=kind.dtype)
    for start in range(0, len(blocks), CHUNK_BLOCKS):
        piece = slice(start, start + CHUNK_BLOCKS)
        if kind.format is None:
            out[piece] = gguf_iquants.decode(kind.name, blocks[piece])
        else:
            out[piece] = from_blocks(parse_format(kind.format), blocks[piece]).dequantize()
    return out.reshape(shape)
