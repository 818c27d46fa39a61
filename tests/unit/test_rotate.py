"""A rotated model computes what the original does, on every family; what is written loads as it was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_pipeline import WITHOUT_FEWBITS, run, same, tensors
from test_topology import CONFIGS, UNKNOWN, build
from tiny_runtime_models import byte_tokenizer, saved, tiny_llama

from fewbits.algorithms.rotate import Rotate
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, Unsupported
from fewbits.models.skeleton import load_model
from fewbits.nn.qlinear import QLinear
from fewbits.pipeline import journal as journal_module
from fewbits.pipeline.quantize import quantize
from fewbits.pipeline.shell import ModelShell
from fewbits.runtime.load import load_all

TIED = ("llama", "qwen2", "mixtral")
EVERYTHING = {"online": True}
FOLDED: dict[str, Any] = {}
NO_RESIDUAL = {"residual": False}


def never(module: str) -> bool:
    return False


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):
    """name -> (directory, model in memory) of a tiny model whose norms have gains."""
    made: dict[str, tuple[Path, Any]] = {}

    def of(name: str) -> tuple[Path, Any]:
        if name not in made:
            config = (CONFIGS | UNKNOWN)[name].__class__(**(CONFIGS | UNKNOWN)[name].to_dict())
            config.tie_word_embeddings = name in TIED
            model = build(config)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if parameter.dim() == 1 and "bias" not in key:
                        parameter.uniform_(0.5, 1.5)
            directory = tmp_path_factory.mktemp(name)
            saved(model, directory)
            made[name] = directory, model
        return made[name]

    return of


BLOCKS = {"block": 8, "online": True}


@pytest.mark.parametrize("options", [FOLDED, EVERYTHING, {"residual": False, "values": False, "online": True}, BLOCKS])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_original(name: str, options: dict[str, Any], family) -> None:
    directory, model = family(name)
    source = open_source(directory)
    done = Rotate(**options).rewrite(source, never)
    shell = ModelShell(done.source, torch.device("cpu"), torch.float32)
    shell.transform_inputs(done.input_hadamard)
    ids = torch.randint(0, model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
    with shell.resident_outside(head=True):
        hidden = shell.embed([ids])[0]
        for index, (prefix, block) in enumerate(shell.blocks):
            with shell.resident(prefix, block):
                hidden = shell.forward(index, hidden)
        found = shell.logits(ids, hidden)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert done.source.identity == source.identity
    dense = {"olmo2", "mistral", "llama", "qwen2", "qwen3", "phi3"}
    assert bool(done.input_hadamard) == (bool(options.get("online")) and name in {*dense, "qwen2_moe"})


def test_what_is_rotated(family) -> None:
    directory, _ = family("mixtral")
    source = open_source(directory)
    rotated = Rotate().rewrite(source, never).source
    same_as_before = {n for n in source.names() if torch.equal(source.tensor(n), rotated.tensor(n))}
    assert same_as_before == set()
    assert {n for n in rotated.names() if bool((rotated.tensor(n) == 1).all())} == {
        n for n in source.names() if "norm" in n
    }
    assert set(rotated.names()) - set(source.names()) == {"lm_head.weight"} and not rotated.tied()
    kept = Rotate(residual=False).rewrite(source, never).source
    changed = {n for n in source.names() if not torch.equal(source.tensor(n), kept.tensor(n))}
    assert {n.split(".")[-2] for n in changed} == {"v_proj", "o_proj"}
    assert kept.tied() == source.tied() and kept.config() == source.config()


def test_what_a_table_does_not_allow_is_told(family) -> None:
    def notes(name: str, **options: Any) -> str:
        return " ".join(Rotate(**options).rewrite(open_source(family(name)[0]), never).notes)

    assert "normalises what its layers write" in notes("olmo2")
    assert "fuses its values" in notes("phi3")
    assert "no table says" in notes("opt")
    assert "8 experts' down_proj are fused" in notes("qwen3_moe", online=True)
    assert "8.2 kB more" in notes("llama") and not notes("llama", residual=False)
    with pytest.raises(BadInput, match="a power of two"):
        Rotate(block=12)
    with pytest.raises(BadInput, match="nothing is to be rotated"):
        Rotate(residual=False, values=False)


def test_inputs_are_transformed_where_they_are_rounded(family) -> None:
    source = open_source(family("llama")[0])
    assert not Rotate().rewrite(source, never).input_hadamard
    assert Rotate().rewrite(source, never, rounded=True).input_hadamard
    assert not Rotate(online=False).rewrite(source, never, rounded=True).input_hadamard


def test_blocks_stay_among_themselves(family) -> None:
    source = open_source(family("llama")[0])
    done = Rotate(block=4, values=False).rewrite(source, never, rounded=True)
    name = "model.embed_tokens.weight"
    before, after = source.tensor(name).float(), done.source.tensor(name)
    norms = [rows.view(len(rows), -1, 4).norm(dim=-1) for rows in (before, after)]
    torch.testing.assert_close(*norms)
    assert set(done.input_hadamard.values()) == {(4,)}


def test_norms_that_subtract_a_mean_are_refused(family, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", torch.nn.LayerNorm)
    done = Rotate().rewrite(open_source(family("llama")[0]), never)
    assert "LayerNorm, which subtracts a mean" in done.notes[0]
    assert done.source.tied()


def test_blocks_where_no_hadamard_matrix_is_known(tmp_path: Path) -> None:
    """28 hidden units have one; an MLP of 54 is transformed in blocks of 2; heads of 14 take a random matrix."""
    model = tiny_llama(layers=1, hidden_size=28, intermediate_size=54, head_dim=14, num_attention_heads=2)
    saved(model, tmp_path)
    done = Rotate(online=True).rewrite(open_source(tmp_path), never)
    assert set(done.input_hadamard.values()) == {(2,)}
    assert any("in blocks of 2" in note for note in done.notes)
    ids = torch.arange(40)[None]
    rotated = load_model(Rotate().rewrite(open_source(tmp_path), never).source)
    with torch.no_grad():
        before, after = model(ids).logits, rotated(ids).logits
    assert float((before - after).norm() / before.norm()) < 1e-5


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(layers=3, intermediate_size=192), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def outs(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The rotated model quantized, folded only (compressed-tensors) and on-line (native)."""
    directory = tmp_path_factory.mktemp("out")
    return {
        "folded": run(dense, directory / "folded", method="rotate,rtn"),
        "online": run(dense, directory / "online", method="rotate,gptq", method_options={"online": True}),
    }


