"""llama.cpp's quantizers with an importance matrix, through the prebuilt library in the wheel `xllamacpp`.

`llama-quantize` is in no wheel, but what it calls for each tensor is: ggml_quantize_chunk(type, weights, imatrix).
The importance of a column is the mean of the squared inputs it multiplies, as `llama-imatrix` collects it, here with
a hook on each linear while the calibration windows run through transformers. Every linear gets the type asked for,
or, where its rows are no whole number of blocks of 256, the type `llama-quantize` falls back to. The mixes called
_S, _M and _L, which give some tensors more bits than the name says, are left out.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch
from contract import Job, finish, job, linears, load
from torch import nn

TYPES = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "IQ4_NL": 20}
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0"}  # llama-quant.cpp, tensor_type_fallback
_ROWS = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class Traits(ctypes.Structure):
    """ggml_type_traits of ggml.h, up to the function that decodes."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", _ROWS),
    )


def library() -> ctypes.CDLL:
    folder = Path(str(importlib.util.find_spec("xllamacpp").submodule_search_locations[0]))
    found = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    found.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    return found


def importance(work: Job, model: nn.Module) -> dict[str, torch.Tensor]:
    """Mean of the squared inputs of every linear, by column."""
    sums = {name: torch.zeros(module.in_features, dtype=torch.float64) for name, module in linears(model).items()}

    def watch(name: str, module: nn.Linear) -> None:
        def add(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sums[name] += inputs[0].reshape(-1, module.in_features).double().square().sum(dim=0)

        module.register_forward_pre_hook(add)

    for name, module in linears(model).items():
        watch(name, module)
    with torch.inference_mode():
        for window in work.ids.split(4):
            model(input_ids=window, use_cache=False)
    return {name: (total / work.ids.numel()).float().contiguous() for name, total in sums.items()}


def round_trip(ggml: ctypes.CDLL, name: str, weight: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`weight` [out, in] through ggml's type `name`: (decoded, bytes stored)."""
    traits = ggml.ggml_get_type_traits(TYPES[name]).contents
    rows, width = weight.shape
    packed = torch.empty(rows * width // traits.block * traits.block_bytes, dtype=torch.uint8)
    written = ggml.ggml_quantize_chunk(
        TYPES[name], weight.data_ptr(), packed.data_ptr(), 0, rows, width, columns.data_ptr()
    )
    assert written == packed.numel(), (written, packed.numel())
    decoded = torch.empty_like(weight)
    traits.to_float(packed.data_ptr(), decoded.data_ptr(), weight.numel())
    return decoded, written


def main() -> None:
    ggml, wanted = library(), None
    with job() as work:
        wanted = str(work.options["type"])
        model = load(work)
        columns = importance(work, model)
        decoded, used, stored = {}, {}, 0
        for name, module in linears(model).items():
            chosen = FALLBACK[wanted] if module.in_features % 256 and wanted in FALLBACK else wanted
            weight = module.weight.detach().contiguous()
            decoded[f"{name}.weight"], size = round_trip(ggml, chosen, weight, columns[name])
            used[chosen] = used.get(chosen, 0) + weight.numel()
            stored += size
    total = sum(used.values())
    shares = ", ".join(f"{100 * count / total:.0f} % {name}" for name, count in used.items())
    if len(used) > 1:
        work.notes.append(f"rows that are no multiple of 256 fall back: {shares}")
    finish(work, decoded, {"blocks": 8.0 * stored}, ["xllamacpp", "transformers"], f"{wanted} with imatrix: {shares}")


if __name__ == "__main__":
    main()
