"""SIGKILLs at random moments of one quantization or conversion: it completes, and every tensor has the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_runtime_models import quantized_weights, saved, tiny_llama, write_quantized

from fewbits.formats import parse_format

KILLS = 30
LAYERS = 60
SHARD = 50_000


def quantize_in_child(model: str, out: str, working: Any) -> None:
    torch.set_num_threads(1)
    from fewbits.pipeline.quantize import quantize

    quantize(
        model, "int4-asym-g32", out=out, samples=8, sequence_length=128, eval_samples=4,
        on_progress=lambda progress: working.set() if progress.stage == "quantize" else None,
    )  # fmt: skip


def convert_in_child(model: str, out: str, working: Any) -> None:
    torch.set_num_threads(1)
    from fewbits.pipeline.convert import convert

    convert(model, "awq", out, shard_bytes=SHARD, progress=lambda progress: working.set())


def start(model: Path, out: Path, work: Callable[[str, str, Any], None] = quantize_in_child) -> tuple[Any, Any]:
    """A running quantization or conversion, and the event it sets when its first block or layer begins."""
    # A server that has imported everything forks each run: a kill then falls into the work, not into imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fewbits.pipeline.quantize", "fewbits.pipeline.convert", "transformers.models.llama.modeling_llama"]
    )
    working = context.Event()
    process = context.Process(target=work, args=(str(model), str(out), working))
    process.start()
    return process, working


def test_thirty_kills_change_no_byte(tmp_path: Path) -> None:
    model = tmp_path / "dense"
    saved(tiny_llama(layers=LAYERS), model)

    undisturbed, working = start(model, tmp_path / "undisturbed")
    began = time.monotonic()
    assert working.wait(120)
    prepared = time.monotonic()
    undisturbed.join()
    work = time.monotonic() - prepared
    assert undisturbed.exitcode == 0

    out, chance = tmp_path / "killed", random.Random(0)
    for kill in range(KILLS):
        process, working = start(model, out)
        if kill % 5 == 4:  # somewhere while it gets ready
            process.join(timeout=chance.uniform(0, prepared - began))
        else:  # somewhere in the work, so that all of them together fit into one quantization
            assert working.wait(120)
            process.join(timeout=chance.uniform(0, work / KILLS))
        assert process.exitcode is None, f"finished before kill {kill + 1}"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not out.exists(), "the output appears whole or not at all"
    done = len(list((tmp_path / ".killed.partial").glob("block-*.safetensors")))
    final, _ = start(model, out)
    final.join()
    assert final.exitcode == 0
    print(f"{KILLS} kills, {done} of {LAYERS} blocks finished between them; the rest undisturbed")
    assert done > 0

    expected, found = (
        load_file(tmp_path / "undisturbed/model.safetensors"),
        load_file(out / "model.safetensors"),
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8)), name
    assert not list(tmp_path.glob(".*")), "nothing is left of the unfinished runs"


def test_kills_of_a_conversion_change_no_byte(tmp_path: Path) -> None:
    model, format = tiny_llama(layers=LAYERS), parse_format("int4-asym-g32").with_scale_dtype(torch.float16)
    first = write_quantized(tmp_path / "gptq", model, quantized_weights(model, format), kind="gptq")
    whole, working = start(first, tmp_path / "whole", convert_in_child)
    assert working.wait(120)
    began = time.monotonic()
    whole.join()
    work = time.monotonic() - began
    assert whole.exitcode == 0

    out, chance, kills = tmp_path / "killed", random.Random(0), 0
    while True:
        process, working = start(first, out, convert_in_child)
        assert working.wait(120)
        process.join(timeout=chance.uniform(0, work / KILLS * 4))
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        assert not out.exists() or (out / "conversion.json").exists(), "the output appears whole or not at all"
    assert process.exitcode == 0
    print(f"{kills} kills of a conversion of {work:.2f} s")
    assert kills > 5
    names = {path.name for path in (tmp_path / "whole").iterdir()} - {"conversion.json"}
    assert len(names) > 20 and names == {path.name for path in out.iterdir()} - {"conversion.json"}
    assert all((out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in names)
    assert not list(tmp_path.glob(".*")), "nothing is left of the unfinished runs"
