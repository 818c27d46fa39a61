"""One virtual environment a peer, so that no peer's pins meet another's or ours.

torch is installed first and alone and then held by a constraint: a peer can neither choose another version nor
pull a second build of it. A peer gets ten minutes; what it says when it fails is kept and stands in its row.
`installed.json` in the environment remembers the outcome: what is there is not installed again, what failed is
tried again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TORCH = "torch==2.13.0"
LIMIT_SECONDS = 600
STAMP = "installed.json"
_PIP = ("-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", "--no-input")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Environment:
    """requirements: what pip is asked for, after torch. no_deps: the same, without what they ask for.

    script: Python run in the environment afterwards, for what pip alone does not do; its directory is argv[1].
    """

    requirements: tuple[str, ...]
    no_deps: tuple[str, ...] = ()
    script: Path | None = None

    def spec(self) -> dict[str, Any]:
        return {"torch": TORCH, "requirements": [*self.requirements], "no_deps": [*self.no_deps]}


def install(name: str, environment: Environment, root: Path, *, index: str = "") -> dict[str, Any]:
    """The environment of `name` below `root`, made if need be.

    Returns {"python", "seconds", "error", "spec"}; error is None when it can be used.
    """
    directory, before = root / name, recorded(name, environment, root)
    if before.get("python") and not before["error"]:
        return before
    shutil.rmtree(directory, ignore_errors=True)
    started = time.monotonic()
    try:
        _install(directory, environment, index, started)
        error = None
    except subprocess.TimeoutExpired:
        error = f"not installed within {LIMIT_SECONDS // 60} minutes"
    except subprocess.CalledProcessError as failure:
        error = last_lines(failure.stderr or failure.stdout or str(failure))
    seconds = round(time.monotonic() - started, 1)
    found = {"python": str(python(directory)), "seconds": seconds, "error": error, "spec": environment.spec()}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / STAMP).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def recorded(name: str, environment: Environment, root: Path) -> dict[str, Any]:
    """What the last try to install `name` gave; empty when there was none, or it asked for something else."""
    stamp = root / name / STAMP
    found: dict[str, Any] = json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}
    return found if found.get("spec") == environment.spec() else {}


def python(directory: Path) -> Path:
    return directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def last_lines(text: str, limit: int = 400) -> str:
    """The end of an error's text on one line: the last lines say what it was."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error") or "Error:" in line]
    return " / ".join((errors or lines)[-2:])[-limit:] or "no message"


def _install(directory: Path, environment: Environment, index: str, started: float) -> None:
    def run(*command: str | Path) -> None:
        left = LIMIT_SECONDS - (time.monotonic() - started)
        if left <= 0:
            raise subprocess.TimeoutExpired(command, LIMIT_SECONDS)
        subprocess.run([*map(str, command)], check=True, timeout=left, capture_output=True, text=True, cwd=directory)

    directory.mkdir(parents=True)
    run(sys.executable, "-m", "venv", directory)
    interpreter = python(directory)
    run(interpreter, *_PIP, *(["--index-url", index] if index else []), TORCH)
    constraints = directory / "constraints.txt"
    constraints.write_text(TORCH + "\n", encoding="utf-8")
    if environment.requirements:
        run(interpreter, *_PIP, "-c", constraints, *environment.requirements)
    if environment.no_deps:
        run(interpreter, *_PIP, "--no-deps", "--no-build-isolation", *environment.no_deps)
    if environment.script:
        run(interpreter, environment.script, directory)
