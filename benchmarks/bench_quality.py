"""What GPTQ recovers of what rounding to nearest loses, on the embedded model.

KL to the float32 original on held-out built-in text, for the settings in `SETTINGS`, both methods from one
command; recorded under benchmarks/results as "quality". Another composition is measured alone and recorded under its
own name, as "quality-gptq,learned".

    python benchmarks/bench_quality.py [--only W4A16_ASYM:64] [--method gptq,learned]
"""

from __future__ import annotations

import argparse
from typing import Any

from certified import certified, outcome
from recorded import save

from fewbits.core.record import environment

SETTINGS = [("W4A16_ASYM", 64), ("W4A16", 64), ("W3A16_ASYM", 64), ("nf4-g64", None)]
EVAL_SAMPLES = 16


def measure(scheme: str, group_size: int | None, method: str) -> dict[str, Any]:
    certificate = certified("demo", scheme, group_size=group_size, method=method, eval_samples=EVAL_SAMPLES)
    return {
        "scheme": scheme,
        "format": certificate["scheme"]["weights"],
        "method": method,
        **outcome(certificate),
    }


def show(row: dict[str, Any]) -> None:
    kl, perplexity, top1 = row["kl"], row["perplexity"]["mean"], row["top1"]["mean"]
    print(
        f"{row['format']:16} {row['method']:5} {row['bits_per_weight']:.2f} bits  "
        f"KL {kl['mean']:.4f} ± {kl['stderr']:.4f}  perplexity {perplexity:.2f}  top-1 {top1:.3f}  "
        f"{row['seconds']:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one setting, SCHEME:GROUP")
    parser.add_argument("--method", help="a composition in place of rtn and gptq")
    options = parser.parse_args()
    rows = []
    for scheme, group_size in SETTINGS:
        if options.only and options.only != f"{scheme}:{group_size}":
            continue
        if options.method:
            rows.append(measure(scheme, group_size, options.method))
            show(rows[-1])
            continue
        pair = [measure(scheme, group_size, method) for method in ("rtn", "gptq")]
        ratio = pair[1]["kl"]["mean"] / pair[0]["kl"]["mean"]
        rows += [pair[0], {**pair[1], "kl_over_rtn": ratio}]
        for row in pair:
            show(row)
        print(f"{'':22} GPTQ / RTN = {ratio:.3f}", flush=True)
    name = f"quality-{options.method}" if options.method else "quality"
    print(save(name, {"environment": environment(), "rows": rows}))


if __name__ == "__main__":
    main()
