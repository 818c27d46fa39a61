"""The pipeline on tiny models: what it writes, that it resumes to the same bytes, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runtime_models import byte_tokenizer, saved, tiny_llama

from fewbits.calibration.data import pack, read_texts
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.core.progress import Progress
from fewbits.pipeline import journal as journal_module
from fewbits.pipeline.quantize import quantize

SMALL: dict[str, Any] = {"samples": 4, "sequence_length": 64, "eval_samples": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(layers=3), tmp_path_factory.mktemp("dense"))


def run(model: Path, out: Path, scheme: str = "int4-asym-g32", **options: Any) -> Path:
    return quantize(str(model), scheme, out=out, **{**SMALL, **options})


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(dense, tmp_path_factory.mktemp("out") / "q")


def test_what_is_in_the_directory(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "certificate.json",
        "README.md",
        "generation_config.json",
    } <= names
    assert not list(finished.parent.glob(".*"))
    certificate = json.loads((finished / "certificate.json").read_text())
    assert len(certificate["layers"]) == 3 * 7
    assert certificate["evaluations"][0]["kl"]["mean"] > 0
    assert certificate["calibration"]["sha256"] and certificate["environment"]["versions"]["torch"]
    for layer in certificate["layers"]:
        assert layer["relative_error"] <= layer["rtn_relative_error"] * (1 + 1e-6), layer["name"]


def test_every_source_tensor_is_accounted_for(dense: Path, finished: Path) -> None:
    account = {entry["name"]: entry for entry in json.loads((finished / "certificate.json").read_text())["tensors"]}
    source = tensors(dense)
    assert set(source) <= set(account)
    assert account["lm_head.weight"]["action"] == "tied"
    written = tensors(finished)
    for name, entry in account.items():
        module = name.removesuffix(".weight")
        if entry["action"] == "quantized":
            assert f"{module}.weight_packed" in written and name not in written
        if entry["action"] == "kept":
            assert torch.equal(written[name], source[name])


def test_the_measured_loss_is_that_of_the_written_checkpoint(dense: Path, finished: Path) -> None:
    """What was measured block by block is what loading both models and comparing them gives."""
    from fewbits.evaluation import evaluate

    stated = json.loads((finished / "certificate.json").read_text())["evaluations"][0]
    length = stated["text"]["sequence_length"]
    found = evaluate(str(finished), against=str(dense), samples=2, sequence_length=length)
    assert found.text["sha256"] == stated["text"]["sha256"]
    assert found.kl is not None
    assert found.kl.mean == pytest.approx(stated["kl"]["mean"], rel=0.03)
    assert found.perplexity.mean == pytest.approx(stated["perplexity"]["mean"], rel=0.01)


WITHOUT_FEWBITS = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    dtype = torch.bfloat16 if "MXFP4" in directory else torch.float32  # the library decodes MX to bfloat16 alone
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    save_file({"logits": model(torch.arange(48)[None] * 5 % 256).logits.float().detach()}, directory + ".logits")
assert "fewbits" not in sys.modules
"""
# Relative difference of logits allowed (reference kernel, kernel of this machine). Weight-only products agree to
# float32 rounding by the reference and to bfloat16 rounding of x by the 4-bit CPU kernel. Where activations are
# rounded dynamically, the last bit of x decides which of two levels it takes, on a random model as good as noise.
SAME_LOGITS = {
    "int4-asym-g32": (1e-5, 0.02),
    "int3-g32": (1e-5, 0.02),
    "W8A16": (1e-5, 0.01),
    "W8A8": (0.02, 0.02),
    "W8A8_STATIC": (0.02, 0.02),
    "int8-channel/int8-asym-tensor-static": (0.02, 0.02),
    "FP8_DYNAMIC": (1e-3, None),
    "MXFP4A16": (0.02, 0.02),
}


