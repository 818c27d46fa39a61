"""`fewbits study formats MODEL`: which format each tensor of a model asks for, measured on tiny ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runtime_models import saved, tiny_llama
from typer.testing import CliRunner

from fewbits.cli.main import app
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.evaluation.studies import model_formats, operands
from fewbits.evaluation.studies.model_formats import FORMATS, of_activation, of_weight
from fewbits.formats import parse_format
from fewbits.formats.elements import ELEMENTS
from fewbits.metrics.distributions import DISTRIBUTIONS, best_scale, decibels
from fewbits.metrics.empirical import Sorted
from fewbits.report import model_formats_results as found

EIGHT, SIX, FOUR = FORMATS[:5], FORMATS[5:8], FORMATS[8:]


def order(sqnr: list[float], formats: tuple[str, ...] = EIGHT) -> list[str]:
    values = dict(zip(FORMATS, sqnr, strict=True))
    return sorted(formats, key=lambda format: -values[format])


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- one tensor


@pytest.mark.parametrize("name", FORMATS)
def test_sorted_values_give_the_error_that_snapping_gives(name: str) -> None:
    """Whatever the scale, with and without counts; also where everything is clipped or rounds to zero."""
    x, levels = gaussian(40, 25).double(), ELEMENTS[name].levels
    counts = torch.randint(1, 4, x.shape, generator=torch.Generator().manual_seed(1))
    format = parse_format(f"{name}-tensor")
    scales = torch.tensor([1e-3, 0.02, 0.3, 1.0, 50.0], dtype=torch.float64)
    for weights in (None, counts):
        w = torch.ones_like(x) if weights is None else weights.double()
        squares = [(w * (x - format.snap(x, scale, None)) ** 2).sum() / (w * x * x).sum() for scale in scales]
        torch.testing.assert_close(Sorted(x, weights).errors(levels, scales), torch.stack(squares), rtol=1e-9, atol=0)


def test_tails_are_those_of_the_definition() -> None:
    x = gaussian(5000).double()
    values = Sorted(x)
    assert values.kurtosis == pytest.approx(float((x**4).mean() / (x**2).mean() ** 2))
    assert values.absmax == float(x.abs().max()) and values.rms == pytest.approx(float(x.square().mean().sqrt()))
    assert Sorted(torch.ones(7)).kurtosis == pytest.approx(1)


def test_gaussian_values_rank_formats_as_the_exact_study_does() -> None:
    """One scale a tensor, within what 65,536 values say of a tail; E2M5 first of 8 bits, INT8 second."""
    entry = of_weight(gaussian(256, 256))
    assert entry["kurtosis"] == pytest.approx(3, abs=0.1)
    exact = [decibels(best_scale(DISTRIBUTIONS["gaussian"], ELEMENTS[name].levels)[1]) for name in FORMATS]
    assert entry["sqnr_db"]["tensor"] == pytest.approx(exact, abs=0.25)
    for formats in (EIGHT, SIX, FOUR):
        assert order(entry["sqnr_db"]["tensor"], formats) == order(exact, formats)
    assert order(entry["sqnr_db"]["tensor"])[:2] == ["fp8_e2m5", "int8"]


def test_finer_scales_never_lose_much_and_bring_integers_nearer() -> None:
    sqnr = of_weight(gaussian(64, 256), group_size=16)["sqnr_db"]
    for coarse, fine in (("tensor", "channel"), ("channel", "group")):
        assert all(b > a - 0.3 for a, b in zip(sqnr[coarse], sqnr[fine], strict=True))
    behind = {scale: values[FORMATS.index("fp8_e2m5")] - values[0] for scale, values in sqnr.items()}
    assert behind["tensor"] > 1.5 > behind["channel"] > 0.5 > behind["group"]


def test_an_outlier_channel_asks_for_exponent_bits_and_scales_of_its_own_take_it_back() -> None:
    x = gaussian(512, 64)
    x[:, 5] *= 60
    entry = of_activation(None, x, 512)
    assert order(entry["sqnr_db"]["static"])[0] in ("fp8_e3m4", "fp8_e4m3")
    assert entry["kurtosis"] > 30 and entry["first_share"] == 0
    # The same channel along the rows of a weight has a scale of its own.
    weight = of_weight(x.T.contiguous())["sqnr_db"]
    assert order(weight["tensor"])[0] in ("fp8_e3m4", "fp8_e4m3") and order(weight["channel"])[0] == "fp8_e2m5"


def test_a_massive_first_token_costs_the_others_under_a_static_scale_only() -> None:
    first, rest = gaussian(4, 64), gaussian(256, 64, seed=1)
    first[:, 7] = 3000.0
    entry = of_activation(first, rest, 4 * 511)
    sqnr = {scale: dict(zip(FORMATS, values, strict=True)) for scale, values in entry["sqnr_db"].items()}
    assert entry["first_share"] > 0.99 and entry["kurtosis"] > 1000 > 4 > entry["rest"]["kurtosis"]
    assert sqnr["absmax"]["int8"] < 1 and sqnr["absmax"]["fp8_e4m3"] > 25  # INT8 rounds the others to zero
    assert sqnr["rest"]["int8"] > 38 and sqnr["token"]["int8"] > 38


def test_nothing_but_zeros_is_left_out_and_what_is_exact_is_finite() -> None:
    assert of_weight(torch.zeros(4, 8)) == {} and of_activation(None, torch.zeros(4, 8), 4) == {}
    assert max(of_weight(torch.ones(4, 8))["sqnr_db"]["channel"]) <= 150


# ---- networks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one block on disk."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    return saved(tiny_llama(layers=1), directory)


@pytest.fixture(scope="module")
def small_contrast() -> Any:
    """The first layers of the Gaussian network on small pictures, so that a test takes a second."""
    network = operands.gaussian_network(images=2, side=32)
    return dataclasses.replace(network, weights=network.weights[:3], activations=network.activations[:3])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, small_contrast: Any) -> None:
    monkeypatch.setattr(model_formats, "gaussian_network", lambda seed: small_contrast)


def test_a_gaussian_network_is_best_in_e2m5(small_contrast: Any) -> None:
    for weight in small_contrast.weights:
        assert order(of_weight(weight.rows(0))["sqnr_db"]["tensor"])[:2] == ["fp8_e2m5", "int8"], weight.name
    assert [weight.kind for weight in small_contrast.weights] == ["7x7", "3x3", "3x3"]
    for activation, weight in zip(small_contrast.activations, small_contrast.weights, strict=True):
        assert activation.first is None and weight.read().shape[1] % activation.rest.shape[1] == 0


def test_every_linear_and_every_shared_input_is_measured_once(tiny: Path) -> None:
    network = operands.of_model(str(tiny), samples=2, sequence_length=32)
    names = {f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.down_proj")}
    assert network.name == "tiny" and network.about.startswith("language model llama, 1 block")
    assert len(network.weights) == 7 and names <= {weight.name for weight in network.weights}
    kinds = [activation.kind for activation in network.activations]
    assert kinds == ["q_proj, k_proj, v_proj", "o_proj", "gate_proj, up_proj", "down_proj"]
    for activation in network.activations:
        assert activation.first is not None and len(activation.first) == 2
        assert len(activation.rest) == activation.seen == 62


def test_experts_are_measured_and_their_rows_are_no_tokens_in_order(tmp_path: Path) -> None:
    saved(tiny_llama(model_type="mixtral", num_local_experts=4, layers=1), tmp_path)
    network = operands.of_model(str(tmp_path), samples=2, sequence_length=32)
    assert len(network.weights) == 4 + 3 * 4
    down = next(activation for activation in network.activations if activation.kind == "down_proj")
    assert down.first is None and down.seen == 2 * 32 * 2  # two experts a token


def test_an_encoder_in_a_directory_is_taken(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    saved(BertModel(BertConfig(vocab_size=264, max_position_embeddings=64, **sizes)), tmp_path)
    network = operands.of_model(str(tmp_path), samples=2, sequence_length=32)
    assert network.about.startswith("encoder bert") and len(network.weights) == 6
    kinds = [activation.kind for activation in network.activations]
    assert kinds == ["query, key, value", "attention.output.dense", "intermediate.dense", "output.dense"]


def test_the_study_is_deterministic(tiny: Path) -> None:
    """The same model as its own contrast gives the same figures."""
    results = model_formats.study(str(tiny), samples=2, sequence_length=32, contrast=str(tiny))["results"]
    assert results["model"] == results["contrast"]


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    saved(model, tmp_path)
    with pytest.raises(FewbitsError, match=r"layers\.0\.mlp\.\w+: it has NaN"):
        model_formats.study(str(tmp_path), samples=1, sequence_length=32)


# ---- command and page


def test_the_command_writes_record_figures_and_page(tiny: Path, quick: None, tmp_path: Path) -> None:
    command = ["study", "formats", str(tiny), "--samples", "2", "--sequence-length", "32", "--group-size", "32"]
    done = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    paths = json.loads(done.stdout)
    assert len(paths["figures"]) == 8 and all(Path(path).exists() for path in paths["figures"])
    text = Path(paths["page"]).read_text(encoding="utf-8")
    assert "<script" not in text and "<image" not in text and "#01fe" not in text
    assert text.count('role="img"') == len(paths["figures"])
    record = json.loads(Path(paths["record"]).read_text(encoding="utf-8"))
    assert record["study"] == "model_formats" and record["settings"]["group_size"] == 32
    results = record["results"]
    assert all(found.winner(results, entry, "tensor", 8) == "fp8_e2m5" for entry in results["contrast"]["weights"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no-such-model"),
        (["demo", "--group-size", "1"], "group size 1"),
        (["--samples", "4"], "--samples needs a MODEL"),
        (["--sequence-length", "64"], "--sequence-length needs a MODEL"),
    ],
)
def test_bad_input_is_an_error_with_the_way_out(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["study", "formats", *arguments, "-o", str(tmp_path / "out")])
    assert done.exit_code == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_contrast_is_refused_before_anything_is_measured(tiny: Path) -> None:
    with pytest.raises(BadInput, match="no-such-thing"):
        model_formats.study(str(tiny), contrast="no-such-thing", samples=1, sequence_length=32)


def test_the_crossing_is_where_e4m3_passes_int8() -> None:
    def entry(peak: float, lead: float) -> dict[str, Any]:
        return {"peak": peak, "sqnr_db": {"tensor": [30.0, 30.0 + lead], "static": [30.0, 30.0 + lead]}}

    network = {"weights": [entry(3, -5), entry(8, -1)], "activations": [entry(32, 2), entry(50, 9)]}
    results = {"formats": {"int8": 8, "fp8_e4m3": 8}, "model": network, "contrast": network}
    assert found.crossing(results) == pytest.approx(16)
    light = {"weights": [entry(3, -5)], "activations": [entry(4, -3)]}
    assert found.crossing({**results, "model": light, "contrast": light}) is None


def test_int8_that_clips_nothing_loses_twenty_db_a_decade() -> None:
    """Against the measured error, of values that leave no room for clipping."""
    results = {"gaussian": {"fp8_e4m3": 31.56}}
    assert found.unclipped(results, 10) - found.unclipped(results, 1) == pytest.approx(20)
    x = torch.rand(1 << 14, generator=torch.Generator().manual_seed(0)) * 2 - 1
    values = Sorted(x)
    error = values.errors(ELEMENTS["int8"].levels, torch.tensor([values.absmax / 127.5]))
    assert -decibels(float(error)) + 31.56 == pytest.approx(
        found.unclipped(results, values.absmax / values.rms), abs=0.1
    )
