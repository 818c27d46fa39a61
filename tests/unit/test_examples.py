"""The example that needs no model runs, and the others are listed where they are run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_formats_example() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "formats.py"], capture_output=True, text=True, check=True
    )
    rows = {line.split()[0]: float(line.split()[-1]) for line in done.stdout.splitlines()[1:]}
    assert rows["int8-channel"] > rows["int4-asym-g64"] > rows["int3-g64"] > rows["int2-g64"]


def test_every_example_is_run_by_a_test() -> None:
    tested = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_examples*.py"))
    assert all(path.name in tested for path in (ROOT / "examples").glob("*.py"))
