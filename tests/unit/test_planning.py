"""Plans of tiny models: what is predicted against what is lost, files, checkpoints of several formats."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runtime_models import saved, tiny_llama

from fewbits.checkpoints import compressed_tensors
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput
from fewbits.core.progress import Progress
from fewbits.formats import parse_format
from fewbits.pipeline.job import calibration_tokens
from fewbits.pipeline.planning import plan
from fewbits.pipeline.quantize import quantize
from fewbits.planner import candidates
from fewbits.planner.candidates import Group
from fewbits.planner.plan import Plan, read_plan

pytest.importorskip("scipy")
SMALL: dict[str, Any] = {"group_size": 32, "samples": 8, "sequence_length": 64}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(layers=3), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def measured(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measured") / "m.json"
    plan(dense, 4.2, measurements=path, method="rtn", **SMALL)
    return path


def make(dense: Path, measured: Path, bits: float = 4.2, **options: Any) -> Plan:
    return plan(dense, bits, measurements=measured, **{"method": "rtn", **SMALL, **options})


# ---- what is measured


def test_the_predicted_loss_is_the_loss(dense: Path, measured: Path) -> None:
    """Each group alone rounded to 4 bits: KL on the calibration text, measured, against the second-order prediction."""
    from fewbits.runtime.load import load

    model, _ = load(dense)
    ids = calibration_tokens(open_source(dense), None, SMALL["samples"], SMALL["sequence_length"], 0).ids

    def log_probabilities() -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits.log_softmax(-1)

    reference, ratios = log_probabilities(), []
    format = parse_format("int4-asym-g32")
    for group in json.loads(measured.read_text())["groups"].values():
        weights = {name: model.get_submodule(name).weight for name in group["members"]}
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        for weight in weights.values():
            weight.data.copy_(format.quantize(weight.detach()).dequantize())
        lost = float((reference.exp() * (reference - log_probabilities())).sum(-1).mean())
        for name, weight in weights.items():
            weight.data.copy_(kept[name])
        ratios.append(group["options"]["int4-asym-g32"]["loss"] / lost)
    assert all(0.6 < ratio < 1.6 for ratio in ratios), ratios
    assert 0.85 < sum(ratios) / len(ratios) < 1.2, ratios


def test_gptq_is_measured_to_lose_less(dense: Path, measured: Path) -> None:
    found = plan(dense, 4.2, **SMALL).raw["groups"]
    rounded = json.loads(measured.read_text())["groups"]
    losses = [(group["losses"]["int3-asym-g32"], rounded[group["name"]]["options"]["int3-asym-g32"]) for group in found]
    assert sum(ours for ours, _ in losses) < 0.8 * sum(theirs["loss"] for _, theirs in losses)


def test_another_budget_measures_nothing(dense: Path, measured: Path) -> None:
    before, stages = measured.read_bytes(), []
    found = make(dense, measured, 5.0, on_progress=lambda event: stages.append(event.stage))
    assert not stages and measured.read_bytes() == before
    assert 4.9 < found.raw["average"] <= 5.0


def test_a_killed_measurement_continues(dense: Path, measured: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.json"

    class Killed(Exception):
        pass

    def kill(event: Progress) -> None:
        if event.stage == "measure" and event.done == 2:
            raise Killed

    with pytest.raises(Killed):
        make(dense, path, on_progress=kill)
    blocks = {group["block"] for group in json.loads(path.read_text())["groups"].values() if group["options"]}
    assert blocks == {1, 2}
    stages: list[tuple[str, int]] = []
    found = make(dense, path, on_progress=lambda event: stages.append((event.stage, event.total)))
    assert ("measure", 3) in stages and found.layers == make(dense, measured).layers
    assert json.loads(path.read_text())["groups"].keys() == json.loads(measured.read_text())["groups"].keys()


def test_layers_that_a_runtime_fuses_agree(dense: Path, measured: Path) -> None:
    for bits in (3.4, 4.2, 5.7):
        layers = make(dense, measured, bits).layers
        assert len(layers) == 3 * 7
        for block in range(3):
            for part, kinds in (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj"))):
                assert len({layers[f"model.layers.{block}.{part}.{kind}"] for kind in kinds}) == 1


# ---- candidates


def test_what_a_target_rules_out() -> None:
    group = Group(name="g", block=0, kinds=("o_proj",), members={"o": (64, 96)})
    why = {
        (name, target): candidates.why_not(parse_format(name), group, target, torch.device("cpu"))
        for name in ("int3-g32", "int4-g32", "int4-asym-g32", "nf4-g32", "int4-g128")
        for target in ("any", "compressed-tensors", "vllm")
    }
    assert "no product for 3-bit" in (why["int3-g32", "vllm"] or "")
    assert "no zero points" not in (why["int4-asym-g32", "vllm"] or "")
    assert "no zero points" in (why["int4-asym-g32", "compressed-tensors"] or "")
    assert "no nf4-g32" in (why["nf4-g32", "vllm"] or "") and why["nf4-g32", "any"] is None
    assert "larger than the input dimension 96" in (why["int4-g128", "any"] or "")
    assert why["int4-g32", "vllm"] is None and why["int3-g32", "compressed-tensors"] is None
    assert {f.scaling.zero_point for f in candidates.candidates((), None, torch.float32, "vllm")} == {False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2.0}, "take 3.062 at the least"),
        ({"bits": float("nan")}, "nan bits per weight"),
        ({"target": "vlm"}, "unknown target of a plan 'vlm'.*vllm"),
        ({"method": "awq"}, "unknown method to measure a plan with"),
        ({"formats": ["int4-g32"], "group_size": None}, "leaves nothing to choose"),
        ({"formats": ["int4-g32", "int3-g32"]}, "group size 32 given beside formats"),
        ({"formats": ["int4-g32", "int4-g32"], "group_size": None}, "listed twice"),
        ({"formats": ["int4-g32", "nf9-g32"], "group_size": None}, "unknown format"),
        ({"formats": ["nf4-g32", "nf4-g64"], "group_size": None, "target": "vllm"}, "can have none of the formats"),
        ({"ignore": ["*"]}, "nothing to plan"),
        ({"ignore": ["*.dwn_proj"]}, r"'\*\.dwn_proj' matches no layer of the model; nearest: "),
        ({"seed": 1}, "measured with another seed"),
    ],
)
def test_bad_arguments_are_refused_by_name(dense: Path, measured: Path, options: dict[str, Any], message: str) -> None:
    if "ignore" in options or "formats" in options:
        measured = measured.with_name("none.json")
    with pytest.raises(BadInput, match=message):
        make(dense, measured, **options)


# ---- files


def spoil(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(kind="letter"), r"no file of fewbits plan \(its kind is 'letter'\)"),
        (lambda raw: raw.update(version=9), "version 9; this fewbits reads 1"),
        (lambda raw: raw.pop("source"), "does not say which model"),
        (lambda raw: raw.update(source="0" * 64), "for another model"),
        (lambda raw: raw.update(layers=[]), "has no 'layers'"),
        (lambda raw: raw["layers"].update({"model.layers.0.mlp.up_proj": "int9-g32"}), "up_proj: unknown format"),
        (lambda raw: raw["layers"].update({"model.layers.0.mlp.up_proj": 4}), "up_proj is 4; a name such as"),
        (lambda raw: raw["layers"].pop("model.layers.0.mlp.up_proj"), "no format for model.layers.0.mlp.up_proj"),
        (lambda raw: raw["layers"].update({"model.layers.9.up": "int4-g32"}), "names model.layers.9.up, which is not"),
        (lambda raw: raw["layers"].update({"model.layers.0.mlp.up_proj": "int4-g128"}), "group size 128 is larger"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(
    dense: Path, measured: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "plan.json"
    make(dense, measured).write(path)
    assert read_plan(path).layers == make(dense, measured).layers
    spoil(path, change)
    with pytest.raises(BadInput, match=message):
        quantize(dense, plan=path, out=tmp_path / "q", method="rtn", eval_samples=0)
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[1]", "a JSON object is expected"),
        ('{"a": 1, "a": 2}', "duplicate key"),
        ("{}", "no file of fewbits plan \\(it has no kind\\)"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(BadInput, match=message):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(BadInput, match=r"^[^ ]*absent\.json: cannot be read: [^']*; make it again with 'fewbits plan"):
        read_plan(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda options: options.update(bits=7), "takes [0-9]+ bits, the file says 7"),
        (lambda options: options.update(loss=float("nan")), "not finite"),
        (lambda options: options.pop("loss"), "damaged"),
    ],
)
def test_damaged_measurements_are_refused(
    dense: Path, measured: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(measured.read_bytes())
    spoil(path, lambda raw: change(next(iter(raw["groups"].values()))["options"]["int3-asym-g32"]))
    with pytest.raises(BadInput, match=message):
        make(dense, path)


# ---- checkpoints


def logits(directory: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    from fewbits.kernels.reference import KERNEL
    from fewbits.nn import qlinear
    from fewbits.runtime.load import load

    monkeypatch.setattr(qlinear, "choose", lambda spec: KERNEL)
    with torch.no_grad():
        return load(directory)[0](torch.arange(48)[None] * 5 % 256).logits


def test_a_planned_checkpoint_is_what_the_plan_says(dense: Path, measured: Path, tmp_path: Path) -> None:
    found = make(dense, measured)
    out = quantize(dense, plan=found, out=tmp_path / "q", samples=4, sequence_length=64, eval_samples=2)
    certificate = json.loads((out / "certificate.json").read_text())
    assert {layer["name"]: layer["format"] for layer in certificate["layers"]} == found.layers
    assert certificate["size"]["bits_per_weight"] == pytest.approx(found.raw["average"], abs=1e-12)
    assert certificate["scheme"]["name"] == "mixed"
    assert certificate["scheme"]["plan"]["sha256"] == found.digest == certificate["fingerprint"]["plan"]
    assert certificate["checkpoint_format"] == "fewbits"  # zero points in several formats: not for transformers
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    assert {name: entry["format"] for name, entry in modules.items()} == found.layers
    for layer in certificate["layers"]:
        assert layer["relative_error"] <= layer["rtn_relative_error"] * (1 + 1e-6), layer["name"]


def test_bits_alone_plan_and_quantize(dense: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMALL, "samples": 4, "eval_samples": 0}
    out = quantize(dense, bits=4.3, out=tmp_path / "a", **options)
    size = json.loads((out / "certificate.json").read_text())["size"]
    assert 4.1 < size["bits_per_weight"] <= 4.3
    kept = tmp_path / "a.measurements.json"
    before = kept.read_bytes()
    quantize(dense, bits=5.1, out=tmp_path / "b", measurements=kept, **options)
    assert kept.read_bytes() == before and not (tmp_path / "b.measurements.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "W4A16", "bits": 4.0}, "scheme, bits and plan give one"),
        ({"plan": "p.json", "bits": 4.0}, "scheme, bits and plan give one"),
        ({"plan": "p.json", "group_size": 32}, "the plan decides the formats"),
        ({"scheme": "W4A16", "measurements": "m.json"}, "give bits too"),
    ],
)
def test_what_decides_the_formats_is_given_once(
    dense: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        quantize(dense, out=tmp_path / "q", **options)


def test_a_killed_run_resumes_to_the_same_bytes(dense: Path, measured: Path, tmp_path: Path) -> None:
    found = make(dense, measured)
    options: dict[str, Any] = {"plan": found, "samples": 4, "sequence_length": 64, "eval_samples": 2}

    def kill(event: Progress) -> None:
        if event.stage == "quantize" and event.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(dense, out=tmp_path / "a", on_progress=kill, **options)
    with pytest.raises(BadInput, match=r"used other settings.*plan"):
        quantize(dense, out=tmp_path / "a", **{**options, "plan": make(dense, measured, 5.0)})
    resumed = quantize(dense, out=tmp_path / "a", **options)
    whole = quantize(dense, out=tmp_path / "b", **options)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


WITHOUT_FEWBITS = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    save_file({"logits": model(torch.arange(48)[None] * 5 % 256).logits}, sys.argv[2])
assert "fewbits" not in sys.modules
"""


