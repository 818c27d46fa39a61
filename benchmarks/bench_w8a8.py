"""What 8 bits on both sides cost as outliers grow: perplexity over fp32, naive and with what was invented against it.

The embedded model has hardly any outlier channels, so they are injected (`algorithms/inject.py`): six channels of every
norm's output made 10, 30 and 100 times larger, the same function. Weights are rounded to nearest with one scale a row
unless a setting says otherwise; how it is measured is in rows.py. Recorded under benchmarks/results as "w8a8".

    python benchmarks/bench_w8a8.py [--resume rows.json] [--only 1:token] [--windows 8] [--device cuda --jobs 8]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import rows

FACTORS = (1, 10, 30, 100)
# SmoothQuant where norms and values are; what down_proj reads, whose large values move about, is rotated as it runs.
ONLINE = {"rotate.residual": False, "rotate.values": False, "rotate.online": True}
STATIC = "W8A8_STATIC_SINKS"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to measure, `everywhere` at each factor or at 1 alone."""

    name: str
    scheme: str = "W8A8"
    method: str = "rtn"
    options: dict[str, Any] = field(default_factory=dict)
    act_range: str | None = None
    everywhere: bool = False

    def at(self, factor: int) -> rows.Setting:
        method, options = self.method, dict(self.options)
        if factor != 1:
            method, options = f"inject,{method}", {**options, "inject.factor": float(factor)}
        return rows.Setting(
            key=f"{factor}:{self.name}", scheme=self.scheme, method=method, options=options, act_range=self.act_range,
            more={"name": self.name, "factor": factor},
        )  # fmt: skip


CASES = [
    Case(name="token", everywhere=True),
    Case(name="llm_int8", method="llm_int8", everywhere=True),
    Case(name="llm_int8 at 2", method="llm_int8", options={"threshold": 2.0}, everywhere=True),
    Case(name="smoothquant", method="smoothquant", everywhere=True),
    Case(
        name="smoothquant, down_proj rotated", method="rotate,smoothquant", options=ONLINE, everywhere=True,
    ),
    Case(name="rotate", method="rotate", everywhere=True),
    Case(name="static", scheme="W8A8_STATIC", act_range="absmax", everywhere=True),
    Case(
        name="static smoothquant, down_proj rotated, sinks apart", scheme=STATIC, method="rotate,smoothquant",
        options=ONLINE, act_range="percentile", everywhere=True,
    ),
    Case(name="rotate, gptq", method="rotate,gptq"),
    Case(name="smoothquant, down_proj rotated, gptq", method="rotate,smoothquant,gptq", options=ONLINE),
    Case(name="weights alone", scheme="W8A16"),
    Case(name="groups of 32", scheme="int8-g32/int8-g32"),
    Case(name="groups of 32, rotated", scheme="int8-g32/int8-g32", method="rotate"),
    Case(
        name="static smoothquant, sinks apart", scheme=STATIC, method="smoothquant", act_range="absmax",
    ),
    Case(
        name="static smoothquant, sinks apart, percentile", scheme=STATIC, method="smoothquant", act_range="percentile",
    ),
    Case(
        name="static smoothquant, sinks apart, mse", scheme=STATIC, method="smoothquant", act_range="mse",
    ),
    Case(name="static rotate, sinks apart", scheme=STATIC, method="rotate", act_range="percentile"),
    Case(name="static rotate, gptq, sinks apart", scheme=STATIC, method="rotate,gptq", act_range="percentile"),
    Case(name="smoothquant behind norms alone", method="smoothquant", options={"products": False}),
    Case(name="llm_int8 at 4", method="llm_int8", options={"threshold": 4.0}),
    Case(name="llm_int8 at 1", method="llm_int8", options={"threshold": 1.0}),
    Case(name="llm_int8 fixed", method="llm_int8", options={"fixed": True}),
    Case(name="llm_int8 fixed at 2", method="llm_int8", options={"fixed": True, "threshold": 2.0}),
    Case(name="llm_int8 dequantized", method="llm_int8", options={"weights": "dequantized"}),
    Case(name="gptq", method="gptq"),
    Case(name="smoothquant, gptq", method="smoothquant,gptq"),
    Case(name="smoothquant alpha 0.5", method="smoothquant", options={"alpha": 0.5}),
    Case(name="down_proj rotated", method="rotate", options=ONLINE),
    Case(name="groups of 64", scheme="int8-g64/int8-g64"),
    Case(name="static smoothquant", scheme="W8A8_STATIC", method="smoothquant", act_range="absmax"),
    Case(name="static, sinks apart", scheme=STATIC, act_range="absmax"),
    Case(name="static, sinks apart, mse", scheme=STATIC, act_range="mse"),
    Case(name="static, sinks apart, percentile", scheme=STATIC, act_range="percentile"),
    Case(name="static, sinks apart, tf_enhanced", scheme=STATIC, act_range="tf_enhanced"),
    Case(name="static, sinks apart, moving_average", scheme=STATIC, act_range="moving_average"),
    Case(name="static, sinks apart, kl", scheme=STATIC, act_range="kl"),
]  # fmt: skip
# What the bars of accuracy ask for first, then the figure, then the rest.
FIRST = [case.at(1) for case in CASES[:18]]
SETTINGS = [
    *FIRST,
    *(case.at(factor) for factor in reversed(FACTORS[1:]) for case in CASES if case.everywhere),
    *(case.at(1) for case in CASES[18:]),
]


def tell(row: rows.Row) -> str:
    share, error = rows.rise(row)
    kl = row["kl"]
    return f"{100 * share:+8.2f} % ± {100 * error:.2f}  KL {kl['mean']:.4f} ± {kl['stderr'] or 0:.4f}"


if __name__ == "__main__":
    rows.run("w8a8", SETTINGS, rows.arguments(__doc__).parse_args(), tell)