@pytest.mark.parametrize("kind", ["folded", "online"])
def test_the_measured_loss_is_that_of_the_written_checkpoint(dense: Path, outs: dict[str, Path], kind: str) -> None:
    from fewbits.evaluation import evaluate

    stated = json.loads((outs[kind] / "certificate.json").read_text())["evaluations"][0]
    found = evaluate(str(outs[kind]), against=str(dense), samples=2, sequence_length=stated["text"]["sequence_length"])
    assert found.kl is not None and found.kl.mean == pytest.approx(stated["kl"]["mean"], rel=0.03)


def test_what_the_directory_says(dense: Path, outs: dict[str, Path]) -> None:
    source = tensors(dense)
    for kind, method in (("folded", "compressed-tensors"), ("online", "fewbits")):
        config = json.loads((outs[kind] / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == method
        assert config["tie_word_embeddings"] is False and "lm_head.weight" in tensors(outs[kind])
        certificate = json.loads((outs[kind] / "certificate.json").read_text())
        assert any("no longer shares" in note for note in certificate["fallbacks"])
        account = {entry["name"]: entry for entry in certificate["tensors"]}
        assert set(account) == {*source, "lm_head.weight"}
        assert account["lm_head.weight"]["reason"].startswith("rotated apart")
        # An untied head is bytes written, not weights of the source.
        assert certificate["source"]["parameters"] == sum(tensor.numel() for tensor in source.values())
        written = sum(tensor.nbytes for tensor in tensors(outs[kind]).values())
        assert certificate["size"]["bits_per_weight_model"] == pytest.approx(
            8 * written / certificate["source"]["parameters"]
        )
    native = json.loads((outs["online"] / "config.json").read_text())["quantization_config"]
    modules = native["modules"]
    assert native["version"] == 2
    orders = {name.rpartition(".")[2]: entry.get("input_hadamard") for name, entry in modules.items()}
    assert orders["down_proj"] == [12, 16] and orders["up_proj"] is None


def test_transformers_computes_the_same_logits(
    outs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    from transformers import AutoModelForCausalLM

    from fewbits.kernels.reference import KERNEL
    from fewbits.nn import qlinear

    folded = shutil.copytree(outs["folded"], tmp_path / "folded")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FEWBITS, str(folded)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    monkeypatch.setattr(qlinear, "choose", lambda spec: KERNEL)
    ids = torch.arange(48)[None] * 5 % 256
    theirs = {
        "folded": load_file(f"{folded}.logits")["logits"],
        "online": AutoModelForCausalLM.from_pretrained(outs["online"], dtype=torch.float32)(ids).logits.detach(),
    }
    for kind, expected in theirs.items():
        with torch.no_grad():
            ours = load_all(outs[kind]).model(ids).logits
        assert float((ours - expected).norm() / expected.norm()) < 1e-5, kind


def test_the_decode_engine_transforms_too(outs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.kernels.reference import KERNEL
    from fewbits.nn import qlinear
    from fewbits.runtime.engine import Engine

    monkeypatch.setattr(qlinear, "choose", lambda spec: KERNEL)
    model = load_all(outs["online"]).model
    ids = [5, 9, 200, 31]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    engine = Engine(model)
    rows = [engine.prefill(ids[:3]), engine.step(ids[3])]
    for row, wanted in zip(rows, expected[2:], strict=True):
        assert float((row - wanted).norm() / wanted.norm()) < 3e-3  # the head is float16 there


def test_a_saved_layer_keeps_its_transform(outs: dict[str, Path], tmp_path: Path) -> None:
    model = load_all(outs["online"]).model
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, QLinear) and layer.input_hadamard == (12, 16) and "12x16" in repr(layer)
    model.save_pretrained(tmp_path)
    again = load_all(tmp_path_with_tokenizer(tmp_path)).model
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, again(ids).logits, atol=1e-5)


def tmp_path_with_tokenizer(directory: Path) -> Path:
    byte_tokenizer().save_pretrained(directory)
    return directory


def test_compressed_tensors_cannot_say_transformed_inputs(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="inputs that are transformed"):
        run(
            dense, tmp_path / "q", method="rotate", method_options={"online": True},
            checkpoint_format="compressed-tensors",
        )  # fmt: skip


def test_layers_that_are_kept_get_no_transform(dense: Path, tmp_path: Path) -> None:
    out = run(
        dense, tmp_path / "q", method="rotate", method_options={"online": True}, checkpoint_format="native",
        ignore=("lm_head", "re:.*layers.1.*"), dtype="float32",
    )  # fmt: skip
    modules = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]
    assert {name for name, entry in modules.items() if "input_hadamard" in entry} == {
        f"model.layers.{index}.mlp.down_proj" for index in (0, 2)
    }
    stated = json.loads((out / "certificate.json").read_text())["evaluations"][0]
    assert 0 < stated["kl"]["mean"] < 1


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("rotate,awq,gptq", {"online": True}),
        ("rotate,gptaq,refine", {"residual": False}),
        ("rotate,awq,gptq", {"values": False}),
    ],
)
def test_compositions(method: str, options: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    from fewbits.evaluation import evaluate

    out = run(dense, tmp_path / "q", method=method, method_options=options)
    certificate = json.loads((out / "certificate.json").read_text())
    stated = certificate["evaluations"][0]
    assert certificate["method"]["name"] == method
    length = stated["text"]["sequence_length"]
    found = evaluate(str(out), against=str(dense), samples=2, sequence_length=length)
    assert found.kl is not None and found.kl.mean == pytest.approx(stated["kl"]["mean"], rel=0.03)


def test_experts(family, tmp_path: Path) -> None:
    """Fused experts, their router, gains in both; on disk they lie apart."""
    from fewbits.evaluation import evaluate

    for name in ("mixtral", "qwen3_moe"):
        model = tiny_llama(
            model_type=name, hidden_size=32, intermediate_size=48, num_attention_heads=2, layers=2,
            **({"num_local_experts": 4} if name == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 24}),
            num_experts_per_tok=2,
        )  # fmt: skip
        directory = tmp_path / name
        saved(model, directory)
        out = run(directory, tmp_path / f"{name}-q", "int8-asym-g8", method="rotate,gptq", checkpoint_format="native")
        stated = json.loads((out / "certificate.json").read_text())["evaluations"][0]
        length = stated["text"]["sequence_length"]
        found = evaluate(str(out), against=str(directory), samples=2, sequence_length=length)
        assert found.kl is not None and found.kl.mean == pytest.approx(stated["kl"]["mean"], rel=0.1, abs=1e-5)
        assert found.kl.mean < 0.01


def test_a_killed_run_resumes_to_the_same_bytes(
    dense: Path, outs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = journal_module.Journal.write

    def dies(self, index, *args):
        written(self, index, *args)
        if index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal_module.Journal, "write", dies)
    options: dict[str, Any] = {"method": "rotate,gptq", "method_options": {"online": True}}
    with pytest.raises(KeyboardInterrupt):
        run(dense, tmp_path / "q", **options)
    monkeypatch.setattr(journal_module.Journal, "write", written)
    assert same(tensors(run(dense, tmp_path / "q", **options)), tensors(outs["online"]))


def test_another_seed_is_another_run(dense: Path, tmp_path: Path) -> None:
    run(dense, tmp_path / "q", method="rotate", eval_samples=0)
    with pytest.raises(BadInput, match=r"is finished, with other settings \(method, evaluation\)"):
        quantize(str(dense), "int4-asym-g32", out=tmp_path / "q", method="rotate", method_options={"rotate.seed": 1})
