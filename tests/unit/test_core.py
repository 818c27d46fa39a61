"""core: errors that help, lazy registries, units, records that are whole or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewbits.core import record
from fewbits.core.errors import BadInput, FewbitsError, MissingExtra, Unsupported, nearest_first, unknown
from fewbits.core.progress import Progress
from fewbits.core.registry import Registry
from fewbits.core.units import bytes_text, duration_text


def test_exit_codes_follow_who_can_mend_it() -> None:
    assert FewbitsError("x").exit_code == 1
    assert BadInput("x").exit_code == Unsupported("x").exit_code == MissingExtra("a", "b", "c").exit_code == 2


def test_errors_are_also_what_callers_expect_to_catch() -> None:
    assert isinstance(BadInput("x"), ValueError)
    assert isinstance(MissingExtra("matplotlib", "report", "the report"), ImportError)


def test_missing_extra_names_package_and_extra() -> None:
    error = MissingExtra("matplotlib", "report", "the report")
    assert str(error) == "the report needs the package 'matplotlib': pip install 'fewbits[report]'"
    assert (error.package, error.extra) == ("matplotlib", "report")


def test_unknown_lists_the_nearest_first_and_all() -> None:
    known = ["W8A8", "FP8_DYNAMIC", "W4A16", "W4A16_ASYM"]
    assert nearest_first("w4a16", known)[:2] == ["W4A16", "W4A16_ASYM"]
    message = str(unknown("scheme", "W4A17", known))
    assert message.startswith("unknown scheme 'W4A17'; known: W4A16")
    assert all(name in message for name in known)


def test_registry_keeps_order_and_imports_on_first_use() -> None:
    table = Registry("thing", {"b": "json:dumps", "a": "no_such_module_at_all:thing"})
    assert table.names() == list(table) == ["b", "a"]
    assert "a" in table and "c" not in table
    assert table.get("b") is json.dumps
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        table.get("a")


def test_registry_refuses_an_unknown_name() -> None:
    table = Registry("thing", {"alpha": "json:dumps", "beta": "json:loads"})
    with pytest.raises(BadInput, match="unknown thing 'btea'; known: beta, alpha"):
        table.get("btea")
    assert dict(table.items()) == {"alpha": json.dumps, "beta": json.loads}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1234567, "1.2 MB"), (2.5e9, "2.5 GB"), (3e12, "3.00 TB")],
)
def test_bytes(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0s"), (9.4, "9.4s"), (59, "59s"), (95, "1m35s"), (3600, "1h00m"), (7384, "2h03m")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_environment_says_where_a_figure_came_from() -> None:
    found = record.environment()
    assert set(found) == {"date", "command", "cpu", "cores", "platform", "versions"}
    assert found["versions"]["python"] == sys.version.split()[0]
    assert {"torch", "transformers"} <= set(found["versions"])
    assert found["cores"] >= 1
    json.dumps(found, allow_nan=False)


def test_a_command_line_tells_no_directories(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["/opt/bin/fewbits", "quantize", "/home/me/llama", "-o", "out/w4", "--text=/home/me/a.txt", "a=0.5", "/ x"]
    monkeypatch.setattr(sys, "argv", line)
    assert record.command() == "fewbits quantize llama -o out/w4 --text=a.txt a=0.5 '/ x'"


def test_command_names_the_program_and_not_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/private/fewbits", "eval", "a b"])
    assert record.command() == "fewbits eval 'a b'"


def test_atomic_path_replaces_whole(tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("old")
    with record.atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
        assert temporary.parent == tmp_path, "another file system could not be renamed from"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["out.txt"]


@pytest.mark.parametrize("error", [RuntimeError("torn"), KeyboardInterrupt()])
def test_atomic_path_leaves_nothing_on_failure(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "out.txt"
    with pytest.raises(type(error)), record.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_write_json_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    target = tmp_path / "record.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        record.write_json(target, {"kl": float("nan")})
    assert os.listdir(tmp_path) == []
    record.write_json(target, {"kl": 0.25})
    assert json.loads(target.read_text()) == {"kl": 0.25}


def test_progress_is_a_plain_value() -> None:
    assert Progress("quantize", 1, 30) == Progress("quantize", 1, 30, note="")


def test_importing_fewbits_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, fewbits; print('heavy:', {'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1)[1].strip() == "set()"


def test_public_names_resolve() -> None:
    import fewbits

    assert fewbits.format("int4-g64").bits == 4
    assert {"quantize", "load", "evaluate", "format"} <= set(dir(fewbits))
    misspelt = "quantise"
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        getattr(fewbits, misspelt)
