"""Writes the comparison with other projects into docs/comparison.md and draws docs/images/peers.svg.

Reads the newest "peers" record under benchmarks/results; without one the page stays as it is.
"""

from __future__ import annotations

import re

from peers.page import draw, page
from recorded import ROOT, latest

from fewbits.report.figure import save

PAGE = ROOT / "docs" / "comparison.md"
FIGURE = ROOT / "docs" / "images" / "peers"


def main() -> None:
    found = latest("peers")
    if found is None:
        print("no 'peers' record under benchmarks/results: docs/comparison.md left as it is")
        return
    path, record = found
    source = path.relative_to(ROOT).as_posix()
    content = f"{page(record)} From [`{source}`](../{source}), by `python benchmarks/bench_peers.py`."
    pattern = re.compile(r"(<!-- peers:begin -->\n).*?(<!-- peers:end -->)", re.DOTALL)
    old = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", old), encoding="utf-8")
    save(FIGURE, lambda figure, wide: draw(record, figure, wide), 4.6)
    FIGURE.with_suffix(".png").unlink()
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
