"""Schemes that round both sides: what is measured while quantizing is what the written checkpoint loses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import run
from tiny_runtime_models import llama_with_outliers, saved

from fewbits.evaluation import evaluate


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llama_with_outliers((3, 40), intermediate_size=192), tmp_path_factory.mktemp("dense"))


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("int4-g32/int4-token", "rtn", {}),
    ("int4-g32/int4-token", "rotate,gptq", {}),
    ("fp4_e2m1-g32/fp4_e2m1-token", "rtn", {}),
    ("fp4_e2m1-g32/fp4_e2m1-token", "llm_fp4", {}),
    ("fp4_fit-channel/fp8_e4m3-token", "llm_fp4", {}),
    ("MXFP4", "rotate,gptq", {"rotate.block": 32}),
    ("NVFP4_4OVER6", "preshift,gptq", {}),
]


@pytest.fixture(scope="module")
def losses(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], float]:
    """(scheme, method) -> KL, each checked against the checkpoint."""
    found = {}
    for scheme, method, options in CASES:
        out = run(dense, tmp_path_factory.mktemp("q") / "q", scheme, method=method, method_options=options)
        stated = json.loads((out / "certificate.json").read_text())["evaluations"][0]
        length = stated["text"]["sequence_length"]
        written = evaluate(str(out), against=str(dense), samples=2, sequence_length=length)
        assert written.kl is not None
        # A last bit of x decides which of two levels it takes: noise, but little of it.
        assert written.kl.mean == pytest.approx(stated["kl"]["mean"], rel=0.1), (scheme, method)
        found[scheme, method] = stated["kl"]["mean"]
    return found


def test_what_is_measured_is_what_is_written(losses) -> None:
    assert len(losses) == len({(scheme, method) for scheme, method, _ in CASES})


def test_outlier_channels_are_what_the_methods_are_for(losses) -> None:
    plain = losses["int4-g32/int4-token", "rtn"]
    assert losses["int4-g32/int4-token", "rotate,gptq"] < 0.6 * plain
    assert losses["fp4_e2m1-g32/fp4_e2m1-token", "llm_fp4"] < 0.6 * losses["fp4_e2m1-g32/fp4_e2m1-token", "rtn"]


def test_gptq_on_fixed_block_scales_considers_four_and_six() -> None:
    from fewbits.algorithms.clipping import RangeSearch
    from fewbits.algorithms.gptq import GPTQ
    from fewbits.calibration.stats import Inputs
    from fewbits.formats import parse_format

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(600, 128, generator=generator), torch.randn(64, 128, generator=generator)
    inputs = Inputs(hessian=(x.T @ x / 300).double(), tokens=600)
    six, four_or_six = parse_format("nvfp4"), parse_format("nvfp4_4over6")
    losses = [float(GPTQ().solve(weight, format, inputs, "w").loss.sum()) for format in (six, four_or_six)]
    assert losses[1] < 0.97 * losses[0]
    # The largest weight of a block on 4 is a range half as wide again; nothing else widens a range.
    fitted = four_or_six.fitted(weight)
    scale, _ = RangeSearch(steps=1, max_shrink=0).params(weight, fitted)
    plain, _ = fitted.params_from_range(*fitted.ranges(weight))
    ratio = scale / plain
    assert 0.2 < float((ratio > 1.3).float().mean()) < 0.7 and float(ratio.max()) < 1.7


def test_shifts_are_seen_on_unrounded_inputs(dense: Path, tmp_path: Path) -> None:
    """Two channels set the tokens' scales: rounded inputs would be zeros, and a channel of zeros is not shifted."""
    out = run(dense, tmp_path / "q", "fp4_e2m1-g32/fp4_e2m1-token", method="llm_fp4", checkpoint_format="native")
    from safetensors.torch import load_file

    name = "model.layers.0.input_layernorm.weight"
    before, after = load_file(dense / "model.safetensors")[name], load_file(out / "model.safetensors")[name]
    ratio = after.float() / before
    assert torch.equal(ratio, torch.exp2(torch.round(torch.log2(ratio))))
    assert float(ratio.median()) == 8 and set(ratio[[3, 40]].tolist()) == {1.0}


@pytest.mark.parametrize(("weights", "inputs"), [("mxfp4", "mxfp4"), ("nvfp4", "nvfp4"), ("int4-g32", "int4-token")])
def test_the_decode_engine_rounds_both_sides(weights: str, inputs: str) -> None:
    from tiny_runtime_models import quantize_in_place, tiny_llama

    from fewbits.runtime.engine import Engine

    model = quantize_in_place(tiny_llama(), weights, inputs)
    ids = torch.arange(24) * 7 % 256
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    found = Engine(model).prefill(ids.tolist(), every=True)
    # A last bit of x may take another level: most rows agree to rounding, the others to a step.
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(error.median()) < 0.02


def test_embeddings_are_rounded_where_asked(dense: Path, tmp_path: Path) -> None:
    from test_pipeline import tensors

    from fewbits.core.errors import BadInput
    from fewbits.formats import parse_format

    name = "model.embed_tokens.weight"
    expected = parse_format("fp4_e2m1-channel").quantize(tensors(dense)[name].float()).dequantize()
    for method in ("embeddings,llm_fp4", "rotate,embeddings,rtn"):
        out = run(dense, tmp_path / method, "FP4_W4A4", method=method, eval_samples=0, group_size=32)
        certificate = json.loads((out / "certificate.json").read_text())
        assert any("fp4_e2m1-channel" in note for note in certificate["fallbacks"])
        found = tensors(out)[name].float()
        assert torch.equal(found, expected) == (method != "rotate,embeddings,rtn")
        assert all(len(row.unique()) <= 15 for row in found[:20])
    with pytest.raises(BadInput, match="an element alone"):
        run(dense, tmp_path / "q", method="embeddings", method_options={"element": "fp4_e2m1-g16"})


def test_the_bars_hold_on_the_embedded_model() -> None:
    """As last measured by benchmarks/bench_w4a4.py and bench_kv_cache.py, in their records."""
    from recorded import latest

    found = latest("w4a4")
    assert found is not None
    rows = {(row["scheme"], row["method"]): row["lost"] for row in found[1]["rows"]}
    plain = rows["W4A4", "rtn"]["mean"]
    for key in (("FP4_W4A4", "llm_fp4"), ("W4A4", "rotate,gptq")):
        assert rows[key]["mean"] < 0.4 * plain, key

    def gain(integer: str, minifloat: str) -> float:
        """By how many standard errors the minifloat loses less."""
        a, b = rows[integer, "rtn"], rows[minifloat, "rtn"]
        return (a["mean"] - b["mean"]) / (a["stderr"] ** 2 + b["stderr"] ** 2) ** 0.5

    # FP4 before INT4 where inputs have 4 bits; else no difference that these windows can tell.
    assert gain("W4A4", "FP4_W4A4") > 5
    assert abs(gain("W4A16", "fp4_e2m1-g128")) < 2 and abs(gain("W4A8", "FP4_W4A8")) < 2
    caches = latest("kv_cache")
    assert caches is not None
    (four,) = (row for row in caches[1]["rows"] if row["cache"] == "int4")
    assert four["perplexity_change"] < 0.01
