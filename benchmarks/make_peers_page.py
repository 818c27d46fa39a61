"""Writes the comparison with other projects into docs/comparison.md and draws docs/images/peers.svg.

Reads the newest "peers" record under benchmarks/results; without one the page stays as it is.
"""

from __future__ import annotations

from peers.page import draw, page
from recorded import ROOT, latest, source_line, write_between

from fewbits.report.figure import save

PAGE = ROOT / "docs" / "comparison.md"
FIGURE = ROOT / "docs" / "images" / "peers"


def main() -> None:
    found = latest("peers")
    if found is None:
        print("no 'peers' record under benchmarks/results: docs/comparison.md left as it is")
        return
    path, record = found
    write_between(PAGE, peers=f"{page(record)} {source_line(path, 'bench_peers.py')}")
    save(FIGURE, lambda figure, wide: draw(record, figure, wide), 4.6, kinds=["svg"])


if __name__ == "__main__":
    main()
