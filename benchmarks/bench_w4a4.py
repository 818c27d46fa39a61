"""What rounding weights and activations costs the embedded model, and how much of it the methods bring back.

Every setting is quantized by `fewbits.quantize` and measured on held-out text while it is; `lost` is the rise of the
negative log-likelihood, paired token by token. `recovered` is the share of what rounding W4A4 (INT4, groups of 128
weights, one scale a token) to nearest loses. Recorded under benchmarks/results as "w4a4"; rows that an earlier run left
in --resume are not measured again.

    python benchmarks/bench_w4a4.py [--resume rows.json] [--only W4A4:rtn]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from certified import certified, outcome
from recorded import save

from fewbits.core.record import environment, write_json

BASELINE = "W4A4:rtn"
SEARCHED = "fp4_fit-g128/fp4_e2m1-token"
SETTINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("W4A4", "rtn", {}),
    ("FP4_W4A4", "rtn", {}),
    ("FP4_W4A4", "llm_fp4", {}),
    ("W4A4", "rotate,gptq", {}),
    ("W4A16", "rtn", {}),
    ("fp4_e2m1-g128", "rtn", {}),
    ("W4A8", "rtn", {}),
    ("FP4_W4A8", "rtn", {}),
    ("FP4_W4A4", "rotate,gptq", {}),
    ("FP4_W4A8", "llm_fp4", {}),
    ("MXFP4", "rtn", {}),
    ("MXFP4", "gptq", {}),
    ("MXFP4", "rotate,gptq", {"rotate.block": 32}),
    ("NVFP4", "rtn", {}),
    ("NVFP4", "gptq", {}),
    ("NVFP4_4OVER6", "gptq", {}),
    ("FP8_BLOCK", "rtn", {}),
    (SEARCHED, "llm_fp4", {}),
]
CALIBRATION, EVALUATION = 8, 6  # windows of 512 tokens


def label(scheme: str, method: str) -> str:
    return f"{scheme}:{method}"


def measure(scheme: str, method: str, options: dict[str, Any]) -> dict[str, Any]:
    certificate = certified(
        "demo", scheme, method=method, method_options=options, samples=CALIBRATION, eval_samples=EVALUATION
    )
    return {
        "scheme": scheme,
        "method": method,
        "options": options,
        "weights": certificate["scheme"]["weights"],
        "activations": certificate["scheme"]["activations"],
        **outcome(certificate, "lost"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--only", action="append")
    given = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if given.resume and given.resume.exists():
        rows = json.loads(given.resume.read_text(encoding="utf-8"))
    for scheme, method, options in SETTINGS:
        key = label(scheme, method)
        if key in rows or (given.only and key not in given.only):
            continue
        rows[key] = measure(scheme, method, options)
        if given.resume:
            write_json(given.resume, rows)
        tell(key, rows)
    print(save("w4a4", {"environment": environment(), "rows": list(rows.values()), "baseline": BASELINE}))


def tell(key: str, rows: dict[str, dict[str, Any]]) -> None:
    row = rows[key]
    lost, kl = row["lost"], row["kl"]
    text = f"{key:40} {row['bits_per_weight']:.2f} bits  lost {lost['mean']:.4f} ± {lost['stderr']:.4f}  "
    text += f"KL {kl['mean']:.4f} ± {kl['stderr']:.4f}  perplexity {row['perplexity']['mean']:.2f}"
    if BASELINE in rows:
        text += f"  recovered {100 * (1 - lost['mean'] / rows[BASELINE]['lost']['mean']):.1f} %"
    print(f"{text}  {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
