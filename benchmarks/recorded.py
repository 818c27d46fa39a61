"""Where results live: `benchmarks/results/<device>_<yyyymm>_<commit>.json`, one file a machine and commit.

A file maps the name of a benchmark to its record; every record holds `environment` (machine, versions, date,
command). A record from a tree with uncommitted changes says so in the commit's name.
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


def save(benchmark: str, record: dict[str, Any]) -> Path:
    """Adds `record` to this machine's and commit's file."""
    month = datetime.datetime.now(datetime.UTC).strftime("%Y%m")
    path = RESULTS / f"{device_name()}_{month}_{commit()}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    existing = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, {**existing, benchmark: record})
    return path


def latest(benchmark: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest record of `benchmark` by the date in its environment, and its file."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        record = content.get(benchmark) if isinstance(content, dict) else None
        if isinstance(record, dict) and "environment" in record:
            found.append((record["environment"]["date"], path, record))
    if not found:
        return None
    _, path, record = max(found, key=lambda item: item[0])
    return path, record
