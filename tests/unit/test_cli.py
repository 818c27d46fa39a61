"""The command line: help, exit codes, messages, JSON, progress. What is computed is tested elsewhere."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from fake_certificate import fake_certificate
from typer.testing import CliRunner, Result

import fewbits
from fewbits.cli import console
from fewbits.cli.boundary import guarded
from fewbits.cli.certify import add_to_certificate, read_certificate
from fewbits.cli.listing import KINDS
from fewbits.cli.main import app
from fewbits.cli.progress import Clock, ProgressBar
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.core.progress import Progress

COMMANDS = [command.name or "" for command in app.registered_commands]


def run(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(app, list(arguments), prog_name="fewbits", **options)


# ---- finding one's way


def test_help_lists_every_command() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert "--json" in shown.stdout or command == "chat"
    assert shown.stdout.count("\n") > 5


def test_version() -> None:
    assert run("--version").stdout.strip() == fewbits.__version__


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "fewbits", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fewbits.__version__


def test_help_imports_no_torch() -> None:
    code = "import sys, fewbits.cli.main; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quantise", "demo"], "quantize"),
        (["quantize", "demo"], "--out"),
        (["quantize", "demo", "-o", "x", "--group-size", "many"], "'--group-size'"),
        (["list", "kernel"], "unknown list 'kernel'; known: kernels"),
        (["eval", "demo", "--certify"], "certificate.json"),
    ],
)
def test_bad_usage_exits_2_and_says_what_helps(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--scheme", "W4A17"], "unknown scheme 'W4A17'; known: W4A16"),
        (["--scheme", "int9-g64"], "unknown scheme 'int9-g64'; known: int"),
        (["--scheme", "int4-h64"], "int4-g64"),
        (["--method", "gtpq"], "unknown method 'gtpq'; known: gptq"),
        (["--option", "act_order=maybe"], "option act_order 'maybe': true or false\n"),
        (["--option", "block_size=1.5"], "option block_size 1.5: a whole number, e.g. 128\n"),
        (["--method", "rtn", "--option", "rtn.search=foo"], "option rtn.search 'foo': a RangeSearch made in Python"),
        (["--group-size", "0"], "group size 0"),
        (["--calibration", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_quantize_refuses_before_it_writes(
    options: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("quantize", "demo", "-o", "out", *options)
    assert result.exit_code == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["eval"], ["generate"], ["chat"], ["report"]])
def test_a_model_that_is_not_there(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*command, "./no-such-model", *(["Hello"] if command == ["generate"] else []))
    assert result.exit_code == 2, result.stderr
    assert result.stderr.startswith("error: ") and "no-such-model" in result.stderr


# ---- the boundary


def _raising(error: BaseException, **options: Any) -> Result:
    """What the command line makes of a command that raises `error`."""
    program = typer.Typer()

    @program.command()
    @guarded(**options)
    def fail() -> None:
        raise error

    return CliRunner().invoke(program, [])


@pytest.mark.parametrize(
    ("error", "options", "code", "text"),
    [
        (BadInput("the value"), {}, 2, "error: the value\n"),
        (FewbitsError("it broke"), {}, 1, "error: it broke\n"),
        (KeyboardInterrupt(), {"resumes": True}, 1, "error: interrupted; the same command resumes\n"),
        (KeyboardInterrupt(), {}, 1, "error: interrupted\n"),
        (MemoryError(), {}, 1, "error: out of memory; a smaller --samples"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/o/x"),
            {},
            1,
            "no space left on the device writing '/o/x'",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/o"), {}, 1, "error: '/o': Permission denied\n"),
        (ZeroDivisionError("division by zero"), {}, 1, "error: ZeroDivisionError: division by zero"),
    ],
)
def test_failures_become_one_line_and_a_code(
    error: BaseException, options: dict[str, bool], code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEWBITS_DEBUG", raising=False)
    result = _raising(error, **options)
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_DEBUG", "1")
    result = _raising(ZeroDivisionError("division by zero"))
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "in fail" in result.stderr


def test_exit_passes_through() -> None:
    assert _raising(typer.Exit(0)).exit_code == 0


# ---- lists


@pytest.mark.parametrize("kind", list(KINDS))
def test_lists_as_table_and_as_json(kind: str) -> None:
    shown, machine = run("list", kind), run("list", kind, "--json")
    assert shown.exit_code == machine.exit_code == 0, shown.stderr + machine.stderr
    rows = json.loads(machine.stdout)
    assert rows and all(row.keys() == rows[0].keys() for row in rows)
    first = next(iter(rows[0].values()))
    assert str(first) in shown.stdout


def test_methods_list_the_options_that_text_can_set() -> None:
    options = {row["method"]: row["options"].split(", ") for row in json.loads(run("list", "methods", "--json").stdout)}
    assert options["rtn"] == ["range"]
    assert "damping" in options["gptq"] and "search" not in options["gptq"] + options["gptaq"]


def test_kernels_say_what_runs_and_why_the_others_do_not() -> None:
    for row in json.loads(run("list", "kernels", "--json").stdout):
        assert row["answers"][row["runs"]].startswith("yes")
        before = list(row["answers"])[: list(row["answers"]).index(row["runs"])]
        assert all(row["answers"][name].startswith("no: ") for name in before)
        assert row["answers"]["reference"].startswith("yes")


# ---- commands that call, with what they call replaced


class _Result:
    def to_dict(self) -> dict[str, Any]:
        return {
            "what": "m",
            "perplexity": {"mean": 27.5, "stderr": 1.5},
            "reference_perplexity": {"mean": 20.25, "stderr": None},
            "kl": {"mean": 0.25, "stderr": 0.0125, "median": 0.125, "p99": 0.5},
            "top1": {"mean": 0.75, "stderr": 0.0125},
            "text": {"description": "a text", "sha256": "0a", "tokens": 1024, "sequence_length": 512},
        }


@pytest.fixture
def evaluation(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the evaluation by one that notes how it was called."""
    calls: list[dict[str, Any]] = []

    def evaluate(model: str, **options: Any) -> _Result:
        calls.append({"model": model, **options})
        options["progress"]("evaluate", 1, 2)
        return _Result()

    module = ModuleType("fewbits.evaluation")
    module.evaluate = evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fewbits.evaluation", module)
    return calls


