"""The study of outliers: what was put into a model is what it finds, weighs and misses; and a model without any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runtime_models import byte_tokenizer, llama_with_outliers, saved, tiny_llama
from typer.testing import CliRunner

from fewbits.cli.main import app
from fewbits.evaluation.forward import Forward
from fewbits.evaluation.removal import changed, score, zeroed
from fewbits.evaluation.studies.outliers import study
from fewbits.models.walk import blocks, linears
from fewbits.report.study_outliers import page

SMALL: dict[str, Any] = {"samples": 2, "sequence_length": 32}
FEATURES = [5, 40]


def needed(dimensions: list[int]) -> torch.nn.Module:
    """A tiny model with large values at `dimensions` of the norms, whose linears listen to these dimensions most."""
    model = llama_with_outliers(tuple(dimensions))
    with torch.no_grad():
        for block in model.model.layers:
            for ref in linears(block):
                if ref.kind in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
                    ref.weight[:, dimensions] *= 20
    return model


@pytest.fixture(scope="module")
def with_features() -> dict[str, Any]:
    return study((needed(FEATURES), byte_tokenizer()), **SMALL)


def test_the_features_found_are_those_injected_and_carry_the_error(with_features: dict[str, Any]) -> None:
    results = with_features["results"]
    assert sorted(entry["dimension"] for entry in results["observed"]["outliers"]["inputs"]) == FEATURES
    for scaling in ("token", "tensor"):
        lines, kept = results["curve"][scaling]["inputs"], results["curve"]["kept"]
        assert sorted(results["error"]["dimensions"][scaling]["dimensions"][:2]) == FEATURES
        assert lines["worst"][kept.index(2)] == pytest.approx(lines["magnitude"])
        assert lines["magnitude"] < 0.05
        assert lines["random"][kept.index(2)] > 0.8
        assert lines["worst"][0] == lines["random"][0] == 1.0
        assert results["curve"][scaling]["outputs"]["magnitude"] < 0.05


def test_zeroing_the_features_hurts_more_than_random_ones(with_features: dict[str, Any]) -> None:
    removal = with_features["results"]["removal"]
    assert removal["main"] == "magnitude"
    features, drawn = (abs(removal["runs"][key]["ratio"]["mean"] - 1) for key in ("magnitude", "random"))
    assert features > 3 * drawn
    assert all(not set(run["dimensions"]) & set(FEATURES) for run in removal["runs"]["random"]["draws"])


def test_a_model_without_outliers_says_so() -> None:
    record = study((tiny_llama(), byte_tokenizer()), **SMALL)
    results = record["results"]
    assert results["observed"]["outliers"]["inputs"] == [] and results["removal"]["main"] == "largest"
    assert not any(key.startswith("massive") for key in results["removal"]["runs"])
    said = page(record)
    assert "no dimension of 64 meets" in said.verdict and "There are no massive activations" in said.verdict
    parts = {part.key: part for part in said.parts}
    assert "those with the largest rms stand in" in parts["removal"].lead
    assert "No outlier features." in parts["found"].table and "No massive activations." in parts["found"].table


def test_massive_activations_are_replaced_where_they_emerge() -> None:
    tokenizer, model = byte_tokenizer(), tiny_llama(tied=False)
    newline = tokenizer.encode("\n")[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[newline, 7] = 5000.0
    record = study((model, tokenizer), **SMALL)
    (found,) = record["results"]["observed"]["massive"]["found"]
    assert (found["dimension"], found["class"], found["windows"]) == (7, "delimiter", 2)
    runs = record["results"]["removal"]["runs"]
    assert runs["massive zero"]["dimensions"] == runs["massive mean"]["dimensions"] == [7]
    assert abs(runs["massive zero"]["ratio"]["mean"] - 1) > abs(runs["massive mean"]["ratio"]["mean"] - 1)
    json.dumps(record, allow_nan=False)


def test_hooks_change_what_they_say_and_leave_nothing_behind() -> None:
    model, ids = tiny_llama(), torch.arange(40).reshape(2, 20)
    block = blocks(model)[0][1]
    refs = [ref for ref in linears(block) if ref.kind in ("q_proj", "k_proj", "v_proj")]
    forward = Forward(model)
    before = score(forward, ids)
    with zeroed(refs, [3, 9]):
        hooked = score(forward, ids)
    kept = block.input_layernorm.weight.detach().clone()
    with torch.no_grad():
        block.input_layernorm.weight[[3, 9]] = 0.0
        assert torch.allclose(score(forward, ids).nll, hooked.nll, atol=1e-6)
        block.input_layernorm.weight.copy_(kept)
    with changed(block, torch.zeros_like):
        assert not torch.allclose(score(forward, ids).nll, before.nll)
    assert torch.equal(score(forward, ids).nll, before.nll)
    assert before.top.min() > 0 and before.top.max() <= 1


def test_command_writes_record_page_and_figures(tmp_path: Path) -> None:
    model = needed(FEATURES)
    saved(model, tmp_path / "model")
    options = ["--samples", "2", "--sequence-length", "32", "--json", "-o", str(tmp_path / "out")]
    (tmp_path / "text.txt").write_text("What is seen here, is seen there.\n" * 20)
    done = CliRunner().invoke(
        app, ["study", "outliers", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), *options]
    )
    assert done.exit_code == 0, done.output
    paths = json.loads(done.stdout)
    record = json.loads(Path(paths["record"]).read_text(encoding="utf-8"))
    assert sorted(entry["dimension"] for entry in record["results"]["observed"]["outliers"]["inputs"]) == FEATURES
    assert record["results"]["texts"]["observed"]["windows"] == "even"
    text = Path(paths["page"]).read_text(encoding="utf-8")
    assert text.count('role="img"') == len(paths["figures"]) == 12
    assert "<image" not in text  # the page's policy lets none be shown
    assert "2 dimensions of 64 meet" in text
