"""The examples that quantize a model, on the embedded one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("example") / "out"
    return out, _run("quantize_and_measure.py", "demo", str(out), "rtn")


def test_quantize_and_measure(quantized: tuple[Path, str]) -> None:
    out, printed = quantized
    assert (out / "certificate.json").is_file()
    assert "KL(original || quantized)" in printed


def test_load_in_transformers(quantized: tuple[Path, str]) -> None:
    printed = _run("load_in_transformers.py", str(quantized[0]), "The capital of France is")
    assert printed.startswith("The capital of France is")
    assert "Paris" in printed
