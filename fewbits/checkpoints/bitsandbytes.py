"""bitsandbytes checkpoints, as transformers saves them: NF4 and FP4 in blocks, and LLM.int8().

4 bits (load_in_4bit):
    weight                       uint8 [out*in/2, 1]    two codes a byte, the first one high, row after row
    weight.absmax                float32 [blocks], or uint8 where the scales are quantized again
    weight.quant_map             float32 [16]           the levels
    weight.nested_absmax, weight.nested_quant_map       ranges of 256 scales each, and the 256 levels
    weight.quant_state.bitsandbytes__nf4 | __fp4        JSON in uint8: shape, blocksize, dtype, nested_offset, ...

    value = quant_map[code] * absmax          absmax = nested_quant_map[a] * nested_absmax[i // 256] + nested_offset

8 bits (load_in_8bit):  weight int8 [out, in],  SCB float32 [out],  value = weight * SCB / 127.

Blocks run over the flattened matrix. Where the block size divides a row they are our groups and codes and scales are
kept; where a block reaches into the next row the weight is decoded, in float32. The quotient SCB / 127 is rounded once
to float32, in another place than bitsandbytes rounds it: int8 values agree to the last bit but one. FP4's code 8 is
minus zero and becomes zero. LLM.int8() also rounds activations and spares outliers; here activations stay as they are.

Source: bitsandbytes 0.50 (functional.py, nn/modules.py); Dettmers et al. 2023, arXiv 2305.14314.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source, parse_json
from fewbits.checkpoints.codecs import Codec, Dense, Entry, Layer, Stored, modules_with, tensor_named
from fewbits.checkpoints.words import inverse, nibbles, translate
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, parse_format
from fewbits.formats.elements import ELEMENTS
from fewbits.formats.scales import DoubleScale, PlainScale

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
MAX_STATE = 1 << 12  # bytes of JSON; a few hundred are usual
NESTED = 256
_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_MAPS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *_STATES)

# FP4: sign, then three bits whose magnitudes are 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4; our codes follow the value.
_FP4_ORDER = (0, 1, 6, 7, 4, 5, 2, 3)
_FP4 = tuple(7 - _FP4_ORDER[code % 8] if code >= 8 else 7 + _FP4_ORDER[code] for code in range(16))
_NF4 = tuple(range(16))
_CODES = {"nf4": _NF4, "fp4": _FP4}
_ELEMENTS = {"nf4": "nf4", "fp4": "fp4_bnb"}


class BitsAndBytes(Codec):
    holds = "NF4 and FP4, nested scales or not; int8 is read; loads in transformers"
    writes = True

    def claims(self, quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")

    def entries(self, source: Source) -> dict[str, Entry]:
        names = source.names()
        present, found = set(names), {}
        for state in _STATES:
            for module in modules_with(names, f"weight.{state}"):
                parts = (name for part in _MAPS if (name := f"{module}.weight.{part}") in present)
                found[module] = Entry(tensor=f"{module}.weight", parts=(f"{module}.weight", *parts), about=state)
        for module in modules_with(names, "SCB"):
            parts = (name for part in ("weight", "SCB", "weight_format") if (name := f"{module}.{part}") in present)
            found[module] = Entry(tensor=f"{module}.weight", parts=tuple(parts))
        return found

    def read(self, source: Source, module: str, entry: Entry) -> Stored | Dense:
        if entry.about is None:
            return _int8(source, module)
        kind = entry.about[-3:]
        state = _state(tensor_named(source, f"{module}.weight.{entry.about}", 1, torch.uint8), kind)
        (rows, columns), size = state["shape"], state["blocksize"]
        raw = source.tensor(f"{module}.weight").contiguous().reshape(-1).view(torch.uint8)
        blocks = -(-rows * columns // size)
        if len(raw) != -(-rows * columns // 2):
            raise BadInput(f"{module}.weight holds {2 * len(raw)} codes; its quant_state says {rows} x {columns}")
        scale, nested = _scales(source, module, state, blocks)
        levels = tensor_named(source, f"{module}.weight.quant_map", 1, torch.float32)
        ours = ELEMENTS[_ELEMENTS[kind]].value(torch.tensor(_CODES[kind]))
        if columns % size or not torch.equal(levels, ours) or (nested is None and scale is None):
            return _decode(source, module, raw, levels, state, blocks)
        name = f"{_ELEMENTS[kind]}-g{size}"
        codes = translate(raw, nibbles(_CODES[kind], swap=True)).view(rows, columns // 2)
        if nested is None:
            assert scale is not None
            stored = {"codes": codes, "scale": scale.view(rows, columns // size)}
            return Stored(format=parse_format(name), shape=(rows, columns), state=stored)
        stored = {"codes": codes, **nested, "scale": nested["scale"].view(rows, columns // size)}
        return Stored(format=parse_format(f"{name}-dq"), shape=(rows, columns), state=stored)

    def refuses(self, stored: Stored) -> str | None:
        format, (_, columns) = stored.format, stored.shape
        size = format.scaling.group_size
        if format.grid not in (ELEMENTS["nf4"], ELEMENTS["fp4_bnb"]) or format.fit:
            return f"bitsandbytes holds NF4 and its own FP4; this is {format.name}"
        if size not in BLOCK_SIZES or columns % size:
            return f"bitsandbytes has blocks of 32 to 4096 that divide a row of {columns}; this is {format.name}"
        if not isinstance(format.scaling.store, (PlainScale, DoubleScale)):
            return f"bitsandbytes stores float32 scales or nested ones; this is {format.name}"
        if not stored.plain:
            return "bitsandbytes has no quantized, transformed or reordered activations and no residuals in 4 bits"
        return None

    def nearest(self, layer: Layer) -> Format:
        size = next((size for size in (64, 128, 32) if layer.shape[1] % size == 0), None)
        if size is None:
            raise Unsupported(f"no block of 32 or more divides the input dimension {layer.shape[1]}")
        return parse_format(f"nf4-g{size}")

    def encode(self, stored: Stored) -> dict[str, Tensor]:
        format, state = stored.format, stored.state
        kind = "nf4" if format.grid is ELEMENTS["nf4"] else "fp4"
        codes = translate(state["codes"], nibbles(inverse(_CODES[kind]), swap=True))
        about: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": format.scaling.group_size,
            "dtype": "bfloat16",
            "shape": list(stored.shape),
        }
        tensors = {
            "weight": codes.reshape(-1, 1),
            "weight.quant_map": format.grid.value(torch.tensor(_CODES[kind])),
        }
        if format.nested:
            offset = float(state["scale_mean"])
            about |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
            tensors |= {
                "weight.absmax": state["scale"].reshape(-1),
                "weight.nested_absmax": state["scale_range"],
                "weight.nested_quant_map": _dynamic(),
            }
        else:
            tensors["weight.absmax"] = state["scale"].float().reshape(-1)
        text = json.dumps(about).encode()
        return {
            **tensors,
            f"weight.quant_state.bitsandbytes__{kind}": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        }

    def quantization(self, layers: Mapping[str, Layer], dense: Iterable[str]) -> dict[str, Any]:
        formats = [layer.format for layer in layers.values()]
        kinds = {"nf4" if format.grid is ELEMENTS["nf4"] else "fp4" for format in formats}
        config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": kinds.pop() if len(kinds) == 1 else "nf4",
            "bnb_4bit_use_double_quant": any(format.nested for format in formats),
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(dense) or None,
        }
        return {"quantization_config": config}


def _dynamic() -> Tensor:
    return torch.tensor(ELEMENTS["dynamic8"].levels, dtype=torch.float64).float()


def _state(raw: Tensor, kind: str) -> dict[str, Any]:
    """The JSON of a quant_state, checked."""
    if len(raw) > MAX_STATE:
        raise BadInput(f"a quant_state of {len(raw)} bytes; at most {MAX_STATE} are allowed")
    state = parse_json(raw.numpy().tobytes(), "quant_state")
    shape, size = state.get("shape"), state.get("blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)):
        raise BadInput(f"quant_state: shape {str(shape)[:80]}; [out, in] is expected")
    if size not in BLOCK_SIZES or state.get("quant_type") != kind:
        raise BadInput(f"quant_state: blocksize {size!r}, quant_type {state.get('quant_type')!r}")
    offset = state.get("nested_offset", 0.0)
    if not isinstance(offset, (int, float)) or not math.isfinite(offset):
        raise BadInput(f"quant_state: nested_offset {offset!r} is no finite number")
    return state


def _scales(
    source: Source, module: str, state: dict[str, Any], blocks: int
) -> tuple[Tensor | None, dict[str, Tensor] | None]:
    """(plain scales, or None; the state of nested ones as `DoubleScale` has it, or None)."""
    scale = tensor_named(source, f"{module}.weight.absmax", 1, torch.float32, torch.uint8)
    if len(scale) != blocks:
        raise BadInput(f"{module}.weight.absmax has {len(scale)} scales for {blocks} blocks")
    if scale.dtype == torch.float32:
        return scale, None
    ranges = tensor_named(source, f"{module}.weight.nested_absmax", 1, torch.float32)
    levels = tensor_named(source, f"{module}.weight.nested_quant_map", 1, torch.float32)
    size = state.get("nested_blocksize")
    if type(size) is not int or size < 1 or len(ranges) != -(-blocks // size) or len(levels) != 256:
        raise BadInput(f"{module}: {len(ranges)} ranges of {size!r} scales, {len(levels)} levels for {blocks} scales")
    if size != NESTED or not torch.equal(levels, _dynamic()):
        return None, None
    mean = torch.tensor([state.get("nested_offset", 0.0)], dtype=torch.float32)
    return None, {"scale": scale, "scale_range": ranges, "scale_mean": mean}


def _decode(source: Source, module: str, raw: Tensor, levels: Tensor, state: dict[str, Any], blocks: int) -> Dense:
    if len(levels) != 16:
        raise BadInput(f"{module}.weight.quant_map has {len(levels)} levels; 16 are expected")
    (rows, columns), size = state["shape"], state["blocksize"]
    scale = source.tensor(f"{module}.weight.absmax")
    if scale.dtype == torch.uint8:
        nested = source.tensor(f"{module}.weight.nested_quant_map")
        if not bool(nested.isfinite().all()):
            raise BadInput(f"{module}.weight.nested_quant_map is not finite: the checkpoint is damaged")
        nested = nested[scale.int()]
        ranges = source.tensor(f"{module}.weight.nested_absmax").repeat_interleave(state["nested_blocksize"])[:blocks]
        scale = nested * ranges + state.get("nested_offset", 0.0)
    if not bool(levels.isfinite().all() and scale.isfinite().all()):
        raise BadInput(f"{module}: its levels or scales are not finite: the checkpoint is damaged")
    codes = torch.stack([raw >> 4, raw & 15], dim=1).flatten()[: rows * columns]
    value = levels[codes.int()] * scale.repeat_interleave(size)[: rows * columns]
    return Dense(
        value=value.view(rows, columns), note="blocks that reach over rows, or levels of their own: decoded in float32"
    )


def _int8(source: Source, module: str) -> Stored:
    weight = tensor_named(source, f"{module}.weight", 2, torch.int8)
    absmax = tensor_named(source, f"{module}.SCB", 1, torch.float32)
    if len(absmax) != len(weight):
        raise BadInput(f"{module}.SCB has {len(absmax)} scales for {len(weight)} rows")
    state = {"codes": weight.view(torch.uint8) ^ 128, "scale": (absmax / 127).view(-1, 1)}
    note = "LLM.int8(): weights as in the file, activations are not rounded"
    return Stored(format=parse_format("int8-channel"), shape=(weight.shape[0], weight.shape[1]), state=state, note=note)


CODEC = BitsAndBytes()