def test_transformers_alone_reads_several_formats(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("compressed_tensors")
    found = plan(dense, 4.6, target="compressed-tensors", method="rtn", **SMALL)
    assert len(found.formats) > 1
    out = quantize(dense, plan=found, out=tmp_path / "q", method="rtn", eval_samples=0)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors" and len(config["config_groups"]) == len(found.formats)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FEWBITS, str(out), str(tmp_path / "logits")],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    theirs, ours = load_file(tmp_path / "logits")["logits"], logits(out, monkeypatch)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_native_and_compressed_tensors_hold_the_same_mix(
    dense: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make(dense, measured)
    kinds = [
        quantize(dense, plan=found, out=tmp_path / kind, method="rtn", eval_samples=0, checkpoint_format=kind)
        for kind in ("native", "compressed-tensors")
    ]
    assert torch.equal(*(logits(out, monkeypatch) for out in kinds))


def test_a_mix_that_transformers_would_misread_is_named() -> None:
    mixed = [parse_format("int4-asym-g32"), parse_format("int3-asym-g32")]
    assert "no zero points" in (compressed_tensors.refuses_mix(mixed) or "")
    assert compressed_tensors.refuses_mix(mixed[:1] * 3) is None
    assert compressed_tensors.refuses_mix([parse_format("int4-g32"), parse_format("int8-channel")]) is None


def test_fused_experts_are_one_group(tmp_path: Path) -> None:
    """Measured through the gradients of the fused parameters; predicted against the loss of changing them."""
    from fewbits.runtime.load import load

    model = tiny_llama(
        layers=2, model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    saved(model, tmp_path / "m")
    found = plan(tmp_path / "m", 5.0, method="rtn", measurements=tmp_path / "x.json", **SMALL)
    experts = [group for group in found.raw["groups"] if "down_proj" in group["kinds"]]
    assert [group["name"] for group in experts] == [
        f"model.layers.{block}.mlp.experts.gate_proj+up_proj+down_proj" for block in range(2)
    ]
    assert (
        len({found.layers[f"model.layers.0.mlp.experts.{e}.{p}_proj"] for e in range(4) for p in ("up", "down")}) == 1
    )

    loaded, _ = load(tmp_path / "m")
    ids = calibration_tokens(open_source(tmp_path / "m"), None, SMALL["samples"], SMALL["sequence_length"], 0).ids
    format = parse_format("int4-asym-g32")
    for group in experts:
        owner = loaded.get_submodule(group["name"].rpartition(".")[0])
        with torch.no_grad():
            before = loaded(ids).logits.log_softmax(-1)
            kept = {name: value.clone() for name, value in owner.named_parameters()}
            for parameter in owner.parameters():
                for matrix in parameter:
                    matrix.copy_(format.quantize(matrix).dequantize())
            lost = float((before.exp() * (before - loaded(ids).logits.log_softmax(-1))).sum(-1).mean())
            for name, value in kept.items():
                owner.get_parameter(name).copy_(value)
        assert 0.6 < group["losses"]["int4-asym-g32"] / lost < 1.6

    out = quantize(tmp_path / "m", plan=found, out=tmp_path / "q", method="rtn", eval_samples=0)
    layers = json.loads((out / "certificate.json").read_text())["layers"]
    assert {layer["name"]: layer["format"] for layer in layers} == found.layers


# ---- the command


def test_the_command_writes_plan_figure_and_table(
    dense: Path, measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from fewbits.cli.main import app

    out = tmp_path / "plan.json"
    words = ["plan", str(dense), "--bits", "4.2", "-o", str(out), "--measurements", str(measured), "--method", "rtn"]
    words += ["--group-size", "32", "--samples", "8", "--sequence-length", "64"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "bits per weight of 4.2 asked for" in done.output and "q_proj+k_proj+v_proj" in done.output
    assert read_plan(out).layers == make(dense, measured).layers
    assert out.with_suffix(".png").stat().st_size > 1000 and out.with_suffix(".svg").exists()
