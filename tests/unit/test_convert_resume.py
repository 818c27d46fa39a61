"""A conversion that was killed continues after its last whole shard and ends in the bytes of an undisturbed one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runtime_models import quantized_weights, tiny_llama, write_quantized
from typer.testing import CliRunner

from fewbits.cli.main import app
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.core.progress import Progress
from fewbits.formats import parse_format
from fewbits.pipeline import convert_layers, journal
from fewbits.pipeline.convert import RECORD, Conversion, convert

SHARD = 20_000


class Killed(Exception):
    """Stands for a signal: nothing catches it."""


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of 8-bit linears whose activations are rounded too."""
    model = tiny_llama(intermediate_size=192)
    weights = quantized_weights(model, parse_format("int8-channel").with_scale_dtype(torch.float32))
    folder = tmp_path_factory.mktemp("w8a8") / "first"
    return write_quantized(
        folder, model, weights, kind="compressed-tensors", activations=parse_format("int8-token")
    )  # fmt: skip


def run(first: Path, out: Path, **changes: Any) -> Conversion:
    arguments: dict[str, Any] = {"requantize": True, "dtype": torch.float32, "shard_bytes": SHARD, **changes}
    return convert(first, arguments.pop("to", "gptq"), out, **arguments)


def files(directory: Path) -> dict[str, bytes]:
    """All that a user gets; of the account what does not depend on the clock."""
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    record = json.loads(found[RECORD])
    for key in ("seconds", "environment", "out"):
        del record[key]
    return {**found, RECORD: json.dumps(record).encode()}


def at(step: int) -> Callable[[Progress], None]:
    def progress(event: Progress) -> None:
        if event.done == step:
            raise Killed

    return progress


@pytest.mark.parametrize("to", ["gptq", "native", "dense"])
def test_killed_while_it_converts(tmp_path: Path, first: Path, to: str) -> None:
    steps: list[Progress] = []
    run(first, tmp_path / "whole", to=to, progress=steps.append)
    total = steps[-1].total
    for step in (1, total // 3, total // 2, total - 1, total):
        with pytest.raises(Killed):
            run(first, tmp_path / "out", to=to, progress=at(step))
        assert not (tmp_path / "out").exists()
    steps.clear()
    run(first, tmp_path / "out", to=to, progress=steps.append)
    assert 0 < steps[0].done < total and "resumed after" in steps[0].note
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("place", ["companions", "publish", "second shard"])
def test_killed_while_it_assembles(
    tmp_path: Path, first: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    run(first, tmp_path / "whole")

    def killed(directory: Path, *rest: object) -> None:
        (Path(directory) / ".config.json.1.tmp").write_text("half")
        raise Killed

    def moves(source: Any, target: Any) -> None:
        if "model-00002-of" in str(target):
            raise Killed
        shutil.move(source, target)

    with monkeypatch.context() as patched:
        if place == "companions":
            patched.setattr(convert_layers, "write_companions", killed)
        elif place == "publish":
            patched.setattr(journal.Unfinished, "publish", lambda self: killed(self.final))
        else:
            patched.setattr(os, "replace", moves)
        with pytest.raises(Killed):
            run(first, tmp_path / "out")
    run(first, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole") and not list(tmp_path.glob(".*"))


def test_a_shard_that_did_not_reach_the_disk_is_written_again(tmp_path: Path, first: Path) -> None:
    run(first, tmp_path / "whole")
    with pytest.raises(Killed):
        run(first, tmp_path / "out", progress=at(20))
    parts = sorted((tmp_path / ".out.partial").glob("part-*.safetensors"))
    assert len(parts) > 2
    parts[1].write_bytes(parts[1].read_bytes()[:-1])
    run(first, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_full_disk_keeps_what_is_whole(tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(convert_layers, "write_companions", full)
        with pytest.raises(FewbitsError, match="whole shards are kept, repeat the command"):
            run(first, tmp_path / "out")
    steps: list[Progress] = []
    run(first, tmp_path / "out", progress=steps.append)
    assert steps[0].done > 0


def test_other_arguments_or_another_source_are_refused(tmp_path: Path, first: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(first, source)
    with pytest.raises(Killed):
        run(source, tmp_path / "out", progress=at(20))
    for changes, named in (
        ({"to": "native"}, "to"),
        ({"requantize": False}, "requantize"),
        ({"dtype": torch.bfloat16}, "dtype"),
    ):
        with pytest.raises(BadInput, match=rf"other settings \({named}\); repeat its command.*--restart"):
            run(source, tmp_path / "out", **changes)
    raw = bytearray((source / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (source / "model.safetensors").write_bytes(raw)
    with pytest.raises(BadInput, match=r"\(source\).*--restart"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", restart=True)
    run(source, tmp_path / "undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed") and not list(tmp_path.glob(".*"))


def test_what_is_complete_is_not_done_again(tmp_path: Path, first: Path) -> None:
    done = run(first, tmp_path / "out")
    before = files(tmp_path / "out")
    assert run(first, tmp_path / "out") == done and files(tmp_path / "out") == before
    with pytest.raises(BadInput, match=r"is finished, with other settings \(to\)"):
        run(first, tmp_path / "out", to="native")


def test_gguf_begins_anew(tmp_path: Path, first: Path) -> None:
    whole = {"to": "gguf", "requantize": True, "dtype": None}
    run(first, tmp_path / "whole" / "out", **whole)
    with pytest.raises(Killed):
        run(first, tmp_path / "out", progress=at(5), **whole)
    run(first, tmp_path / "out", **whole)
    assert files(tmp_path / "out") == files(tmp_path / "whole" / "out")


def test_the_command_starts_over(tmp_path: Path, first: Path) -> None:
    with pytest.raises(Killed):
        convert(first, "native", tmp_path / "out", progress=at(5), shard_bytes=SHARD)
    command = ["convert", str(first), "--to", "native", "-o", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "shard_bytes" in refused.output
    assert CliRunner().invoke(app, [*command, "--restart"]).exit_code == 0
