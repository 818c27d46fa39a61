"""How ggml_quantize.json was made: squared error of ggml's own quantizers, with and without importances.

    python tests/golden/make_ggml_quantize.py libggml-base.so > tests/golden/ggml_quantize.json

The library was built from the llama.cpp sources inside llama-cpp-python 0.3.36 (ggml-quants.c and ggml.c).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

import gguf
import numpy as np

TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


def matrices() -> dict[str, np.ndarray]:
    """The weights, [128, 1024] each; the same everywhere."""
    rng = np.random.default_rng(0)
    shape = (128, 1024)
    return {
        "gaussian": rng.standard_normal(shape).astype(np.float32),
        "student-t": rng.standard_t(4, shape).astype(np.float32),
        "uniform": (rng.random(shape) - 0.3).astype(np.float32),
    }


def importances() -> np.ndarray:
    return (10 * np.random.default_rng(1).random(1024) ** 3).astype(np.float32)


def sqnr(w: np.ndarray, decoded: np.ndarray, importance: np.ndarray) -> float:
    """Signal to noise in dB, columns weighted."""
    exact, found = w.astype(np.float64), decoded.astype(np.float64)
    return float(10 * np.log10((importance * exact**2).sum() / (importance * (found - exact) ** 2).sum()))


def main() -> None:
    library = ctypes.CDLL(sys.argv[1], mode=os.RTLD_LAZY)  # of which only the quantizers are needed
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    found: dict[str, dict[str, list[float]]] = {}
    for what, w in matrices().items():
        for name in TYPES:
            kind = gguf.GGMLQuantizationType[name.upper()]
            packed = np.zeros((len(w), gguf.quant_shape_to_byte_shape(w.shape, kind)[1]), dtype=np.uint8)
            row = []
            for importance in (None, importances()):
                pointer = None if importance is None else importance.ctypes.data
                quantize(int(kind), w.ctypes.data, packed.ctypes.data, 0, *w.shape, pointer)
                weights = np.ones(w.shape[1]) if importance is None else importance
                row.append(round(sqnr(w, gguf.quants.dequantize(packed, kind), weights), 3))
            found.setdefault(name, {})[what] = row
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