def test_eval_prints_json_that_machines_read(evaluation: list[dict[str, Any]]) -> None:
    result = run("eval", "m", "--against", "demo", "--samples", "2", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["kl"] == {"mean": 0.25, "stderr": 0.0125, "median": 0.125, "p99": 0.5}
    assert {"perplexity", "top1"} <= set(found)
    (call,) = evaluation
    assert (call["model"], call["against"], call["samples"], call["seed"]) == ("m", "demo", 2, 0)
    assert "sequence_length" not in call, "defaults belong to the evaluation, not to the command line"


def test_eval_prints_a_table_with_error_bars(evaluation: list[dict[str, Any]]) -> None:
    shown = run("eval", "m", "--against", "demo")
    assert "0.2500 ± 0.0125" in shown.stdout and "20.250" in shown.stdout
    assert "evaluate 1/2" in shown.stderr and "1024 tokens" in shown.stderr


def test_a_broken_certificate_is_found_before_measuring(evaluation: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "certificate.json").write_text("{")
    result = run("eval", str(tmp_path), "--certify")
    assert result.exit_code == 2 and "not valid JSON" in result.output and not evaluation


def test_eval_certify_adds_and_replaces(evaluation: list[dict[str, Any]], tmp_path: Path) -> None:
    certificate = fake_certificate(blocks=1)
    certificate["evaluations"] = [
        {**certificate["evaluations"][0], "what": "other", "text": {"sha256": "ff"}, "kl": None}
    ]
    certificate["checkpoint_format"] = "fewbits"
    (tmp_path / "certificate.json").write_text(json.dumps(certificate))
    for _ in range(2):
        assert run("eval", str(tmp_path), "--against", "demo", "--certify").exit_code == 0
    kept = read_certificate(tmp_path)["evaluations"]
    assert [entry["text"]["sha256"] for entry in kept] == ["ff", "0a"]
    assert "0.2500" in (tmp_path / "README.md").read_text(), "the model card is written anew"


def test_certificate_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "certificate.json").write_text("{")
    with pytest.raises(BadInput, match=r"certificate\.json' is not valid JSON"):
        add_to_certificate(tmp_path, evaluations=[])


# ---- printing


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": [float("nan"), 1.5], "b": (float("inf"),)})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None]}


def test_tables_keep_names_whole_and_read_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.0.mlp.[bold]experts[/bold]." + "x" * 80
    console.print_table(("name", "size"), [(name, "1.5 MB")])
    assert name in capsys.readouterr().out


def test_plus_minus() -> None:
    assert console.plus_minus({"mean": 0.12345, "stderr": 0.00567}) == "0.1235 ± 0.0057"
    assert console.plus_minus({"mean": 2.0, "stderr": None}, 1) == "2.0"
    assert console.plus_minus(None) == "-"


# ---- progress


def test_time_left_follows_the_pace() -> None:
    clock = Clock(0.0)
    assert clock.left(0.0) == ""
    clock.update(Progress("quantize", 1, 4), 10.0)
    assert clock.left(10.0) == "30s left"
    assert clock.left(15.0) == "25s left"
    clock.update(Progress("evaluate", 1, 2), 12.0)
    assert clock.left(12.0) == "2.0s left", "a new stage has a pace of its own"
    clock.update(Progress("evaluate", 2, 2), 14.0)
    clock.update(Progress("evaluate", 1, 2), 20.0)
    assert clock.left(20.0) == "6.0s left", "and so has the same stage over again"


def test_a_resumed_run_does_not_count_what_was_done_before() -> None:
    clock = Clock(0.0)
    clock.update(Progress("quantize", 12, 30), 0.1)
    assert clock.left(0.1) == ""
    clock.update(Progress("quantize", 13, 30), 5.1)
    assert clock.left(5.1) == "1m27s left"


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar() as bar:
        for done in range(1, 51):
            bar(Progress("quantize", done, 50, note=f"block {done - 1}: error 0.01"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("quantize 1/50") and lines[-1] == "quantize 50/50, block 49: error 0.01"
    assert len(lines) == 2, "not one line a step"


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar(quiet=True) as bar:
        bar.step("evaluate", 1, 1)
    assert capsys.readouterr().err == ""


def test_options_of_steps_are_read_as_json_or_text() -> None:
    from fewbits.cli.quantize import parse_options

    found = parse_options(["rounds=5", "gptq.damping=0.02", "act_order=false", "range=mse"])
    assert found == {"rounds": 5, "gptq.damping": 0.02, "act_order": False, "range": "mse"}
    assert parse_options(["a=False", "b=TRUE", "c=none", "d=null", "e=no"]) == {
        "a": False, "b": True, "c": None, "d": None, "e": "no",
    }  # fmt: skip
    assert parse_options([f"a={'9' * 5000}"]) == {"a": "9" * 5000}, "longer than Python reads"
    with pytest.raises(BadInput, match="NAME=VALUE"):
        parse_options(["rounds"])
