"""What 8 bits on both sides cost as outliers grow: perplexity over fp32, naive and with what was invented against it.

The embedded model has hardly any outlier channels, so they are injected (`algorithms/inject.py`): six channels of every
norm's output made 10, 30 and 100 times larger, the same function. Every setting is quantized by `fewbits.quantize`,
weights rounded to nearest with one scale a row, and measured on held-out text while it is; `lost` is the rise of the
negative log-likelihood, paired token by token, and perplexity grows by exp(lost) - 1. Recorded under benchmarks/results
as "w8a8"; rows that an earlier run left in --resume are not measured again.

    python benchmarks/bench_w8a8.py [--resume rows.json] [--only 1:token] [--seconds 280]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certified import certified, outcome
from recorded import save

from fewbits.core.record import environment, write_json

FACTORS = (1, 10, 30, 100)
CALIBRATION = 4  # windows of 512 tokens
EVALUATION = {1: 8}  # at other factors 2: what happens there is larger


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Something to measure, `everywhere` at each factor or at 1 alone."""

    name: str
    scheme: str = "W8A8"
    method: str = "rtn"
    options: dict[str, Any] = field(default_factory=dict)
    act_range: str | None = None
    everywhere: bool = False


# SmoothQuant where norms and values are; what down_proj reads, whose large values move about, is rotated as it runs.
ONLINE = {"rotate.residual": False, "rotate.values": False, "rotate.online": True}
SETTINGS = [
    Setting(name="token", everywhere=True),
    Setting(name="llm_int8", method="llm_int8", everywhere=True),
    Setting(name="smoothquant", method="smoothquant", everywhere=True),
    Setting(name="rotate", method="rotate", everywhere=True),
    Setting(name="static", scheme="W8A8_STATIC", act_range="absmax", everywhere=True),
    Setting(
        name="static smoothquant, sinks apart", scheme="W8A8_STATIC_SINKS", method="smoothquant", act_range="absmax",
        everywhere=True,
    ),
    Setting(
        name="static smoothquant, sinks apart, mse", scheme="W8A8_STATIC_SINKS", method="smoothquant", act_range="mse",
    ),
    Setting(name="static, sinks apart", scheme="W8A8_STATIC_SINKS", act_range="absmax"),
    Setting(name="static smoothquant", scheme="W8A8_STATIC", method="smoothquant", act_range="absmax"),
    Setting(name="llm_int8 at 2", method="llm_int8", options={"threshold": 2.0}),
    Setting(name="rotate, gptq", method="rotate,gptq"),
    Setting(name="smoothquant, down_proj rotated", method="rotate,smoothquant", options=ONLINE),
    Setting(
        name="static smoothquant, down_proj rotated, sinks apart", scheme="W8A8_STATIC_SINKS",
        method="rotate,smoothquant", options=ONLINE, act_range="percentile",
    ),
    Setting(name="llm_int8 fixed", method="llm_int8", options={"fixed": True}),
    Setting(name="llm_int8 dequantized", method="llm_int8", options={"weights": "dequantized"}),
    Setting(name="smoothquant alpha 0.5", method="smoothquant", options={"alpha": 0.5}),
    Setting(name="smoothquant, gptq", method="smoothquant,gptq"),
    Setting(name="groups", scheme="int8-g32/int8-g32"),
    Setting(name="static sinks mse", scheme="W8A8_STATIC_SINKS", act_range="mse"),
    Setting(name="static sinks percentile", scheme="W8A8_STATIC_SINKS", act_range="percentile"),
    Setting(name="static sinks kl", scheme="W8A8_STATIC_SINKS", act_range="kl"),
    Setting(name="static sinks tf_enhanced", scheme="W8A8_STATIC_SINKS", act_range="tf_enhanced"),
    Setting(name="static sinks moving_average", scheme="W8A8_STATIC_SINKS", act_range="moving_average"),
]  # fmt: skip


def measure(setting: Setting, factor: int, windows: int | None = None) -> dict[str, Any]:
    method, options = setting.method, dict(setting.options)
    if factor != 1:
        method, options = f"inject,{method}", {**options, "inject.factor": float(factor)}
    ranges = {} if setting.act_range is None else {"act_range": setting.act_range}
    certificate = certified(
        "demo", setting.scheme, method=method, method_options=options, samples=CALIBRATION,
        eval_samples=windows or EVALUATION.get(factor, 2), **ranges,
    )  # fmt: skip
    return {
        "name": setting.name,
        "factor": factor,
        "scheme": setting.scheme,
        "method": method,
        "options": options,
        "act_range": setting.act_range,
        "weights": certificate["scheme"]["weights"],
        "activations": certificate["scheme"]["activations"],
        **outcome(certificate, "lost"),
    }


def rise(row: dict[str, Any]) -> tuple[float, float]:
    """Perplexity over fp32, and its standard error, both as shares."""
    lost = row["lost"]
    ratio = math.exp(lost["mean"])
    return ratio - 1, ratio * lost["stderr"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--only", action="append")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so many; needs --resume")
    parser.add_argument("--windows", type=int, help="of 512 tokens to measure on")
    parser.add_argument("--record", action="store_true", help="record the rows of --resume, measure nothing")
    given = parser.parse_args()
    started = time.monotonic()
    rows: dict[str, dict[str, Any]] = {}
    if given.resume and given.resume.exists():
        rows = json.loads(given.resume.read_text(encoding="utf-8"))
    wanted = [(setting, factor) for setting in SETTINGS for factor in (FACTORS if setting.everywhere else (1,))]
    for setting, factor in [] if given.record else wanted:
        key = f"{factor}:{setting.name}"
        if key in rows or (given.only and key not in given.only):
            continue
        if time.monotonic() - started > given.seconds:
            raise SystemExit(f"{len(wanted) - len(rows)} rows are left: run again with the same --resume")
        rows[key] = measure(setting, factor, given.windows)
        if given.resume:
            write_json(given.resume, rows)
        share, error = rise(rows[key])
        print(f"{key:40} {100 * share:+8.2f} % ± {100 * error:.2f}  {rows[key]['seconds']:.0f} s", flush=True)
    print(save("w8a8", {"environment": environment(), "rows": list(rows.values())}))


if __name__ == "__main__":
    main()
