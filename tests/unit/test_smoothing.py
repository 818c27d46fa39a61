"""SmoothQuant: its own laws in float64, and blocks that compute what they did."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from test_awq import first_block
from test_pipeline import run as quantized
from tiny_runtime_models import llama_with_outliers, saved

from fewbits.algorithms.channels import RoundedLoss, scalables
from fewbits.algorithms.compose import compose
from fewbits.algorithms.smoothing import SmoothQuant, smoothing_scales
from fewbits.core.errors import BadInput
from fewbits.formats import parse_format


def layer() -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    x[:, 3] *= 60
    x[:, 7] = 0
    return x, [torch.randn(rows, 32, generator=generator, dtype=torch.float64) for rows in (16, 8)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_the_product_stays_and_the_difficulty_moves(alpha: float) -> None:
    x, weights = layer()
    active, heavy = x.abs().amax(0), torch.cat(weights).abs().amax(0)
    s = smoothing_scales(active, weights, alpha)
    assert bool((s > 0).all()) and float(s[7]) == 1
    for weight in weights:
        exact = x @ weight.T
        assert float(((x / s) @ (weight * s).T - exact).norm() / exact.norm()) <= 1e-12
    alive = active > 0
    expected = active.pow(1 - alpha) * heavy.pow(1 - alpha)
    assert torch.allclose((x / s).abs().amax(0)[alive], expected[alive], rtol=1e-12)


def test_at_one_half_both_sides_are_equally_hard() -> None:
    x, weights = layer()
    s = smoothing_scales(x.abs().amax(0), weights)
    alive = x.abs().amax(0) > 0
    ends = (x / s).abs().amax(0), (torch.cat(weights) * s).abs().amax(0)
    assert torch.allclose(ends[0][alive], ends[1][alive], rtol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(BadInput, match=r"alpha 1\.5"):
        smoothing_scales(torch.ones(4), [torch.ones(2, 4)], 1.5)
    with pytest.raises(BadInput, match="4 activation channels for weights of 5 columns"):
        smoothing_scales(torch.ones(4), [torch.ones(2, 5)])


def block_with_rows(name: str, activations: str | None = "int8-token"):
    run, ids, block = first_block(name)
    block = dataclasses.replace(
        block, format=parse_format("int8-channel"), activations=activations and parse_format(activations)
    )
    for stage in block.stages:
        rows = torch.randn(64, stage.refs[0].shape[1], generator=torch.Generator().manual_seed(1))
        rows[:, 5] *= 40
        largest = rows.abs().amax(0)
        stage.inputs = dataclasses.replace(stage.inputs, rows=rows, max_abs=largest, ordinary=largest)
    return run, ids, block


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("alpha", [None, 0.5, 0.85])
def test_a_smoothed_block_computes_what_it_did(name: str, alpha: float | None) -> None:
    """Biases of norms and of v, heads that share a value head, experts behind one norm: all are scaled along."""
    run, ids, block = block_with_rows(name)
    before = run(ids)
    done = SmoothQuant(alpha=alpha).apply(block)
    tolerance = 1e-10 if before.dtype == torch.float64 else 1e-5
    assert float((run(ids) - before).norm() / before.norm()) < tolerance
    assert any("norm" in parameter for parameter in done.changed)
    assert not done.notes


def test_the_search_takes_what_helps() -> None:
    _, _, block = block_with_rows("llama")
    for place in scalables(block):
        alpha, s = SmoothQuant().best(place, block)
        assert s is not None and float(s[5]) > 2 * float(s.median()) and 0 < alpha <= 1
        of = RoundedLoss(place.stages, block)
        least = of(s)
        assert least < 0.7 * of(None)
        others = [SmoothQuant(alpha=step / 10).best(place, block)[1] for step in range(11)]
        assert least < 1.1 * min(of(other) for other in others)  # chosen on half of the rows, by the other half


def test_channels_that_fire_now_and_then_are_not_taken_for_quiet() -> None:
    """What down_proj reads: every token has another large channel, and few of them are in the sample."""
    _, _, block = block_with_rows("llama")
    place = next(place for place in scalables(block) if place.producer.endswith("up_proj"))
    (stage,) = place.stages
    width, generator = stage.inputs.rows.shape[1], torch.Generator().manual_seed(2)

    def text(tokens: int) -> torch.Tensor:
        rows = torch.randn(tokens, width, generator=generator)
        return rows.scatter_(1, torch.randint(width, (tokens, 1), generator=generator), 40.0)

    rows, later = text(64), text(512)
    size = rows.abs().amax(0)
    stage.inputs = dataclasses.replace(stage.inputs, rows=rows, max_abs=size, ordinary=size)
    half, (_, found) = SmoothQuant(alpha=0.5).best(place, block)[1], SmoothQuant().best(place, block)
    seen = RoundedLoss(place.stages, block)
    assert seen(half) < 0.8 * seen(None)  # what one would believe
    stage.inputs = dataclasses.replace(stage.inputs, rows=later)
    of = RoundedLoss(place.stages, block)
    assert of(half) > 3 * of(None) and of(found) < 1.2 * of(None)


def test_only_behind_norms_as_in_the_paper() -> None:
    _, _, block = block_with_rows("llama")
    kept = [ref.weight.clone() for stage in block.stages for ref in stage.refs if ref.kind in ("o_proj", "down_proj")]
    changed = SmoothQuant(alpha=0.5, products=False).apply(block).changed
    assert changed == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    now = [ref.weight for stage in block.stages for ref in stage.refs if ref.kind in ("o_proj", "down_proj")]
    assert len(now) == 2 and all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))


def test_nothing_is_smoothed_where_it_would_not_help() -> None:
    run, ids, block = block_with_rows("llama", None)
    before = run(ids)
    done = SmoothQuant(alpha=0.5).apply(block)
    assert not done.changed and "not rounded" in next(iter(done.notes.values()))[0]
    assert torch.equal(run(ids), before)
    unknown = dataclasses.replace(block, topology=None, activations=parse_format("int8-token"))
    assert "no table" in next(iter(SmoothQuant().apply(unknown).notes.values()))[0]


def test_options_are_checked() -> None:
    for options in ({"alpha": 1.5}, {"steps": 0}):
        with pytest.raises(BadInput, match="alpha"):
            compose("smoothquant", options)
    assert compose("gptq,smoothquant").names == ("smoothquant", "gptq")


def test_outliers_are_what_it_is_for(tmp_path: Path) -> None:
    saved(llama_with_outliers((3, 40), intermediate_size=192), tmp_path / "dense")
    kl = {}
    for method in ("rtn", "smoothquant", "smoothquant,gptq"):
        out = quantized(tmp_path / "dense", tmp_path / method, "W8A8", method=method)
        kl[method] = json.loads((out / "certificate.json").read_text())["evaluations"][0]["kl"]["mean"]
    assert kl["smoothquant"] < 0.3 * kl["rtn"] and kl["smoothquant,gptq"] < 0.3 * kl["rtn"]


def test_sinks_keep_the_columns_that_only_they_use() -> None:
    """A channel that only a sink uses: scaled by what others have there, its column of the weights would vanish."""
    _, _, block = block_with_rows("llama")
    place = next(place for place in scalables(block) if place.producer.endswith("up_proj"))
    (stage,) = place.stages
    rows, channel = stage.inputs.rows.clone(), 9
    rows[:, channel] = 1e-6
    stage.inputs = dataclasses.replace(stage.inputs, ordinary=rows.abs().amax(0))
    rows[0] = 0
    rows[0, channel] = 1e4
    stage.inputs = dataclasses.replace(stage.inputs, rows=rows, max_abs=rows.abs().amax(0))
    _, s = SmoothQuant().best(place, block)
    factor = torch.ones(rows.shape[1]) if s is None else s
    weight = stage.refs[0].weight.float()
    kept = block.format.quantize(weight * factor).dequantize()[:, channel] / factor[channel]
    assert float((kept - weight[:, channel]).norm() / weight[:, channel].norm()) < 0.05
