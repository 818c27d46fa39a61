"""The comparison at 8 bits on both sides, without other projects: what is handed back, judged and shown."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peers import w8a8_page
from peers.measure import Judge
from peers.registry import HERE, OURS, PEERS
from peers.w8a8 import CONTESTANTS, SCRIPTS
from safetensors.torch import load_file, save_file
from tiny_runtime_models import saved, tiny_llama
from torch import nn

from fewbits.calibration.data import TokenSet
from fewbits.core.errors import FewbitsError


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as scripts see it, which run in its folder."""
    monkeypatch.syspath_prepend(str(HERE))
    import running

    return running


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    directory = tmp_path_factory.mktemp("judge")
    saved(tiny_llama(), directory / "model")
    ids = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    return Judge(directory / "model", {"built-in": TokenSet.of(ids, {})}, "cpu", directory)


def states(judge: Judge) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = judge.model.model(judge.references["built-in"].tokens.ids).last_hidden_state
    return found


def test_contestants_have_scripts_and_environments() -> None:
    assert len({each.key for each in CONTESTANTS}) == len(CONTESTANTS)
    assert {each.peer for each in CONTESTANTS} == SCRIPTS.keys() <= {*PEERS, OURS}
    assert all(script.is_file() for script in SCRIPTS.values())


def test_the_originals_own_states_lose_nothing_in_any_basis(judge: Judge) -> None:
    hidden, head = states(judge), judge.model.get_output_embeddings().weight.detach()
    found = judge.measure_states("built-in", {"hidden": hidden})
    assert found["kl"]["mean"] < 1e-6 and found["top1"]["mean"] == 1.0
    assert found["perplexity"]["mean"] == pytest.approx(found["reference_perplexity"]["mean"], rel=1e-6)
    turn = torch.linalg.qr(torch.randn(hidden.shape[-1], hidden.shape[-1])).Q
    turned = {"hidden": hidden @ turn, "head": head @ turn}
    assert judge.measure_states("built-in", turned)["kl"]["mean"] < 1e-6
    assert judge.measure_states("built-in", {"hidden": turned["hidden"]})["kl"]["mean"] > 1e-3


def test_states_of_other_windows_and_nan_are_refused(judge: Judge) -> None:
    hidden = states(judge)
    with pytest.raises(FewbitsError, match="windows of"):
        judge.measure_states("built-in", {"hidden": hidden[:, :-1]})
    with pytest.raises(FewbitsError, match="NaN"):
        judge.measure_states("built-in", {"hidden": hidden * float("nan")})


def test_a_layer_that_rounds_its_inputs_is_told_from_one_that_does_not(running: ModuleType) -> None:
    class Rounds(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            scale = input.abs().amax(dim=-1, keepdim=True) / 127
            return super().forward((input / scale).round() * scale)

    assert running.nonlinearity(nn.Linear(64, 32, bias=False), 64) < running.LINEAR / 10
    assert running.nonlinearity(Rounds(64, 32, bias=False), 64) > running.LINEAR * 10
    away = nn.Linear(64, 32, bias=False)
    nn.init.zeros_(away.weight)
    assert running.nonlinearity(away, 64) == float("inf")


@pytest.mark.usefixtures("running")
def test_ours_runs_through_the_door_of_the_others(
    tmp_path: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = saved(tiny_llama(), tmp_path / "model")
    ids = judge.references["built-in"].tokens.ids
    save_file({"ids": ids}, tmp_path / "tokens.safetensors")
    options = {"scheme": "W8A8", "method": "rtn", "method_options": {}}
    tokens, out = tmp_path / "tokens.safetensors", tmp_path / "out"
    given = [SCRIPTS[OURS], model, tokens, json.dumps(options), out, tokens]
    monkeypatch.setattr(sys, "argv", [*map(str, given)])
    importlib.import_module(SCRIPTS[OURS].stem).main()
    facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    assert facts["rounding"] == {"linears": 14, "of": 14} and 8 < facts["bits_per_weight"] < 9
    assert facts["weights"] == sum(judge.parameters[name].numel() for name in judge.linears())
    found = judge.measure_states("built-in", load_file(out / "states.safetensors"))
    assert 0 < found["kl"]["mean"] < 1e-2


def result(peer: str, label: str, kl: float, **changes: Any) -> dict[str, Any]:
    measured = {
        "kl": {"mean": kl, "stderr": kl / 20},
        "lost": {"mean": 0.01, "stderr": 0.001},
        "top1": {"mean": 0.9, "stderr": 0.01},
    }
    found = {
        "row": "W8A8", "peer": peer, "label": label, "bits_per_weight": 8.05, "evaluations": {"built-in": measured},
        "seconds": 61.0, "run_seconds": 5.0, "rounding": {"linears": 4, "of": 4}, "threads": 1, "notes": [],
        "settings": "as told",
        "versions": {"python": "3.11", peer: "1.0"}, "machine": {"cpu": "a CPU"}, "error": None,
    }  # fmt: skip
    return {**found, **changes}


def test_the_page_says_who_is_ahead_and_what_did_not_round() -> None:
    text = {"samples": 2, "sequence_length": 8, "tokens": 16, "description": "a text"}
    failed = {"row": "W8A8", "peer": "torchao", "label": "symmetric", "error": "no such wheel"}
    results = [
        result("bitsandbytes", "LLM.int8()", 0.01, rounding={"linears": 0, "of": 4}, notes=["a note"]),
        result(OURS, "rotate", 0.005),
        failed,
    ]
    record = {
        "environment": {"date": "2026-11-30T00:00:00"}, "calibration": text, "texts": {"built-in": text},
        "results": results,
    }  # fmt: skip
    said = w8a8_page.page(record)
    assert "`rotate` is 0.50 of the KL of the best peer, bitsandbytes LLM.int8()." in said
    assert "| **fewbits rotate** | 8 bits | 8.05 | 0.00500 ± 0.00025 | +1.01 ± 0.10 | 90.0 % | 1m01s | 5.0s |" in said
    assert "| bitsandbytes LLM.int8() | not rounded |" in said
    assert "- torchao symmetric: no such wheel" in said
    assert "as told; a note (bitsandbytes 1.0)" in said
    close = w8a8_page.verdict([result(OURS, "rotate", 0.0100), result("torchao", "symmetric", 0.0101)])
    assert "level with" in close
