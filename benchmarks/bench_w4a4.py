"""What rounding weights and activations costs the embedded model, and how much of it the methods bring back.

How it is measured is in rows.py. What a method brings back is the share of what rounding W4A4 (INT4, groups of 128
weights, one scale a token) to nearest loses. Recorded under benchmarks/results as "w4a4".

    python benchmarks/bench_w4a4.py [--resume rows.json] [--only W4A4:rtn] [--windows 8] [--device cuda --jobs 8]
"""

from __future__ import annotations

from typing import Any

import rows

BLOCKS = {"rotate.block": 32}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("W4A4", "rtn", {}),
    ("W4A4", "rotate,gptq", {}),
    ("FP4_W4A4", "rtn", {}),
    ("FP4_W4A4", "llm_fp4", {}),
    ("W4A16", "rtn", {}),
    ("fp4_e2m1-g128", "rtn", {}),
    ("W4A8", "rtn", {}),
    ("FP4_W4A8", "rtn", {}),
    ("FP4_W4A8", "llm_fp4", {}),
    ("fp4_fit-g128/fp4_e2m1-token", "llm_fp4", {}),
    ("FP4_W4A4", "embeddings,llm_fp4", {}),
    ("FP4_W4A4", "preshift,gptq", {}),
    ("FP4_W4A4", "rotate,gptq", {}),
    ("W4A8", "rotate,gptq", {}),
    ("MXFP4", "rtn", {}),
    ("MXFP4", "gptq", {}),
    ("MXFP4", "rotate,gptq", BLOCKS),
    ("MXFP4", "rotate,gptq", {}),
    ("NVFP4", "rtn", {}),
    ("NVFP4", "gptq", {}),
    ("NVFP4", "rotate,gptq", {"rotate.block": 16}),
    ("NVFP4_4OVER6", "rtn", {}),
    ("NVFP4_4OVER6", "gptq", {}),
    ("FP8_BLOCK", "rtn", {}),
]


def key(scheme: str, method: str, options: dict[str, Any]) -> str:
    return ":".join([scheme, method, *(f"{name}={value}" for name, value in options.items())])


SETTINGS = [rows.Setting(key=key(*case), scheme=case[0], method=case[1], options=case[2]) for case in CASES]


def tell(row: rows.Row) -> str:
    lost, kl = row["lost"], row["kl"]
    found = "  ".join(
        f"{name} {each['mean']:.4f} ± {each['stderr'] or 0:.4f}" for name, each in (("lost", lost), ("KL", kl))
    )
    return f"{row['bits_per_weight']:.2f} bits  {found}  perplexity {row['perplexity']['mean']:.2f}"


if __name__ == "__main__":
    rows.run("w4a4", SETTINGS, rows.arguments(__doc__).parse_args(), tell)
