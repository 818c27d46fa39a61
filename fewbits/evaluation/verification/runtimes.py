"""What each runtime reads: checkpoint formats, widths, dtypes, and whether it fuses and splits linears.

Fusing: vLLM computes q, k, v as one linear and gate, up as another, so the parts must be of one kind; splitting them
over devices cuts rows or columns, which must not cut a group of weights that share a scale. Sources: the loaders and
quantization folders of transformers 5.23, vLLM 0.2x, llama.cpp and mlx-lm 0.2x.
"""

from __future__ import annotations

import dataclasses

DENSE, GGUF = "dense", "gguf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """formats: checkpoint format -> the package it needs besides the runtime, or "".  bits: widths of packed
    integers, by checkpoint format, where not all are read.  dtypes: of what is not quantized."""

    name: str
    formats: dict[str, str]
    bits: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    fuses: bool = False
    splits: bool = False
    orders: bool = True  # GPTQ's g_idx


RUNTIMES = {
    "transformers": Runtime(
        name="transformers",
        formats={
            DENSE: "",
            "native": "fewbits",
            "compressed-tensors": "compressed-tensors",
            "gptq": "gptqmodel",
            "gptq_v2": "gptqmodel",
            "awq": "gptqmodel",
            "bitsandbytes": "bitsandbytes",
            "fp8": "",
            "mxfp4": "",
            "hqq": "hqq",
            GGUF: "gguf",
        },
    ),
    "vllm": Runtime(
        name="vllm",
        formats=dict.fromkeys(
            (DENSE, "compressed-tensors", "gptq", "gptq_v2", "awq", "bitsandbytes", "fp8", "modelopt", "mxfp4"), ""
        ),
        bits={"compressed-tensors": (4, 8), "gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8)},
        fuses=True,
        splits=True,
    ),
    "llama.cpp": Runtime(name="llama.cpp", formats={GGUF: ""}),
    "mlx": Runtime(
        name="mlx",
        formats=dict.fromkeys((DENSE, "mlx", "awq", "gptq", "compressed-tensors", "modelopt"), ""),
        bits={"awq": (4,), "gptq": (4,), "compressed-tensors": (4,)},
        orders=False,
    ),
}
