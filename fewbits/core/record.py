"""A number never travels without machine, versions, date and command.

`environment()` describes where a figure came from; `write_json` and `atomic_path` put results on disk
under a temporary name and rename them, so a reader never meets half a file.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PACKAGES = ("fewbits", "torch", "transformers", "safetensors", "tokenizers", "numpy")


def now() -> str:
    """The current time, UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions(packages: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Installed versions of `packages` (absent ones left out), with Python's own."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command() -> str:
    """The command line of this process; of absolute paths the last part alone.

    It goes into model cards and certificates. Where a file lay on this machine helps nobody elsewhere, and may tell who
    somebody is.
    """
    program = Path(sys.argv[0] or "python")
    # `python -m fewbits` runs fewbits/__main__.py
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *map(_without_directories, sys.argv[1:])])


def _without_directories(argument: str) -> str:
    """`/home/me/llama` is `llama`, `NAME=/home/me/text.txt` is `NAME=text.txt`; anything else stays."""
    before, equals, value = argument.rpartition("=")
    path = Path(value)
    return before + equals + path.name if path.is_absolute() and path.name and " " not in value else argument


def environment() -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement."""
    return {
        "date": now(),
        "command": command(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "versions": versions(),
    }


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`, flushed and renamed to it on success, removed on failure."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
