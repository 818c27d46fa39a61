"""Writes mixed bit-rates beside uniform ones into docs/plans.md, from the newest "mixed" record.

Without a record the page stays as it is.
"""

from __future__ import annotations

from typing import Any

from recorded import ROOT, latest, source_line, write_between

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
    write_between(PAGE, mixed=f"{table(record)}\n\n{source_line(path, 'bench_mixed.py')}")


if __name__ == "__main__":
    main()
