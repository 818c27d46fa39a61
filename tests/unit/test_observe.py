"""Observing a model: what was put into it is what is found, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_runtime_models import OUTLIER_GAIN, byte_tokenizer, llama_with_outliers, tiny_llama

from fewbits.core.errors import FewbitsError
from fewbits.evaluation.observe import CLASSES, observe, summary, token_classes


def windows(count: int = 3, length: int = 24) -> torch.Tensor:
    return torch.randint(33, 120, (count, length), generator=torch.Generator().manual_seed(0))


def test_injected_outlier_features_are_exactly_those_found() -> None:
    seen = observe(llama_with_outliers((5, 40)), windows())
    assert sorted(seen.outliers()) == [5, 40]
    found = summary(seen)["outliers"]["inputs"]
    assert {entry["dimension"] for entry in found} == {5, 40}
    assert all(entry["layers"] == 1.0 and entry["tokens"] > 0.5 and entry["absmax"] > OUTLIER_GAIN for entry in found)


def test_relative_to_the_token_no_scale_of_the_model_matters() -> None:
    model = llama_with_outliers((5,))
    with torch.no_grad():
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight /= 100
    seen = observe(model, windows())
    assert seen.outliers() == [] and seen.outliers(relative=True) == [5]


def test_a_model_without_outliers_has_none() -> None:
    model = tiny_llama()
    seen = observe(model, windows())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert seen.outliers() == seen.outliers("hidden") == []
    said = summary(seen)
    assert said["outliers"]["inputs"] == [] and said["massive"]["found"] == []


def test_statistics_are_those_of_the_hidden_states_and_of_what_linears_read() -> None:
    model, ids = tiny_llama(), windows()
    seen = observe(model, ids)
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True).hidden_states
    assert [place.name for place in seen.hidden] == ["embeddings", "model.layers.0", "model.layers.1"]
    for place, state in zip(seen.hidden[:-1], states[:-1], strict=True):  # transformers normalises the last
        torch.testing.assert_close(place.absmax, state.abs().amax(dim=(0, 1)))
        torch.testing.assert_close(place.positions, state.abs().amax(dim=(0, 2)))
        torch.testing.assert_close(place.class_absmax[0], state[:, 0].abs().amax(dim=0))
        assert place.median == pytest.approx(float(state.abs().flatten(1).median(dim=1).values.mean()))
        assert place.rms == pytest.approx(float(state.square().mean().sqrt()), rel=1e-5)
    kinds = [(place.block, place.kind, place.residual) for place in seen.inputs]
    block = [("q_proj", True), ("o_proj", False), ("gate_proj", True), ("down_proj", False)]
    assert kinds == [(number, *rest) for number in (0, 1) for rest in block]
    normed = model.model.layers[0].input_layernorm(states[0])
    torch.testing.assert_close(seen.inputs[0].absmax, normed.abs().amax(dim=(0, 1)))


def test_a_massive_activation_on_the_first_delimiter_is_named() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    dot = tokenizer.encode(".", add_special_tokens=False)[0]
    with torch.no_grad():  # the embedding of '.' carries it, and nothing else does
        model.model.embed_tokens.weight[dot, 7] = -5000.0
    ids = torch.tensor([tokenizer.encode("abc. de")])
    (found,) = summary(observe(model, ids, tokenizer=tokenizer), tokenizer)["massive"]["found"]
    assert (found["dimension"], found["class"], found["text"]) == (7, "delimiter", ".")
    assert found["blocks"] == [-1, 0, 1] and found["value"] < -4000 and found["ratio"] > 1000


def test_classes_of_tokens() -> None:
    tokenizer = byte_tokenizer()
    ids = torch.tensor([[*tokenizer.encode(".a, b\n"), tokenizer.eos_token_id]])
    names = [CLASSES[index] for index in token_classes(ids, tokenizer)[0].tolist()]
    assert names == ["first", "other", "delimiter", "other", "other", "delimiter", "delimiter"]
    assert set(token_classes(ids)[0, 1:].tolist()) == {CLASSES.index("other")}


@pytest.mark.parametrize(("model_type", "extra"), [("mixtral", {"num_local_experts": 4}), ("olmo2", {}), ("qwen3", {})])
def test_other_families_are_observed_and_their_summary_is_json(model_type: str, extra: dict) -> None:
    model = tiny_llama(model_type=model_type, **extra)
    said = summary(observe(model, windows()))
    assert len(said["hidden"]) == 3 and said["tokens"] == 72
    assert {place["block"] for place in said["inputs"]} == {0, 1}
    json.dumps(said, allow_nan=False)


def test_not_a_number_is_refused_by_name() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = float("nan")
    with pytest.raises(FewbitsError, match=r"model\.layers\.1: activations are NaN"):
        observe(model, windows())