def test_transformers_alone_computes_the_same_logits(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through transformers and compressed-tensors, in a process that never imports fewbits."""
    import subprocess
    import sys

    from fewbits.kernels.reference import KERNEL
    from fewbits.nn import qlinear
    from fewbits.runtime.load import load

    outs = {
        scheme: run(dense, tmp_path / scheme.replace("/", "_"), scheme, method="rtn", eval_samples=0)
        for scheme in SAME_LOGITS
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FEWBITS, *map(str, outs.values())],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]

    def difference(scheme: str) -> float:
        theirs = load_file(f"{outs[scheme]}.logits")["logits"]
        with torch.no_grad():
            ours = load(outs[scheme])[0](torch.arange(48)[None] * 5 % 256).logits
        return float((ours - theirs).norm() / theirs.norm())

    for scheme, (_, bound) in SAME_LOGITS.items():
        assert bound is None or difference(scheme) < bound, scheme
    monkeypatch.setattr(qlinear, "choose", lambda spec: KERNEL)
    for scheme, (bound, _) in SAME_LOGITS.items():
        assert difference(scheme) < bound, scheme


NATIVE = ["nf4-g32", "nf4-g32-dq", "fp4_e2m1-g16", "int4-g48", "int4-narrow-g32", "fp8_e5m2-channel"]
NATIVE += ["nvfp4", "nvfp4_4over6", "fp8_block"]


@pytest.mark.parametrize("scheme", NATIVE)
def test_what_compressed_tensors_cannot_say_goes_out_native(dense: Path, tmp_path: Path, scheme: str) -> None:
    from fewbits.runtime.load import load

    out = run(dense, tmp_path / "q", scheme, eval_samples=0)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fewbits"
    model, _ = load(out)
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()
    assert json.loads((out / "certificate.json").read_text())["evaluations"] == []


class Stop(Exception):
    """Stands for a power cut: nothing in the pipeline knows it."""


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_an_interrupted_run_continues_to_the_same_bytes(
    dense: Path, finished: Path, tmp_path: Path, blocks: int
) -> None:
    out = tmp_path / "q"

    def stop(progress: Progress) -> None:
        if (progress.stage, progress.done) == ("quantize", blocks):
            raise Stop

    with pytest.raises(Stop):
        run(dense, out, on_progress=stop)
    assert not out.exists()
    seen: list[Progress] = []
    run(dense, out, on_progress=seen.append)
    assert next(p for p in seen if p.stage == "quantize").done == blocks
    assert same(tensors(out), tensors(finished))
    assert not list(tmp_path.glob(".*"))


def test_a_finished_run_is_not_repeated(dense: Path, finished: Path) -> None:
    seen: list[Progress] = []
    run(dense, finished, on_progress=seen.append)
    assert [p.stage for p in seen] == ["done"]


def test_windows_of_tokens_calibrate_as_the_text_they_were_cut_from(
    dense: Path, finished: Path, tmp_path: Path
) -> None:
    texts, described = read_texts()
    windows = pack(texts, byte_tokenizer(), sequence_length=64, samples=4, description=described)
    out = run(dense, tmp_path / "q", calibration=windows, samples=None, sequence_length=None)
    assert same(tensors(out), tensors(finished))
    found, wanted = (json.loads((each / "certificate.json").read_text())["calibration"] for each in (out, finished))
    assert found == wanted


def test_an_unfinished_run_with_other_settings_is_not_touched(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"

    def stop(progress: Progress) -> None:
        if progress.done == 1:
            raise Stop

    with pytest.raises(Stop):
        run(dense, out, on_progress=stop)
    with pytest.raises(BadInput, match=r"other settings \(scheme\).*--restart"):
        run(dense, out, "int3-asym-g32")
    assert run(dense, out, "int3-asym-g32", restart=True).is_dir()


def test_shards_and_index(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    from fewbits.pipeline import output
    from fewbits.runtime.load import load

    monkeypatch.setattr(output.write_shards, "__defaults__", (60_000,))
    out = run(dense, tmp_path / "q")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert same(tensors(out), tensors(finished))
    load(out)


def test_true_sequential_and_methods(dense: Path, tmp_path: Path) -> None:
    certificate = json.loads((run(dense, tmp_path / "q", sequential=True) / "certificate.json").read_text())
    assert certificate["method"]["sequential"] is True
    assert {layer["tokens"] for layer in certificate["layers"]} == {4 * 64}


def test_experts_are_quantized_too(tmp_path: Path) -> None:
    from fewbits.runtime.load import load

    model = tiny_llama(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, tied=False,
        decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    saved(model, tmp_path / "moe")
    out = run(tmp_path / "moe", tmp_path / "q")
    certificate = json.loads((out / "certificate.json").read_text())
    experts = [layer for layer in certificate["layers"] if ".experts." in layer["name"]]
    assert len(experts) == 2 * 4 * 3
    assert sum(layer["tokens"] for layer in experts if layer["kind"] == "gate_proj") == 2 * 2 * 4 * 64
    account = {entry["name"]: entry["action"] for entry in certificate["tensors"]}
    assert account["model.layers.0.mlp.experts.0.gate_proj.weight"] == "quantized"
    assert account["model.layers.0.mlp.gate.weight"] == "kept"
    loaded, _ = load(out)
    assert torch.isfinite(loaded(torch.arange(20)[None]).logits).all()


def test_ignored_layers_stay_dense(dense: Path, tmp_path: Path) -> None:
    from fewbits.runtime.load import load

    named = ("lm_head", r"re:.*\.down_proj$", "model.layers.0.self_attn.*", "model.embed_tokens")  # the last anyway
    out = run(dense, tmp_path / "q", ignore=named)
    written = tensors(out)
    assert "model.layers.1.mlp.down_proj.weight" in written
    assert "model.layers.0.self_attn.q_proj.weight" in written
    assert "model.layers.1.self_attn.q_proj.weight_packed" in written
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.2.mlp.down_proj" in ignored and "lm_head" in ignored
    load(out)


# --- bad input ------------------------------------------------------------------------------------


def broken(dense: Path, tmp_path: Path, change: Callable[[Path], None]) -> Path:
    directory = tmp_path / "model"
    shutil.copytree(dense, directory)
    change(directory)
    return directory


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        found = load_file(directory / "model.safetensors")
        change(found)
        save_file(found, directory / "model.safetensors", {"format": "pt"})

    return apply


def nan_weight(found: dict[str, torch.Tensor]) -> None:
    found["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan


def nan_norm(found: dict[str, torch.Tensor]) -> None:
    found["model.norm.weight"][3] = torch.nan


def drop_weight(found: dict[str, torch.Tensor]) -> None:
    del found["model.layers.1.mlp.up_proj.weight"]


def int_weight(found: dict[str, torch.Tensor]) -> None:
    found["model.layers.1.mlp.up_proj.weight"] = found["model.layers.1.mlp.up_proj.weight"].to(torch.int32)


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def missing_shard(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def outside_shard(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    shutil.move(directory / "model.safetensors", directory.parent / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def small_vocabulary(directory: Path) -> None:
    found = load_file(directory / "model.safetensors")
    found["model.embed_tokens.weight"] = found["model.embed_tokens.weight"][:100].clone()
    save_file(found, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_tensors(nan_weight), r"model\.layers\.2\.mlp\.up_proj\.weight: 1 of .* NaN"),
        (edit_tensors(nan_norm), r"model\.norm\.weight: holds NaN"),
        (edit_tensors(drop_weight), r"up_proj\.weight"),
        (edit_tensors(int_weight), r"up_proj\.weight"),
        (truncate, "model.safetensors"),
        (missing_shard, "model-00001-of-00001.safetensors"),
        (outside_shard, r"\.\./model.safetensors"),
        (small_vocabulary, "vocab|tokenizer"),
        (lambda directory: (directory / "config.json").unlink(), "config.json"),
        (lambda directory: (directory / "config.json").write_text("{"), "config.json"),
    ],
)
def test_damaged_models_are_refused_and_leave_nothing(
    dense: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    model = broken(dense, tmp_path, change)
    out = tmp_path / "outputs" / "q"
    with pytest.raises(BadInput, match=message) as raised:
        run(model, out)
    assert raised.value.exit_code == 2
    assert not out.exists() and not (out.parent.exists() and list(out.parent.iterdir()))


def no_tokenizer(directory: Path) -> None:
    for path in (*directory.glob("*token*"), *directory.glob("chat_template*")):
        path.unlink()


@pytest.mark.parametrize("options", [{}, {"method": "rtn", "eval_samples": 0}])
def test_a_model_without_tokenizer_is_refused_before_any_work(
    dense: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    seen: list[Progress] = []
    with pytest.raises(BadInput, match=r"tokenizer cannot be loaded \(it has no tokenizer\.json: copy"):
        run(broken(dense, tmp_path, no_tokenizer), tmp_path / "q", **options, on_progress=seen.append)
    assert not seen and [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "W4A61"}, "unknown scheme 'W4A61'; known: W4A16"),
        ({"scheme": "int4-h64"}, "format 'int4-h64'"),
        ({"method": "gptqq"}, "unknown method 'gptqq'; known: gptq"),
        ({"method_options": {"dampling": 1}}, "unknown option of method gptq 'dampling'; known: damping"),
        ({"group_size": 0}, "group size 0"),
        ({"group_size": 4096}, r"q_proj: group size 4096 is larger than its input dimension 64"),
        ({"calibration": "no-such-file.txt"}, "no text file at 'no-such-file.txt'"),
        ({"calibration": []}, "list is empty"),
        ({"calibration": [""]}, "blank"),
        ({"calibration": ["too short"]}, "too little text"),
        ({"samples": 0}, "samples must be 1 or more"),
        ({"sequence_length": 100_000}, "256 positions"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "abacus"}, "unknown device 'abacus'"),
        ({"checkpoint_format": "tar"}, "unknown checkpoint format 'tar'"),
        ({"scheme": "nf4-g32", "checkpoint_format": "compressed-tensors"}, "cannot say nf4-g32"),
        ({"ignore": ("re:[",)}, "no regular expression"),
        ({"ignore": ("re:.*",)}, "nothing to quantize"),
        ({"ignore": ()}, "lm_head shares its tensor.*replaces the default, lm_head: add --ignore lm_head"),
        (
            {"ignore": ("lm_head", "model.layers.1.mlp.dwn_proj")},
            r"'model\.layers\.1\.mlp\.dwn_proj' matches no layer "
            r"of the model; nearest: model\.layers\.1\.mlp\.down_proj",
        ),
        ({"ignore": ("lm_head", "model.layers.0")}, "matches no layer"),  # which holds layers and is none
        ({"method": ""}, "unknown method ''"),
        ({"scheme": ""}, "unknown scheme ''"),
        ({"eval_samples": -1}, "-1 held-out windows.*0 to leave"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    dense: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    out = tmp_path / "q"
    with pytest.raises(BadInput, match=message):
        run(dense, out, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["no/such/directory/at/all", "not-a-model.txt", ""])
def test_what_is_no_model_is_refused(tmp_path: Path, model: str) -> None:
    with pytest.raises(BadInput):
        quantize(model, out=tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_an_output_that_holds_something_else_is_left_alone(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "precious.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds something else"):
        run(dense, tmp_path / "q")
    assert (tmp_path / "q" / "precious.txt").read_text() == "mine"


def test_a_finished_output_of_other_settings_is_left_alone(dense: Path, finished: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    for options in ({"restart": True}, {}):
        with pytest.raises(BadInput, match=r"is finished, with other settings \(scheme\); .*remove it first"):
            run(dense, finished, "int3-asym-g32", **options)
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def test_where_nothing_can_be_written_is_said_by_its_own_name(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (Path("/proc/foo"), tmp_path / "file" / "q"):
        with pytest.raises(BadInput, match=rf"^cannot write to '{out}': .*; choose another output$"):
            run(dense, out, method="rtn", eval_samples=0)


def test_no_space_left_is_said_before_and_during(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr("fewbits.pipeline.quantize.shutil.disk_usage", lambda _: usage)
        with pytest.raises(FewbitsError, match=r"1\.0 kB free") as raised:
            run(dense, tmp_path / "q")
        assert raised.value.exit_code == 1

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "write_stream", full)
        with pytest.raises(FewbitsError, match="No space left on device; finished blocks are kept"):
            run(dense, tmp_path / "q")
    assert not (tmp_path / "q").exists()
    assert run(dense, tmp_path / "q").is_dir()


def test_control_c_keeps_what_is_finished(dense: Path, finished: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(dense, tmp_path / "q", on_progress=interrupt)
    assert not (tmp_path / "q").exists()
    assert same(tensors(run(dense, tmp_path / "q")), tensors(finished))


def test_two_runs_do_not_write_one_output(dense: Path, tmp_path: Path) -> None:
    def again(progress: Progress) -> None:
        if progress.done == 1 and progress.stage == "quantize":
            with pytest.raises(BadInput, match="another process is writing"):
                run(dense, tmp_path / "q")

    run(dense, tmp_path / "q", on_progress=again)


def test_the_fingerprint_names_all_that_decides_the_bytes() -> None:
    from fewbits.pipeline.job import Job

    described = {field.name for field in dataclasses.fields(Job)} - {"out", "seed"}
    # `seed` acts through the token windows, whose hash is in the fingerprint; the rest follows from source and recipe.
    described -= {"input_hadamard", "notes"}
    described -= {"choice"}  # the answer to `question`, kept in the journal
    assert described == {
        "source", "scheme", "recipe", "sequential", "ignore", "dtype", "device",
        "checkpoint_format", "calibration", "probe", "experts", "plan", "question", "act_range",
    }  # fmt: skip
