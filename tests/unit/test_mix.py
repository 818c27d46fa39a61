"""Several formats within a linear: what is stored and counted, the sweep over the parts, the way to a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runtime_models import byte_tokenizer, tiny_llama
from torch import Tensor

from fewbits.algorithms.base import damped_hessian, proxy_loss
from fewbits.algorithms.gptq import GPTQ
from fewbits.algorithms.mixes import solve
from fewbits.calibration.stats import Inputs
from fewbits.checkpoints.codecs import StoredMix, quantized_modules
from fewbits.checkpoints.native import read_modules
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, Unsupported
from fewbits.core.progress import Progress
from fewbits.formats import parse_format
from fewbits.formats.mix import Mix, Mixed, parse_mix
from fewbits.nn.mixed_linear import MixedLinear
from fewbits.pipeline.convert import convert
from fewbits.pipeline.planning import plan
from fewbits.pipeline.quantize import quantize
from fewbits.planner.plan import Plan
from fewbits.runtime.engine import Engine
from fewbits.runtime.load import load, load_all

MIX = "int4-g32@25+int3-g32"


def problem(rows: int = 24, columns: int = 128, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Inputs]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(columns, dtype=torch.float64) + 0.1 * torch.randn(
        columns, columns, generator=generator, dtype=torch.float64
    )
    x = torch.randn(2000, columns, generator=generator, dtype=torch.float64) @ mixing
    x *= torch.rand(columns, generator=generator, dtype=torch.float64) * 3 + 0.1
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight.to(dtype), Inputs(hessian=2 / len(x) * x.T @ x, tokens=len(x))


def quantized(mix: Mix, weight: Tensor, inputs: Inputs) -> Mixed:
    found = solve(GPTQ(), (), weight, mix, inputs, "w").quantized
    assert isinstance(found, Mixed)
    return found


# ---- what a mix is


@pytest.mark.parametrize("name", [MIX, "int5-asym-g64@10+int4-asym-g64@30+int2-asym-g64", "nf4-g16@12+int3-channel"])
def test_a_name_says_all(name: str) -> None:
    mix = parse_mix(name)
    assert mix.name == name
    sizes = mix.columns(576)
    assert sum(sizes) == 576
    for format, size, share in zip(mix.formats, sizes, mix.shares, strict=False):
        width = format.scaling.width(1)
        assert size % width == 0 and abs(size - share * 5.76) <= width / 2
    assert sum(mix.columns(sum(format.scaling.width(1) for format in mix.formats))) >= len(mix.formats)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int4-g32+int3-g32", "has no share"),
        ("int4-g32@0+int3-g32", "has no share"),
        ("int4-g32@60+int3-g32@40+int2-g32", "leave of 100"),
        ("int4-g32@25+int4-g32", "of one format"),
        ("nvfp4@25+int3-g32", "shared between rows"),
        ("int4-g32@25+x", "unknown format"),
    ],
)
def test_what_is_no_mix_is_refused(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse_mix(name)


def test_a_linear_too_narrow_for_the_parts_is_refused() -> None:
    with pytest.raises(BadInput, match=r"64 \+ 64 channels at the least"):
        parse_mix("int4-g64@25+int3-g64").columns(96)


@pytest.mark.parametrize("name", [MIX, "int4-g32@25+nf4-g16@25+int2-g32"])
def test_bits_are_those_of_all_tensors(name: str) -> None:
    weight, inputs = problem()
    mix = parse_mix(name).with_scale_dtype(torch.bfloat16)
    state = quantized(mix, weight, inputs).to_state()
    assert {key: (tuple(value.shape), value.dtype) for key, value in state.items()} == mix.layout((24, 128))
    assert sum(8 * tensor.nbytes for tensor in state.values()) == mix.bits_per_weight((24, 128)) * 24 * 128


def test_what_is_stored_is_read_back_and_damage_is_named() -> None:
    weight, inputs = problem()
    mix = parse_mix("int4-asym-g32@25+int3-asym-g32").with_scale_dtype(torch.bfloat16)
    found = quantized(mix, weight, inputs)
    state = found.to_state()
    assert torch.equal(Mixed.from_state(mix, (24, 128), state).dequantize(), found.dequantize())
    with pytest.raises(BadInput, match="deals"):
        Mixed.from_state(mix, (24, 128), {**state, "part": torch.zeros_like(state["part"])})
    with pytest.raises(BadInput, match=r"codes is"):
        Mixed.from_state(mix, (24, 128), {**state, "1.codes": state["0.codes"]})


# ---- the sweep


def test_the_dearest_channels_are_in_the_first_part() -> None:
    weight, inputs = problem()
    found = quantized(parse_mix(MIX), weight, inputs)
    assert inputs.hessian is not None
    cost = inputs.hessian.diagonal() * weight.square().sum(0)
    first, second = (cost[columns] for columns in found.columns())
    assert len(first) == 32 and float(first.min()) >= float(second.max())
    assert all(torch.equal(columns, columns.sort().values) for columns in found.columns())


def test_parts_solved_in_turn_are_one_sweep_of_gptq() -> None:
    """Against the algorithm as the paper states it: column by column, one Hessian, formats changing on the way."""
    weight, inputs = problem()
    mix = parse_mix(MIX).with_scale_dtype(torch.bfloat16)
    method = GPTQ(act_order=False, search=None, damping=1e-13)
    found = solve(method, (), weight, mix, inputs, "w").quantized
    assert isinstance(found, Mixed) and inputs.hessian is not None
    coarse_first = list(zip(found.columns(), mix.formats, strict=True))[::-1]
    order = torch.cat([columns for columns, _ in coarse_first])
    damped = damped_hessian(inputs.hessian, 0.01)[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    remaining, start, expected = weight[:, order].clone(), 0, []
    for columns, format in coarse_first:
        stop = start + len(columns)
        scale, _ = format.params(remaining[:, start:stop])
        for i in range(start, stop):
            own = scale[:, (i - start) // 32].double()
            code = format.encode(remaining[:, i], own, None)
            expected.append(code)
            error = (remaining[:, i] - format.decode(code, own, None, torch.float64)) / upper[i, i]
            remaining[:, i:] -= torch.outer(error, upper[i, i:])
        start = stop
    codes = torch.stack(expected, dim=1)
    assert torch.equal(torch.cat([found.parts[1].codes, found.parts[0].codes], dim=1), codes)


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_refining_goes_over_the_parts_and_gains(method: str) -> None:
    from fewbits.algorithms.compose import compose

    weight, inputs = problem(dtype=torch.float32)
    assert inputs.hessian is not None
    mix = parse_mix("int4-asym-g32@25+int2-asym-g32").with_scale_dtype(torch.bfloat16)
    losses = []
    for names in (method, f"{method},refine"):
        recipe = compose(names)
        found = solve(recipe.weights, recipe.refinements, weight, mix, inputs, "w")
        losses.append(float(proxy_loss(weight - found.quantized.dequantize(), inputs.hessian).sum()))
        assert found.loss is not None and float(found.loss.sum()) == pytest.approx(losses[-1], rel=1e-5)
    assert losses[1] < losses[0]


def test_inputs_that_never_came_are_rounded() -> None:
    weight, _ = problem(dtype=torch.float32)
    nothing = Inputs(hessian=torch.zeros(128, 128, dtype=torch.float64), tokens=0)
    for inputs in (nothing, Inputs()):
        found = quantized_by_rounding(weight, inputs)
        assert torch.isfinite(found.dequantize()).all()


def quantized_by_rounding(weight: Tensor, inputs: Inputs) -> Mixed:
    from fewbits.algorithms.rtn import RTN

    found = solve(RTN(), (), weight, parse_mix(MIX), inputs, "w").quantized
    assert isinstance(found, Mixed)
    return found


# ---- the module


def test_the_module_multiplies_by_the_weight_wherever_it_is_put() -> None:
    weight, inputs = problem(dtype=torch.float32)
    found = quantized(parse_mix("int4-asym-g32@25+int3-asym-g32").with_scale_dtype(torch.bfloat16), weight, inputs)
    bias = torch.randn(24)
    module = MixedLinear.from_mixed(found, bias)
    x = torch.randn(2, 5, 128)
    expected = x @ found.dequantize().T + bias
    assert float((module(x) - expected).norm() / expected.norm()) < 0.01
    assert torch.equal(module.dequantize(), found.dequantize())

    other = MixedLinear(128, 24, found.format, bias=True, device="meta").to_empty(device="cpu")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    half = other.to(torch.bfloat16)
    assert half.part.dtype == torch.uint8 and half.parts[0].scale.dtype == torch.bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16


# ---- the pipeline


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    tiny_llama(layers=2).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def planned(dense: Path) -> Plan:
    """Some layers in one format, some in a mix of two."""
    found = plan(dense, 4.9, within=True, measurements=dense / "m.json", group_size=16, samples=4, sequence_length=64)
    assert any("+" in format for format in found.formats) and any("+" not in format for format in found.formats)
    return found


@pytest.fixture(scope="module")
def mixed(dense: Path, planned: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "q"
    return quantize(dense, plan=planned, out=out, samples=4, sequence_length=64, eval_samples=2, method="gptq,refine")


def test_the_plan_takes_mixes_where_they_pay_and_says_why(dense: Path, planned: Plan) -> None:
    before = (dense / "m.json").read_bytes()
    options: dict[str, Any] = {"measurements": dense / "m.json", "group_size": 16, "samples": 4, "sequence_length": 64}
    without = plan(dense, 4.9, **options)
    assert (dense / "m.json").read_bytes() == before, "all was measured already"
    assert not any("+" in format for format in without.raw["formats"])
    assert planned.raw["predicted_kl"] < without.raw["predicted_kl"]
    assert planned.raw["average"] <= 4.9
    told = next(group for group in planned.raw["groups"] if "+" in group["format"])
    assert "would add" in told["why"] or "would save" in told["why"]


def test_bits_of_the_certificate_are_those_of_the_plan(planned: Plan, mixed: Path) -> None:
    certificate = json.loads((mixed / "certificate.json").read_text())
    assert {layer["name"]: layer["format"] for layer in certificate["layers"]} == planned.layers
    assert certificate["size"]["bits_per_weight"] == pytest.approx(planned.raw["average"], abs=1e-12)
    config = json.loads((mixed / "config.json").read_text())["quantization_config"]
    assert config["version"] == 7
    for layer in certificate["layers"]:
        assert layer["relative_error"] <= layer["rtn_relative_error"] * (1 + 1e-6), layer["name"]


def test_every_way_to_load_gives_the_same_logits(mixed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(48)[None] * 5 % 256
    loaded = load_all(mixed)
    assert any(isinstance(module, MixedLinear) for module in loaded.model.modules())
    with torch.no_grad():
        expected = loaded.model(ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32)
        assert torch.equal(theirs(ids).logits, expected)
        loaded.model.save_pretrained(tmp_path / "again")
        byte_tokenizer().save_pretrained(tmp_path / "again")
        assert torch.equal(load(tmp_path / "again")[0](ids).logits, expected)
    engine = Engine(loaded.model)
    engine.prefill(ids[0, :-1].tolist())
    found = engine.step(int(ids[0, -1])).flatten()
    assert float((found - expected[0, -1]).norm() / expected[0, -1].norm()) < 0.02


def test_an_interrupted_run_continues_to_the_same_bytes(
    dense: Path, planned: Plan, mixed: Path, tmp_path: Path
) -> None:
    def stop(event: Progress) -> None:
        if event.stage == "quantize" and event.done == 1:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"plan": planned, "samples": 4, "sequence_length": 64, "eval_samples": 2}
    with pytest.raises(KeyboardInterrupt):
        quantize(dense, out=tmp_path / "q", method="gptq,refine", on_progress=stop, **options)
    out = quantize(dense, out=tmp_path / "q", method="gptq,refine", **options)
    assert (out / "model.safetensors").read_bytes() == (mixed / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["gguf", "compressed-tensors"])
def test_checkpoints_that_cannot_say_it_are_refused(dense: Path, planned: Plan, tmp_path: Path, kind: str) -> None:
    with pytest.raises(Unsupported, match=r"all input channels of a linear.*native"):
        quantize(dense, plan=planned, out=tmp_path / "q", checkpoint_format=kind, samples=4, eval_samples=0)


@pytest.mark.parametrize("method", ["gptq,lowrank", "gptq,learned"])
def test_steps_that_know_one_format_are_refused(dense: Path, planned: Plan, tmp_path: Path, method: str) -> None:
    with pytest.raises(Unsupported, match=rf"without --within, or leave {method.partition(',')[2]} out"):
        quantize(dense, plan=planned, out=tmp_path / "q", method=method, samples=4, eval_samples=0)


def test_a_conversion_decodes_and_rounds_again_or_refuses(mixed: Path, tmp_path: Path) -> None:
    modules = quantized_modules(open_source(mixed, allow_quantized=True))
    name = next(name for name in modules.entries if isinstance(modules.read(name), StoredMix))
    with pytest.raises(Unsupported, match=r"several formats.*--requantize"):
        convert(mixed, "compressed-tensors", tmp_path / "refused")
    convert(mixed, "dense", tmp_path / "dense", dtype=torch.float32)
    dense = open_source(tmp_path / "dense").tensor(f"{name}.weight")
    assert torch.equal(dense, modules.dense(name))
    done = convert(mixed, "compressed-tensors", tmp_path / "again", requantize=True)
    assert done.actions["requantized"] >= 1


def test_targets_that_know_one_format_are_planned_without(dense: Path) -> None:
    options: dict[str, Any] = {"within": True, "group_size": 16, "method": "rtn", "samples": 2, "sequence_length": 32}
    found = plan(dense, 4.9, target="compressed-tensors", **options)
    assert not any("+" in format for format in found.formats)
    assert any("one linear has one format" in why for group in found.raw["groups"] for why in group["refused"].values())


def test_bits_are_asked_for_with_within(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="give bits too"):
        quantize(dense, "W4A16", within=True, out=tmp_path / "q")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "int4-g64@25+int3-g64"}, "channels at the least"),
        ({"residual": {"rank": 2, "dtype": "bfloat16"}}, "residual beside"),
        ({"input_order": True}, "input_order beside"),
    ],
)
def test_what_a_configuration_may_say(change: dict[str, Any], message: str) -> None:
    entry = {"format": MIX, "shape": [8, 64], "scale_dtype": "bfloat16", "activations": None}
    assert read_modules({"version": 7, "modules": {"m": entry}})["m"].format == parse_mix(MIX).with_scale_dtype(
        torch.bfloat16
    )
    with pytest.raises(BadInput, match=message):
        read_modules({"version": 7, "modules": {"m": {**entry, **change}}})


def test_the_format_of_most_columns_is_the_main_one() -> None:
    assert parse_mix(MIX).main == parse_format("int3-g32")
