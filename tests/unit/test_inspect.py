"""`fewbits inspect`: sizes that add up, errors that are the real ones, predictions compared, pages, handles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runtime_models import byte_tokenizer, quantized_weights, saved, tiny_llama, write_quantized
from torch import nn
from typer.testing import CliRunner

from fewbits.calibration.data import pack, read_texts
from fewbits.checkpoints.source import open_source
from fewbits.cli.main import app
from fewbits.core.errors import BadInput
from fewbits.evaluation.inspection import inspect
from fewbits.evaluation.inspection.recommend import recommend
from fewbits.evaluation.inspection.sizes import HEADERS
from fewbits.evaluation.observe import observe
from fewbits.formats import parse_format
from fewbits.metrics import kl
from fewbits.metrics.error import relative_error
from fewbits.report.inspection import page
from fewbits.report.study import write_page

TEXT = {"samples": 2, "sequence_length": 48}
SCHEMES = ("W8A16", "W8A8", "int4-asym-g32", "NF4", "int2-g32")


def save(model: nn.Module, directory: Path) -> Path:
    return saved(model, directory)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = tiny_llama(layers=2, tied=True)
    return model, save(model, tmp_path_factory.mktemp("inspect") / "tiny")


@pytest.fixture(scope="module")
def record(tiny: tuple[nn.Module, Path]) -> dict[str, Any]:
    found = inspect(tiny[1], schemes=SCHEMES, **TEXT)
    assert json.loads(json.dumps(found, allow_nan=False)) == found  # plain JSON, and nothing that it cannot say
    return found


def windows(directory: Path) -> torch.Tensor:
    """The windows `inspect` takes, cut here once more."""
    return pack(read_texts(None)[0], open_source(directory).load_tokenizer(), seed=0, **TEXT).ids


# ---- sizes


@pytest.mark.parametrize("tied", [True, False])
def test_parts_add_up_to_the_file_and_to_the_model(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(layers=1, tied=tied, attention_bias=True)
    results = inspect(save(model, tmp_path / "m"), schemes=["int8-channel"], **TEXT)["results"]
    parts = {row["part"]: row for row in results["parts"]}
    assert sum(row["bytes"] for row in parts.values()) == (tmp_path / "m" / "model.safetensors").stat().st_size
    assert sum(row["parameters"] for row in parts.values()) == sum(p.numel() for p in model.parameters())
    assert ("head" in parts) is not tied and ("share" in parts["embeddings"]["what"]) is tied
    layer = model.model.layers[0]
    assert parts["attention"]["parameters"] == sum(p.numel() for p in layer.self_attn.parameters())
    assert parts["MLP"]["bytes"] == 4 * sum(p.numel() for p in layer.mlp.parameters())
    assert parts["norms"]["parameters"] == 3 * 64 and "other" not in parts
    assert 0 < parts[HEADERS]["bytes"] < 10_000


def test_experts_and_routers_are_parts_of_their_own(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    model = tiny_llama(layers=1, model_type="qwen3_moe", **sizes)
    results = inspect(save(model, tmp_path / "moe"), schemes=["W8A8", "int4-g32"], **TEXT)["results"]
    parts = {row["part"]: row for row in results["parts"]}
    assert parts["experts"]["parameters"] == 4 * 3 * 32 * 64
    assert parts["routers"]["parameters"] == 4 * 64 and not parts["routers"]["quantized"]
    assert sum(row["parameters"] for row in parts.values()) == sum(p.numel() for p in model.parameters())
    assert "experts" in results["skipped"]["W8A8"]  # their activations are not quantized
    assert [row["label"] for row in results["schemes"]] == ["int4-g32"]
    assert 0 < results["errors"]["int4-g32"]["down_proj"][0] < 0.2


# ---- losses


@pytest.mark.parametrize("label", ["int4-asym-g32", "W8A8"])
def test_errors_are_those_of_the_real_outputs(label: str, record: dict[str, Any], tiny: tuple[nn.Module, Path]) -> None:
    """What a hook on the dense model sees, multiplied by the rounded weights, tells the same error to 1e-4."""
    model, directory = tiny
    row = next(row for row in record["results"]["schemes"] if row["label"] == label)
    format = parse_format(row["weights"]).with_scale_dtype(torch.float32)
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: args[0].detach()}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(windows(directory))
    for hook in hooks:
        hook.remove()
    for kind, series in record["results"]["errors"][label].items():
        for block, found in enumerate(series):
            (name,) = (name for name in seen if name.startswith(f"model.layers.{block}.") and name.endswith(kind))
            x, weight = seen[name].flatten(0, 1).double(), model.get_submodule(name).weight.detach()
            decoded = format.quantize(weight).dequantize().double()
            rounded = x
            if row["activations"]:
                rounded = parse_format(row["activations"]).quantize(x.float()).dequantize().double()
            expected = relative_error(x @ weight.double().t(), rounded @ decoded.t())
            assert found == pytest.approx(expected, rel=1e-4)


def test_the_loss_is_that_of_the_rounded_model(record: dict[str, Any], tiny: tuple[nn.Module, Path]) -> None:
    model, directory = tiny
    rounded = tiny_llama(layers=2, tied=True)
    rounded.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, weight in quantized_weights(rounded, parse_format("int4-asym-g32")).items():
            rounded.get_submodule(name).weight.copy_(weight.dequantize())
        ids = windows(directory)
        pairs = zip(model(ids).logits, rounded(ids).logits, strict=True)
        expected = torch.stack([kl(before[1::2], after[1::2]) for before, after in pairs])
    row = next(row for row in record["results"]["schemes"] if row["label"] == "int4-asym-g32")
    assert row["kl"]["mean"] == pytest.approx(float(expected.mean()), rel=1e-3)


def test_fewer_bits_lose_more_and_take_less(record: dict[str, Any]) -> None:
    rows = {row["label"]: row for row in record["results"]["schemes"]}
    assert list(rows) == [row["label"] for row in sorted(rows.values(), key=lambda row: row["kl"]["mean"])]
    for better, worse in (("W8A16", "int4-asym-g32"), ("int4-asym-g32", "int2-g32"), ("W8A16", "W8A8")):
        assert rows[better]["kl"]["mean"] < rows[worse]["kl"]["mean"]
        assert rows[better]["error"] < rows[worse]["error"]
        assert rows[better]["bytes"] >= rows[worse]["bytes"]
    assert record["results"]["agreement"] > 0.89


def test_size_is_what_quantize_writes(record: dict[str, Any], tiny: tuple[nn.Module, Path], tmp_path: Path) -> None:
    from fewbits.pipeline.quantize import quantize

    quantize(tiny[1], "W8A16", method="rtn", out=tmp_path / "q", eval_samples=0)
    row = next(row for row in record["results"]["schemes"] if row["label"] == "W8A16")
    written = (tmp_path / "q" / "model.safetensors").stat().st_size
    assert written == pytest.approx(row["bytes"], rel=0.06)  # headers, and shapes that compressed-tensors stores
    assert row["command"].split()[:3] == ["fewbits", "quantize", str(tiny[1])] and "--method rtn" in row["command"]


# ---- recommendations


def scheme(label: str, size: int, loss: float, **more: Any) -> dict[str, Any]:
    row = {"label": label, "bytes": size, "kl": {"mean": loss, "stderr": 0.0}, "bits_per_weight": 4.2}
    return {**row, "command": f"fewbits {label}", "packed": False, "readers": [], **more}


def test_recommendations_follow_target_and_budget() -> None:
    rows = [
        scheme("w8", 80, 0.001, bits_per_weight=8.2, packed=True),
        scheme("nf4", 44, 0.03),
        scheme("w4", 45, 0.04, packed=True, readers=["transformers", "vLLM"]),
        scheme("w2", 25, 4.0, bits_per_weight=2.5, packed=True),
        scheme("static", 10, 0.0001, command=None),
    ]
    chosen = {c["purpose"]: c["scheme"] for c in recommend(rows, max_loss=0.05, memory=60)}
    assert chosen == {
        "fits in 60 B": "nf4",
        "little loss": "nf4",
        "about 4 bits": "nf4",
        "fast here": "w4",
        "loads anywhere": "w4",
    }
    chosen = {c["purpose"]: c for c in recommend(rows, max_loss=1e-4, memory=20)}
    assert chosen["fits in 20 B"]["scheme"] is None and "25 B" in chosen["fits in 20 B"]["why"]
    assert chosen["little loss"]["scheme"] is None and "--max-loss" in chosen["little loss"]["why"]


# ---- handles and errors


@pytest.mark.parametrize("kind", ["native", "compressed-tensors"])
def test_a_quantized_checkpoint_is_described(kind: str, tiny: tuple[nn.Module, Path], tmp_path: Path) -> None:
    format = parse_format("int8-channel").with_scale_dtype(torch.float32)
    weights = quantized_weights(tiny[0], format)
    directory = write_quantized(tmp_path / "q", tiny[0], weights, kind=kind)
    done = CliRunner().invoke(app, ["inspect", str(directory), "-o", str(tmp_path / "page"), "--json"])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    assert results["quantized"]["modules"] == len(weights)
    assert sum(results["quantized"]["formats"].values()) == len(weights)
    assert sum(row["bytes"] for row in results["parts"]) == (directory / "model.safetensors").stat().st_size
    shown = CliRunner().invoke(app, ["inspect", str(directory), "-o", str(tmp_path / "page")])
    assert "quantized already" in shown.stdout and "fewbits report" in shown.stderr


def test_a_method_fewbits_does_not_read_is_named(tiny: tuple[nn.Module, Path], tmp_path: Path) -> None:
    directory = save(tiny[0], tmp_path / "other")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (directory / "config.json").write_text(json.dumps(config))
    found = inspect(directory)["results"]["quantized"]
    assert found["method"] == "aqlm" and "aqlm" in found["note"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"samples": 1}, "at least 2"),
        ({"max_loss": 0.0}, "above 0"),
        ({"memory": 0}, "more than 0"),
        ({"schemes": ["W5A16"]}, "unknown"),
        ({"schemes": ["W4A16"]}, "none of the schemes fits"),  # groups of 128 in rows of 64
        ({"schemes": ["NF4", "nf4"]}, "twice"),
    ],
)
def test_bad_arguments_are_explained(options: dict[str, Any], expected: str, tiny: tuple[nn.Module, Path]) -> None:
    with pytest.raises(BadInput, match=expected):
        inspect(tiny[1], **options)


def test_unknown_model_exits_2() -> None:
    done = CliRunner().invoke(app, ["inspect", "no-such-model"])
    assert done.exit_code == 2 and "neither a directory" in done.stderr


# ---- what is shown


def test_the_command_prints_and_writes(tiny: tuple[nn.Module, Path], tmp_path: Path) -> None:
    options = ["--samples", "2", "--sequence-length", "48", "--scheme", "W8A16", "--scheme", "W4A16-g32"]
    done = CliRunner().invoke(app, ["inspect", str(tiny[1]), "-o", str(tmp_path / "o"), *options, "--memory", "1MB"])
    assert done.exit_code == 0, done.output
    for text in ("attention", "outlier dimensions", "W4A16 g32", "fits in 1.0 MB", "fewbits quantize", "inspect.html"):
        assert text in done.stdout + done.stderr
    assert "--scheme W4A16 --group-size 32" in done.stdout
    text = (tmp_path / "o" / "inspect.html").read_text(encoding="utf-8")
    assert "<script" not in text and "src=" not in text and "#01fe" not in text and "data:" not in text
    assert {path.name for path in (tmp_path / "o").glob("*.png")} == {
        f"inspect-{key}.png" for key in ("sizes", "loss", "layers", "outliers")
    }
    # Drawn again from the record alone, the page is the same.
    again = json.loads((tmp_path / "o" / "inspect.json").read_text(encoding="utf-8"))
    written = write_page(again, page(again), tmp_path / "again")
    assert Path(written["page"]).read_text(encoding="utf-8") == text
    bad = CliRunner().invoke(app, ["inspect", str(tiny[1]), "--memory", "4 pounds"])
    assert bad.exit_code == 2 and "4GB" in bad.stderr


def test_outliers_are_those_that_observe_sees(record: dict[str, Any], tiny: tuple[nn.Module, Path]) -> None:
    observed = observe(tiny[0], windows(tiny[1]), tokenizer=byte_tokenizer())
    found = record["results"]["outliers"]
    assert found["inputs"] == len(observed.inputs) and found["width"] == 64
    assert [feature["dimension"] for feature in found["dimensions"]] == observed.outliers()
    expected = [place.class_absmax.amax(dim=1).tolist() for place in observed.hidden[1:]]
    assert list(zip(*found["largest"].values(), strict=True)) == [pytest.approx(row, rel=1e-5) for row in expected]
    peak = max(float(place.absmax.max()) / place.rms for place in observed.inputs if place.kind == "down_proj")
    assert max(found["peaks"]["down_proj"]) == pytest.approx(peak, rel=1e-5)
