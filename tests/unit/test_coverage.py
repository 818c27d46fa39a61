"""Experts that calibration hardly reached: what they get, and that it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_pipeline import run
from tiny_runtime_models import saved, tiny_llama

from fewbits.calibration.collect import collect_inputs, input_stages
from fewbits.calibration.coverage import cover, report, sentence
from fewbits.core.errors import BadInput
from fewbits.models.topology import find_topology
from fewbits.models.walk import ExpertRef, blocks, linears

MOE = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 48}
MOE |= {"tied": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
WANTED = frozenset({"hessian", "mean_abs"})


@pytest.fixture(scope="module")
def seen():
    """(the experts of a block, their sums over few tokens)."""
    model = tiny_llama(**MOE)
    topology = find_topology({"model_type": "qwen3_moe"})
    _, block = blocks(model, topology)[0]
    refs = linears(block, topology)
    ids = torch.arange(60)[None]
    stages = input_stages(refs, lambda: model(ids))
    sums = collect_inputs(stages, lambda batch: model(batch), [ids], WANTED)
    return [ref for ref in refs if isinstance(ref, ExpertRef)], sums


def test_experts_with_few_tokens_borrow_in_proportion(seen) -> None:
    experts, sums = seen
    few = cover(experts, sums, "borrow", "b")
    assert few, "60 tokens over 8 experts leave every one short of 64"
    ups = [ref for ref in experts if ref.part == "up_proj"]
    everything = sum(sums[ref.name].total for ref in ups) * 2 / sum(sums[ref.name].tokens for ref in ups)
    for ref in ups:
        own, tokens = sums[ref.name].inputs("x").hessian, sums[ref.name].tokens
        share = tokens / (tokens + 64)
        assert torch.allclose(few[ref.name].hessian, share * own + (1 - share) * everything)
        assert few[ref.name].tokens == tokens
        assert float(few[ref.name].hessian.diagonal().min()) > 0, "no direction is free"


def test_data_free_means_no_hessian(seen) -> None:
    experts, sums = seen
    few = cover(experts, sums, "data-free", "b")
    assert all(not bool(inputs.hessian.any()) for inputs in few.values())


def test_those_that_saw_enough_keep_their_own(seen) -> None:
    experts, sums = seen
    for ref in experts:
        sums[ref.name].tokens += 1000
    try:
        assert cover(experts, sums, "borrow", "b") == {}
    finally:
        for each in {id(sums[ref.name]): sums[ref.name] for ref in experts}.values():
            each.tokens -= 1000 * sum(1 for ref in experts if sums[ref.name] is each)


@pytest.mark.parametrize("policy", ["borrow", "data-free"])
def test_the_certificate_names_them(policy: str, tmp_path: Path) -> None:
    saved(tiny_llama(**MOE), tmp_path / "moe")
    out = run(tmp_path / "moe", tmp_path / "q", samples=1, sequence_length=32, experts=policy)
    certificate = json.loads((out / "certificate.json").read_text())
    found = certificate["experts"]
    assert found["policy"] == policy and found["matrices"] == 2 * 8 * 3 and found["few"] > 0
    assert found["named"][0]["tokens"] == found["tokens"]["least"] and found["named"][0]["needed"] in (48, 64)
    assert any("expert matrices saw fewer calibration tokens" in note for note in certificate["fallbacks"])
    few = [layer for layer in certificate["layers"] if layer["expert"] is not None]
    assert min(layer["tokens"] for layer in few) == found["tokens"]["least"]


def test_a_model_without_experts_has_no_report() -> None:
    assert report([{"expert": None, "tokens": 12, "shape": [4, 4], "name": "q"}], "borrow") is None
    some = {"expert": 0, "tokens": 10, "shape": [4, 100], "name": "e"}
    found = report([some, {**some, "tokens": 0, "name": "f"}], "borrow")
    assert found is not None and found["unreached"] == 1 and found["more"] == 10
    assert "10 times the --samples" in sentence(found)


def test_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="policy for experts"):
        run(tmp_path / "x", tmp_path / "q", experts="pray")
