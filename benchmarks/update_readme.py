"""Writes the measured table and the figure's link into README.md, between their markers.

Reads the newest "demo" record under benchmarks/results; without one the README stays as it is.
`--check` writes nothing and exits 1 if the README is not what the record gives.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from recorded import ROOT, between, latest

from fewbits.cli.demo import COLUMNS, cells
from fewbits.core.units import duration_text

README = ROOT / "README.md"
FIGURE = Path("docs/images/demo.svg")


def table(record: dict[str, Any], source: str) -> str:
    """The record's rows as Markdown, with what is needed to judge them below."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += [f"| {' | '.join(cells(row))} |" for row in record["rows"]]
    environment, took = record["environment"], record["seconds"]["quantize GPTQ"]
    lines += [
        "",
        f"Weights in `{record['format']}` ({record['scheme']}); GPTQ took {duration_text(took)}. "
        f"{environment['cpu']}, {environment['cores']} cores, torch {environment['versions']['torch']}, "
        f"{environment['date'][:10]}; batch 1. KL in nats per token over {record['text']['tokens']} tokens of "
        "text that calibration never saw, ± one standard error. Bits per weight of the quantized layers; "
        "the size includes the embeddings, which stay in 16 bits. "
        f"From [`{source}`]({source}), by `make bench`.",
    ]
    return "\n".join(lines)


def main() -> None:
    found = latest("demo")
    if found is None:
        print("no 'demo' record under benchmarks/results: README.md left as it is")
        return
    path, record = found
    old = README.read_text(encoding="utf-8")
    new = between(old, "table", table(record, path.relative_to(ROOT).as_posix()))
    if (ROOT / FIGURE).is_file():
        new = between(new, "figure", f"![What 4 bits cost and give]({FIGURE.as_posix()})")
    if "--check" in sys.argv[1:]:
        raise SystemExit("README.md is out of date: make docs" if new != old else 0)
    README.write_text(new, encoding="utf-8")
    print(f"README.md from {path.name}")


if __name__ == "__main__":
    main()
