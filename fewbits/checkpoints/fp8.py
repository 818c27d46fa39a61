"""Fine-grained FP8, as DeepSeek publishes its models (quant_method "fp8").

    weight            float8_e4m3fn [out, in]
    weight_scale_inv  float32 [ceil(out/128), ceil(in/128)]    one scale a tile

    value = weight * weight_scale_inv

It multiplies, in spite of its name. Tiles need not be 128 wide (`weight_block_size`), nor fill the last row and column.
Scales may be E8M0 (`scale_fmt` "ue8m0"): powers of two, read as the floats they are. Who runs such a file rounds
activations to FP8 in groups of 128 of a token, and so does fewbits.

Source: transformers 5.23 (integrations/finegrained_fp8.py); DeepSeek-V3, arXiv 2412.19437, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import FLOATS, Codec, Dense, Entry, Layer, Stored, entries_with, tensor_named
from fewbits.checkpoints.words import from_e4m3, to_e4m3
from fewbits.core.errors import BadInput
from fewbits.formats import Format, parse_format
from fewbits.formats.elements import ELEMENTS
from fewbits.formats.scales import PlainScale

TILE = 128


class FP8(Codec):
    holds = "E4M3 in tiles of 128 x 128; loads in transformers, vLLM, SGLang"
    writes = True

    def claims(self, quantization: dict[str, Any]) -> bool:
        return bool(quantization.get("quant_method") == "fp8")

    def entries(self, source: Source) -> dict[str, Entry]:
        parts = ("weight", "weight_scale_inv", "activation_scale", "input_scale")
        return entries_with(source, "weight_scale_inv", parts, source.config().get("quantization_config", {}))

    def read(self, source: Source, module: str, entry: Entry) -> Stored | Dense:
        stored = tensor_named(source, f"{module}.weight", 2, torch.float8_e4m3fn)
        scale = source.tensor(f"{module}.weight_scale_inv")
        scale = scale.float() if scale.dtype == torch.float8_e8m0fnu else scale
        if scale.dtype not in FLOATS or scale.dim() > 2:
            raise BadInput(f"{module}.weight_scale_inv: {scale.dtype} {tuple(scale.shape)} are no scales of tiles")
        shape, codes = (stored.shape[0], stored.shape[1]), from_e4m3(stored)
        inputs = parse_format(f"fp8_e4m3-g{TILE}")
        static = entry.about.get("activation_scheme") == "static"
        note = "calibrated scales of activations are not used: each token has its own" if static else ""
        if scale.numel() == 1:
            format = parse_format("fp8_e4m3-tensor").with_scale_dtype(scale.dtype)
            state = {"codes": codes, "scale": scale.reshape(1, 1)}
            inputs = parse_format("fp8_e4m3-token")
            return Stored(format=format, shape=shape, state=state, activations=inputs, note=note)
        rows, columns = (_side(entry.about, index, shape[index], scale) for index in (0, 1))
        if rows != columns:
            value = stored.float() * _spread(scale.float(), rows, columns)[: shape[0], : shape[1]]
            return Dense(value=value, note=f"tiles of {rows} x {columns}: decoded in float32")
        format = parse_format("fp8_block" if rows == TILE else f"fp8_e4m3-tile{rows}").with_scale_dtype(scale.dtype)
        state = {"codes": codes, "scale": scale}
        return Stored(format=format, shape=shape, state=state, activations=inputs, note=note)

    def refuses(self, stored: Stored) -> str | None:
        format = stored.format
        tile = format.scaling.block == "tile" and format.scaling.group_size == TILE
        if format.grid != ELEMENTS["fp8_e4m3"] or not tile or not isinstance(format.scaling.store, PlainScale):
            return f"it holds E4M3 in tiles of {TILE}; this is {format.name}"
        if stored.activations is not None and stored.activations.name != f"fp8_e4m3-g{TILE}":
            return f"it rounds activations to FP8 in groups of {TILE}, not to {stored.activations.name}"
        beside = (stored.order, stored.residual, stored.outliers)
        if stored.input_hadamard or any(part is not None for part in beside):
            return "its weight is that of a transformed or reordered input, or not all in the codes"
        return None

    def nearest(self, layer: Layer) -> Format:
        return parse_format("fp8_block")

    def encode(self, stored: Stored) -> dict[str, Tensor]:
        return {"weight": to_e4m3(stored.state["codes"]), "weight_scale_inv": stored.state["scale"].float()}

    def quantization(self, layers: Mapping[str, Layer], dense: Iterable[str]) -> dict[str, Any]:
        config = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [TILE, TILE],
            "modules_to_not_convert": sorted(dense) or None,
        }
        return {"quantization_config": config}


def _side(about: dict[str, Any], index: int, size: int, scale: Tensor) -> int:
    """A tile's rows (index 0) or columns (1): as stated where the scales agree, else what fits them."""
    count = scale.shape[index] if scale.dim() == 2 else 0
    if not 0 < count <= size:
        raise BadInput(f"scales of {tuple(scale.shape)} for a side of {size}")
    stated = about.get("weight_block_size")
    side = stated[index] if isinstance(stated, list) and len(stated) == 2 else None
    return side if isinstance(side, int) and side > 0 and -(-size // side) == count else -(-size // count)


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


CODEC = FP8()
