"""Who is compared with 8 bits on both sides: contestants and their scripts, in the environments of registry.py.

All of them keep the head and the embeddings as they are and quantize every linear of the blocks. Options of a peer are
what its documentation says first, and the settings of it that could lose less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.registry import HERE, OURS, Contestant

ROW = "W8A8"
SCRIPTS: dict[str, Path] = {
    OURS: HERE / "w8a8_fewbits.py",
    "llm-compressor": HERE / "w8a8_llmcompressor.py",
    "bitsandbytes": HERE / "w8a8_bitsandbytes.py",
    "torchao": HERE / "w8a8_torchao.py",
    "optimum-quanto": HERE / "w8a8_quanto.py",
}


def _contestants() -> list[Contestant]:
    found: list[Contestant] = []

    def add(peer: str, label: str, **options: Any) -> None:
        found.append(Contestant(row=ROW, peer=peer, label=label, options=options))

    def ours(label: str, method: str, scheme: str = "W8A8", act_range: str | None = None, **of_method: Any) -> None:
        ranges = {} if act_range is None else {"act_range": act_range}
        add(OURS, label, scheme=scheme, method=method, method_options=of_method, **ranges)

    for strength in (0.5, 0.8):  # the default, and that of its W8A8 example
        add("llm-compressor", f"SmoothQuant {strength}, GPTQ", rounding="gptq", strength=strength)
    add("llm-compressor", "SmoothQuant 0.8", rounding="rtn", strength=0.8)
    add("llm-compressor", "GPTQ", rounding="gptq")
    for threshold in (6.0, 2.0, 0.0):  # the default; lower; no outliers
        add("bitsandbytes", f"LLM.int8() from {threshold:g}" if threshold else "no outliers", threshold=threshold)
    for kind in ("symmetric", "asymmetric"):
        add("torchao", f"int8 dynamic, {kind}", activations=kind)
    add("optimum-quanto", "qint8, static")

    ours("rotate,gptq", "rotate,gptq")
    ours("smoothquant,gptq", "smoothquant,gptq")
    ours("smoothquant", "smoothquant")
    ours("gptq", "gptq")
    for threshold in (6.0, 2.0):
        name = f"LLM.int8() from {threshold:g}"
        ours(name, "llm_int8", threshold=threshold)
        ours(f"{name}, weights of the codes", "llm_int8", threshold=threshold, weights="dequantized")
    ours("rtn", "rtn")
    ours("static, sinks apart, rotate,gptq", "rotate,gptq", "W8A8_STATIC_SINKS", "percentile")
    return found


CONTESTANTS: tuple[Contestant, ...] = tuple(_contestants())
