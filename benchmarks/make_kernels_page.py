"""Writes what `fewbits bench kernels` measured into docs/kernels.md and draws docs/images/kernels.svg.

Reads the newest "kernels" and "kernel formats" records under benchmarks/results. A record comes from the machine with
the GPU, by `fewbits bench kernels --out FILE`, and is added by

    python benchmarks/make_kernels_page.py [--add "kernels" FILE --measured COMMIT]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recorded import ROOT, latest, save, source_line, write_between

from fewbits.report.kernel_speed import accuracy_table, draw, table

PAGE = ROOT / "docs" / "kernels.md"
FIGURE = ROOT / "docs" / "images" / "kernels"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def add(name: str, file: Path, measured: str) -> None:
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    record["environment"]["device"] = "-".join(record["device"].lower().split())
    save(name, record, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs=2, metavar=("NAME", "FILE"))
    parser.add_argument("--measured", default="", help="the commit that was measured")
    given = parser.parse_args()
    if given.add:
        add(given.add[0], Path(given.add[1]), given.measured)
    contents: dict[str, str] = {}
    for name in ("kernels", "kernel formats"):
        found = latest(name)
        if found is None:
            continue
        path, record = found
        device = f"{record['device']}, read bandwidth {record['bandwidth'] / 1e12:.2f} TB/s, microseconds."
        command = record["environment"]["command"]
        text = f"{device} {source_line(path)[:-1]}, by `{command}`.\n\n{markdown(*table(record))}"
        key = name.replace(" ", "-")
        contents[key] = text
        contents[f"{key}-accuracy"] = markdown(*accuracy_table(record))
        if name == "kernels":
            draw(record, FIGURE)
            if given.add is None:
                FIGURE.with_suffix(".png").unlink()
    if contents:
        write_between(PAGE, **contents)


if __name__ == "__main__":
    main()
