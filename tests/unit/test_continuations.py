"""Continuations: the given windows stay, copies begin with real text, and a seed decides all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_runtime_models import byte_tokenizer, saved, tiny_llama

from fewbits.calibration.continuations import _starts, continued
from fewbits.calibration.data import TokenSet, ids_sha256, pack, read_tokens
from fewbits.cli.main import app
from fewbits.core.errors import BadInput


def windows(samples: int = 4, length: int = 32) -> TokenSet:
    texts = ["the quick brown fox jumps over the lazy dog " * 20]
    return pack(texts, byte_tokenizer(), sequence_length=length, samples=samples)


def test_windows_stay_and_copies_begin_with_a_piece_of_them() -> None:
    model, given = tiny_llama(), windows()
    found = continued(model, given, 2, prefix=8, seed=3)
    assert found.ids.shape == (12, 32) and torch.equal(found.ids[:4], given.ids)
    assert found.sha256 == ids_sha256(found.ids) == found.description["sha256"]
    assert found.description["continuations"] == {"copies": 2, "prefix": 8, "seed": 3, "windows": 4}
    for row, copy in enumerate(found.ids[4:]):
        pieces = given.ids[row % 4].unfold(0, 8, 1)
        assert bool((pieces == copy[:8]).all(dim=1).any())
    again, other = (continued(model, given, 2, prefix=8, seed=seed) for seed in (3, 4))
    assert torch.equal(found.ids, again.ids) and not torch.equal(found.ids[4:, 8:], other.ids[4:, 8:])
    state = torch.random.get_rng_state()
    continued(model, given, 1, prefix=8)
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_opening_token_stays_at_the_head() -> None:
    ids = torch.randint(2, 50, (3, 20))
    ids[:, 0] = 1
    starts = _starts(ids, 5, 6, seed=0)
    assert starts.shape == (15, 6) and bool((starts[:, 0] == 1).all()) and bool((starts[:, 1:] > 1).all())


def test_nothing_to_write_is_said() -> None:
    given = windows()
    assert continued(None, given, 0) is given
    with pytest.raises(BadInput, match="-1 continuations"):
        continued(None, given, -1)
    for prefix in (0, 32):
        with pytest.raises(BadInput, match=f"prefix of {prefix} tokens"):
            continued(None, given, 1, prefix=prefix)


def test_quantize_keeps_the_text_for_a_run_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    model, out = tmp_path / "model", tmp_path / "out"
    saved(tiny_llama(max_position_embeddings=1024), model)
    command = ["quantize", str(model), "-o", str(out), "--scheme", "int4-g16", "--samples", "2", "--json",
               "--sequence-length", "80", "--continuations", "2", "--eval-samples", "1"]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["calibration"]["continuations"]["copies"] == 2 and certificate["calibration"]["samples"] == 6
    path = Path(f"{out}.calibration.safetensors")
    assert path.is_file() and read_tokens(path, {"copies": 9}) is None
    monkeypatch.setattr("fewbits.calibration.continuations._generate", None)
    assert CliRunner().invoke(app, command).exit_code == 0  # complete already, and nothing is written again
    path.write_bytes(path.read_bytes()[:40])
    assert read_tokens(path, {}) is None
