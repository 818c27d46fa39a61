"""Where results live, and how they come into a page.

`benchmarks/results/<device>_<yyyymm>_<commit>.json` is one file a machine and commit. It maps the name of a benchmark
to its record; every record holds `environment` (machine, versions, date, command). A record from a tree with
uncommitted changes says so in the commit's name.

A page keeps what was generated between two comments, `<!-- name:begin -->` and `<!-- name:end -->`, each on its line.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from pathlib import Path
from typing import Any

from fewbits.core.record import cpu_model, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def device_name() -> str:
    """The accelerator, else the processor, as a file name takes it."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_model()
    name = re.sub(r"\((R|TM)\)|\bCPU\b|@.*|Processor|\d+-Core", "", name)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit of this tree, with '-dirty' when it holds more than the commit."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def save(benchmark: str, record: dict[str, Any], measured: str | None = None) -> Path:
    """Adds `record` to the file of its machine and of the commit that was `measured`, by default this one.

    `environment` may name the `device`; without it, it is this machine's.
    """
    month = datetime.datetime.now(datetime.UTC).strftime("%Y%m")
    device = record["environment"].get("device") or device_name()
    path = RESULTS / f"{device}_{month}_{measured or commit()}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    existing = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**existing, benchmark: record})
    return path


def every(benchmark: str) -> list[tuple[Path, dict[str, Any]]]:
    """All records of `benchmark` with their files, the newest by the date in its environment first."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        record = content.get(benchmark) if isinstance(content, dict) else None
        if isinstance(record, dict) and "environment" in record:
            found.append((record["environment"]["date"], path, record))
    return [(path, record) for _, path, record in sorted(found, key=lambda item: item[0], reverse=True)]


def latest(benchmark: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest record of `benchmark` and its file."""
    return next(iter(every(benchmark)), None)


def between(page: str, name: str, content: str) -> str:
    """The text `page` with the lines `content` between its marks called `name`; ValueError where it has none."""
    marked = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
    if not marked.search(page):
        raise ValueError(f"no marks '{name}:begin' and '{name}:end'")
    lines = f"{content.rstrip()}\n" if content else ""
    return marked.sub(lambda match: match[1] + lines + match[2], page)


def write_between(page: Path, **contents: str) -> None:
    """Writes each of `contents` between the marks of its name in the file `page`."""
    text = page.read_text(encoding="utf-8")
    for name, content in contents.items():
        text = between(text, name, content)
    page.write_text(text, encoding="utf-8")
    print(page.relative_to(ROOT))


def source_line(path: Path, script: str = "") -> str:
    """For a page under docs: where its figures are from."""
    source = path.relative_to(ROOT).as_posix()
    return f"From [`{source}`](../{source})" + (f", by `python benchmarks/{script}`." if script else ".")
