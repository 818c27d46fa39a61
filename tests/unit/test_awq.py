"""Scaling channels changes no function; AWQ's search is never worse than rounding by its own measure."""

from __future__ import annotations

import pytest
import torch
from test_topology import CONFIGS, build

from fewbits.algorithms.awq import AWQ, scales
from fewbits.algorithms.base import Block, Stage
from fewbits.algorithms.channels import scalables
from fewbits.calibration.collect import collect_inputs, input_stages
from fewbits.calibration.stats import Inputs
from fewbits.formats import parse_format
from fewbits.models.topology import find_topology
from fewbits.models.walk import blocks, linears

NAMES = [name for name in CONFIGS if name not in ("phi3",)]
WANTED = frozenset({"hessian", "mean_abs"})


def first_block(name: str):
    """(model, its first block as a transform sees it) with what calibration saw of random ids."""
    torch.manual_seed(0)
    model = build(CONFIGS[name])
    fused = any(parameter.dim() == 3 for parameter in model.parameters())  # torch multiplies experts in float32
    model = model.to(torch.float32 if fused else torch.float64).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "bias" not in key else parameter.normal_()
    topology = find_topology({"model_type": model.config.model_type})
    prefix, module = blocks(model, topology)[0]
    ids = torch.randint(0, model.config.vocab_size, (4, 24))

    def run(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(batch, use_cache=False).logits

    refs = linears(module, topology)
    stages = input_stages(refs, lambda: run(ids))
    sums = collect_inputs(stages, run, [ids], WANTED)
    grouped: dict[int, list] = {}
    for ref in refs:
        grouped.setdefault(id(sums[ref.name]), []).append(ref)
    found = [Stage(refs=members, inputs=sums[members[0].name].inputs("x")) for members in grouped.values()]
    block = Block(name=prefix, module=module, topology=topology, stages=found, format=parse_format("int4-asym-g16"))
    return run, ids, block


@pytest.mark.parametrize("name", NAMES)
def test_scaling_channels_leaves_the_function(name: str) -> None:
    run, ids, block = first_block(name)
    before = run(ids)
    places = list(scalables(block))
    assert places, "a family with a table has something to scale"
    statistics = {stage.refs[0].name: stage.inputs for stage in block.stages}
    for place in places:
        s = place.tie(torch.rand(place.stages[0].refs[0].shape[1]).mul(3).exp())
        place.scale(s)
    after = run(ids)
    tolerance = 1e-9 if before.dtype == torch.float64 else 1e-4
    assert torch.allclose(before, after, rtol=tolerance, atol=tolerance)
    # what the stages know of their inputs is what calibration would see now
    sums = collect_inputs([stage.refs for stage in block.stages], run, [ids], WANTED)
    for stage in block.stages:
        seen = sums[stage.refs[0].name].inputs("x")
        assert stage.inputs.hessian is not None and seen.hessian is not None
        scale = float(seen.hessian.abs().max()) or 1.0
        assert torch.allclose(stage.inputs.hessian, seen.hessian, rtol=1e-4, atol=1e-5 * scale)
    assert any(stage.inputs is not statistics[stage.refs[0].name] for stage in block.stages)


def test_the_llama_block_has_four_places() -> None:
    _, _, block = first_block("llama")
    found = [place.producer for place in scalables(block)]
    assert found == ["input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_search_finds_what_outliers_ask_for(name: str) -> None:
    run, ids, block = first_block(name)
    before = run(ids)
    place = next(iter(scalables(block)))
    # a channel that is large in the activations and small in the weights: the function stays as it is
    s = torch.ones(place.stages[0].refs[0].shape[1])
    s[3] = 1 / 40
    place.scale(s)
    method = AWQ()
    weights = [torch.cat([ref.weight.float() for ref in stage.refs]) for stage in place.stages]
    hessians = [stage.inputs.hessian.float() for stage in place.stages]
    best = method.best(place, block.format, "x")
    assert best is not None and float(best[3]) > 2 * float(best.median())
    assert method._loss(weights, hessians, best, block.format) < method._loss(weights, hessians, None, block.format)
    done = method.apply(block)
    assert {"input_layernorm.weight"} <= done.changed
    assert torch.allclose(before, run(ids), rtol=1e-5, atol=1e-5)


def test_a_family_without_a_table_is_told() -> None:
    _, _, block = first_block("llama")
    unknown = Block(name=block.name, module=block.module, topology=None, stages=block.stages, format=block.format)
    done = AWQ().apply(unknown)
    assert not done.changed and "nothing was scaled" in next(iter(done.notes.values()))[0]


def test_scales_are_normalised_and_positive() -> None:
    active = torch.tensor([0.0, 1e-9, 0.1, 1.0, 50.0])
    for ratio in (0.05, 0.5, 0.95):
        s = scales(active, ratio)
        assert bool((s > 0).all()) and float(s.max() * s.min()) == pytest.approx(1, rel=1e-5)


def test_inputs_divided_are_those_of_the_smaller_x() -> None:
    x, s = torch.randn(50, 8, dtype=torch.float64), torch.rand(8).double() + 0.5
    found = Inputs(hessian=x.T @ x, mean_abs=x.abs().mean(0)).divided(s)
    assert torch.allclose(found.hessian, (x / s).T @ (x / s)) and torch.allclose(found.mean_abs, (x / s).abs().mean(0))
