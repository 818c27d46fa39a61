"""What each runtime reads: checkpoint formats, widths, dtypes, and whether it fuses and splits linears.

Fusing: vLLM computes q, k, v as one linear and gate, up as another, so the parts must be of one kind; splitting them
over devices cuts rows or columns, which must not cut a group of weights that share a scale. mlx-lm reads GPTQ,
compressed-tensors and ModelOpt of a few families only, whose loaders translate the names (DeepSeek V3, Kimi K3,
Mistral 4); of the others it reads AWQ, gpt-oss's MXFP4 and its own. Sources: the loaders and quantization folders of
transformers 5.23, vLLM 0.33, llama.cpp and mlx-lm 0.32; for mlx-lm also by running it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fewbits.checkpoints.codecs import Layer
from fewbits.evaluation.verification import admission

DENSE, GGUF = "dense", "gguf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """formats: checkpoint format -> the package it needs besides the runtime, or "".  bits: widths of packed
    integers, by checkpoint format, where not all are read.  dtypes: of what is not quantized.  admits: (checkpoint
    format, its settings, layer) -> why there is no kernel for it, or None."""

    name: str
    formats: dict[str, str]
    bits: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    fuses: bool = False
    splits: bool = False
    flat_rope: bool = False  # reads rope_theta at the top of config.json, of most families
    admits: Callable[[str, dict[str, Any], Layer], admission.Refusal | None] | None = None


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
        formats=dict.fromkeys((DENSE, "compressed-tensors", "gptq", "gptq_v2", "awq", "fp8", "modelopt", "mxfp4"), ""),
        fuses=True,
        splits=True,
        admits=admission.vllm,
    ),
    "llama.cpp": Runtime(name="llama.cpp", formats={GGUF: ""}),
    "mlx": Runtime(
        name="mlx",
        formats=dict.fromkeys((DENSE, "mlx", "awq", "mxfp4"), ""),
        bits={"awq": (4,)},
        flat_rope=True,
        admits=admission.mlx,
    ),
}
