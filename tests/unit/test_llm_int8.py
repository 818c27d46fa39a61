"""LLM.int8(): the laws of the decomposition, and checkpoints that compute what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import run
from tiny_runtime_models import llama_with_outliers, saved

from fewbits.algorithms.compose import compose
from fewbits.algorithms.llm_int8 import LLMInt8
from fewbits.calibration.stats import Inputs
from fewbits.core.errors import BadInput, Unsupported
from fewbits.evaluation import evaluate
from fewbits.formats import parse_format
from fewbits.formats.outliers import OutlierSpec, in_sixteen, round_rest
from fewbits.formats.rows import round_rows
from fewbits.kernels import KERNELS
from fewbits.metrics import sqnr_db
from fewbits.nn import QLinear
from fewbits.runtime.engine import Engine
from fewbits.runtime.load import load_all

TOKEN, CHANNEL = parse_format("int8-token"), parse_format("int8-channel")
VARIANTS: list[dict[str, Any]] = [
    {"fixed": fixed, "weights": weights} for fixed in (False, True) for weights in ("original", "dequantized")
]


def layer(
    x: torch.Tensor, *, fixed: bool = False, weights: str = "original", threshold: float = 6.0
) -> tuple[QLinear, torch.Tensor]:
    weight = torch.randn(40, x.shape[1], generator=torch.Generator().manual_seed(1)).half().float()
    inputs = Inputs(max_abs=x.abs().amax(0), tokens=len(x))
    solved = LLMInt8(fixed=fixed, weights=weights, threshold=threshold).solve(weight, CHANNEL, inputs, "w")
    module = QLinear.from_quantized(solved.quantized, None, TOKEN, outliers=solved.outliers)
    return module.prepack(KERNELS.get("reference")), weight


def inputs(outliers: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=generator).clamp(-5, 5)
    if outliers:
        x[:, 7 : 7 + outliers] *= torch.linspace(20, 60, outliers) / x[:, 7 : 7 + outliers].abs().amax(0)
    return x


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_outliers_it_is_the_vector_wise_product(variant: dict[str, Any]) -> None:
    x = inputs()
    module, weight = layer(x, **variant)
    plain = QLinear.from_quantized(CHANNEL.quantize(weight), None, TOKEN).prepack(KERNELS.get("reference"))
    assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_nothing_but_outliers_it_is_the_dense_product(variant: dict[str, Any]) -> None:
    x = inputs() + 20
    module, weight = layer(x, **variant)
    dense = weight if variant["weights"] == "original" else CHANNEL.quantize(weight).dequantize()
    torch.testing.assert_close(module(x), x @ dense.T, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outliers_do_not_spoil_the_rest(variant: dict[str, Any]) -> None:
    """Six columns of 20 to 60: at most 0.15 times the error of one scale a token, where weights are original."""
    x = inputs(6)
    module, weight = layer(x, **variant)
    exact = x @ weight.T
    errors = [
        float((product - exact).norm())
        for product in (module(x), round_rows(x, TOKEN) @ CHANNEL.quantize(weight).dequantize().T)
    ]
    assert errors[0] <= (0.15 if variant["weights"] == "original" else 1.0) * errors[1]


def test_the_rest_has_a_scale_of_its_own() -> None:
    x = inputs(6)
    rounded = round_rest(x, TOKEN, torch.arange(7, 13))
    assert torch.equal(rounded[:, 7:13], x[:, 7:13])
    rest = torch.cat([x[:, :7], x[:, 13:]], 1)
    assert torch.equal(torch.cat([rounded[:, :7], rounded[:, 13:]], 1), round_rows(rest, TOKEN))
    assert torch.equal(round_rest(torch.zeros(2, 8), TOKEN, torch.tensor([], dtype=torch.int64)), torch.zeros(2, 8))


def test_a_magnitude_of_exactly_the_threshold_is_an_outlier() -> None:
    x = inputs()
    x[3, 5] = -6.0
    module, _ = layer(x, fixed=True)
    assert module.outliers is not None and module.outliers.columns is not None
    assert module.outliers.columns.tolist() == [5]
    assert layer(x)[0].outliers.find(x).tolist() == [5]  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_row_alone(variant: dict[str, Any]) -> None:
    """With fixed columns a token is what it is in a batch; found ones are its own."""
    x = inputs(6)
    module, weight = layer(x, **variant)
    alone = module(x[:1])
    if variant["fixed"]:
        torch.testing.assert_close(alone, module(x)[:1], rtol=1e-5, atol=1e-4)
    exact = x[:1] @ weight.T
    assert float((alone - exact).norm() / exact.norm()) < 0.02
    assert not module(torch.zeros(1, x.shape[1])).any()


def test_sixteen_bits_are_those_that_hold_the_weight() -> None:
    assert in_sixteen(torch.tensor([0.5, 3.0])).dtype == torch.float16
    assert in_sixteen(torch.tensor([2.0**-30])).dtype == torch.bfloat16
    assert in_sixteen(torch.tensor([1e6 / 3])).dtype == torch.bfloat16
    assert in_sixteen(torch.tensor([1 / 3])).dtype == torch.float16


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llama_with_outliers((3, 40), intermediate_size=192), tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_measured_is_what_is_written(dense: Path, tmp_path: Path, variant: dict[str, Any]) -> None:
    out = run(dense, tmp_path / "q", "W8A8", method="llm_int8", method_options=variant)
    certificate = json.loads((out / "certificate.json").read_text())
    stated = certificate["evaluations"][0]
    written = evaluate(str(out), against=str(dense), samples=2, sequence_length=stated["text"]["sequence_length"])
    assert written.kl is not None
    assert written.kl.mean == pytest.approx(stated["kl"]["mean"], rel=0.1)
    plain = run(dense, tmp_path / "plain", "W8A8", method="rtn")
    rounded = json.loads((plain / "certificate.json").read_text())["evaluations"][0]["kl"]["mean"]
    assert stated["kl"]["mean"] < (0.5 if variant["weights"] == "original" else 1.0) * rounded
    entry = json.loads((out / "config.json").read_text())["quantization_config"]
    q_proj = entry["modules"]["model.layers.0.self_attn.q_proj"]
    assert entry["version"] == 4
    assert q_proj["outliers"]["columns"] == (2 if variant["fixed"] else None)
    assert (q_proj["outliers"]["dtype"] is None) == (variant["weights"] == "dequantized")
    records = {record["name"]: record for record in certificate["layers"]}
    bits = records["model.layers.0.self_attn.q_proj"]["bits"]
    assert (bits > 20) == (variant == VARIANTS[0])


def test_the_decode_engine_computes_the_same(dense: Path, tmp_path: Path) -> None:
    out = run(dense, tmp_path / "q", "W8A8", method="llm_int8", method_options={"fixed": True}, eval_samples=0)
    loaded = load_all(str(out))
    ids = list(range(20))
    with torch.inference_mode():
        expected = loaded.model(torch.tensor([ids])).logits[0]
    # Rounding x turns on its last bit, so two correct programs differ by single steps.
    assert sqnr_db(expected, Engine(loaded.model).prefill(ids, every=True)) > 18.0


def test_it_composes_with_what_changes_coordinates_and_with_nothing_that_changes_codes(dense: Path) -> None:
    assert compose("llm_int8,rotate").names == ("rotate", "llm_int8")
    for other in ("refine", "lowrank", "learned"):
        with pytest.raises(BadInput, match=f"llm_int8 keeps columns beside the codes that {other} knows nothing of"):
            compose(f"llm_int8,{other}")
    with pytest.raises(BadInput, match="W8A16 rounds no inputs"):
        run(dense, dense / "never", "W8A16", method="llm_int8")
    with pytest.raises(Unsupported, match="columns in 16 bits"):
        run(dense, dense / "never", "W8A8", method="llm_int8", checkpoint_format="compressed-tensors")


@pytest.mark.parametrize(
    "entry",
    [
        {"threshold": 0, "columns": None, "dtype": None},
        {"threshold": 6.0, "columns": 0, "dtype": None},
        {"threshold": 6.0, "columns": 97, "dtype": None},
        {"threshold": 6.0, "columns": None, "dtype": "float32"},
        {"threshold": "6", "columns": None, "dtype": None},
        "6.0",
    ],
)
def test_a_damaged_entry_is_refused(entry: Any) -> None:
    with pytest.raises(BadInput, match="expected a threshold"):
        OutlierSpec.read_entry(entry, 96)
