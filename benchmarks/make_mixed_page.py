"""Writes mixed bit-rates beside uniform ones into docs/plans.md, from the newest "mixed" record.

Without a record the page stays as it is.
"""

from __future__ import annotations

import re
from typing import Any

from recorded import ROOT, latest

PAGE = ROOT / "docs" / "plans.md"


def table(record: dict[str, Any]) -> str:
    lines = [
        "| budget | uniform: bits | KL | perplexity | planned: bits | KL | perplexity | planned / uniform |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        cells = [f"{row['bits']:.1f}"]
        for name in ("uniform", "planned"):
            found = row[name]
            kl = found["kl"]
            cells += [
                f"{found['bits_per_weight']:.3f}",
                f"{kl['mean']:.4f} ± {kl['stderr']:.4f}",
                f"{found['perplexity']['mean']:.2f}",
            ]
        cells.append(f"{row['ratio']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    found = latest("mixed")
    if found is None:
        print("no 'mixed' record under benchmarks/results: docs/plans.md left as it is")
        return
    path, record = found
    source = path.relative_to(ROOT).as_posix()
    content = f"{table(record)}\n\nFrom [`{source}`](../{source}), by `python benchmarks/bench_mixed.py`."
    pattern = re.compile(r"(<!-- mixed:begin -->\n).*?(<!-- mixed:end -->)", re.DOTALL)
    old = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", old), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
