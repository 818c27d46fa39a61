"""The quantized matrices of a GGUF file as `Stored`, so that they convert like those of any checkpoint.

Legacy types are plain integers in groups of 32 with fp16 scales (and minima), and are read as such: Q4_0 is
`int4-g32`, Q5_0 `int5-g32`, Q8_0 `int8-g32`, Q4_1 `int4-min-g32`, Q5_1 `int5-min-g32`. So other checkpoint formats
can hold them without another rounding, and writing them back gives the same bytes. (Scales may be negative.)
K-quants, IQ4_NL, MXFP4 and the ternary types are formats of their own. I-quants come dense, as `GGUFSource` decodes
them.
"""

from __future__ import annotations

from typing import Any

import torch

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import Codec, Entry, QuantizedModules, Stored
from fewbits.checkpoints.gguf_export import packed_modules
from fewbits.checkpoints.gguf_source import GGUFSource
from fewbits.formats import parse_format

NAME = "gguf"
_PLAIN = {
    "q4_0": "int4-g32",
    "q5_0": "int5-g32",
    "q8_0": "int8-g32",
    "q4_1": "int4-min-g32",
    "q5_1": "int5-min-g32",
}


class GGUFCodec(Codec):
    """Reads only: files are written whole, by gguf_export.py."""

    def claims(self, quantization: dict[str, Any]) -> bool:
        return False

    def entries(self, source: Source) -> dict[str, Entry]:
        assert isinstance(source, GGUFSource)
        return {
            module: Entry(tensor=f"{module}.weight", parts=(f"{module}.weight",), about=packed)
            for module, packed in packed_modules(source).items()
        }

    def read(self, source: Source, module: str, entry: Entry) -> Stored:
        weight = entry.about.read()
        name = _PLAIN.get(weight.format.name)
        format = weight.format if name is None else parse_format(name).with_scale_dtype(torch.float16)
        return Stored(format=format, shape=weight.shape, state=weight.to_state())


def gguf_modules(source: GGUFSource) -> QuantizedModules:
    """What `source` has quantized."""
    return QuantizedModules(source, NAME, GGUFCodec())
