"""Static activations: ranges from calibration, tokens kept apart, and what the checkpoint says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_pipeline import run, tensors
from tiny_runtime_models import saved, tiny_llama

from fewbits.algorithms.input_ranges import InputRange, estimator_called
from fewbits.algorithms.ranges import RANGES
from fewbits.calibration.amax_history import AmaxHistory
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.formats import parse_format
from fewbits.formats.rows import round_rows, sinks
from fewbits.runtime.load import load

STATIC = parse_format("int8-tensor-static")
APART = parse_format("int8-tensor-static-sinks")


def batches(sink: float = 0.0, count: int = 4) -> list[torch.Tensor]:
    """[2, 50, 96] each, Gaussian; the first token of every sequence `sink` times as large in one channel."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(2, 50, 96, generator=generator) for _ in range(count)]
    for x in found:
        x[:, 0, 7] += sink
    return found


def seen(format, estimator: str, xs: list[torch.Tensor]) -> InputRange:
    found = InputRange(format=format, estimator=estimator_called(estimator))
    for x in xs:
        found.add(x)
    return found


@pytest.mark.parametrize("name", ["int8-tensor-static", "int8-asym-tensor-static", "fp8_e4m3-tensor-static"])
def test_absmax_is_the_range_of_all_text_at_once(name: str) -> None:
    format, xs = parse_format(name), batches()
    scale, zero = format.params(torch.cat(xs).reshape(-1, 96))
    state = seen(format, "absmax", xs).state("layer")
    assert torch.equal(state["input_scale"], scale)
    assert ("input_zero" in state) == (zero is not None) and (zero is None or torch.equal(state["input_zero"], zero))


def test_groups_of_channels_have_ranges_of_their_own() -> None:
    format = parse_format("int8-g32-static")
    x = torch.cat(batches()).reshape(-1, 96) * torch.tensor([1.0, 10, 100]).repeat_interleave(32)
    state = seen(format, "absmax", list(x.split(100))).state("layer")
    expected = torch.stack([part.abs().max() for part in x.split(32, dim=1)])[None] / 127.5
    assert torch.allclose(state["input_scale"], expected)
    rounded = round_rows(x, format, (state["input_scale"], None))
    assert float((rounded - x).abs().max()) <= float(expected.max()) * 0.501


@pytest.mark.parametrize("estimator", [*RANGES.names(), "moving_average", "delayed", "entropy"])
def test_every_estimator_gives_a_range_within_absmax(estimator: str) -> None:
    absmax = seen(STATIC, "absmax", batches()).state("layer")["input_scale"]
    scale = seen(STATIC, estimator, batches()).state("layer")["input_scale"]
    assert scale.shape == (1, 1) and 0.3 * float(absmax) < float(scale) < 1.21 * float(absmax)


def test_some_estimators_forget() -> None:
    xs = batches(count=200)
    xs[0] = xs[0] * 1000
    absmax = float(seen(STATIC, "absmax", xs).state("layer")["input_scale"])
    for estimator in ("moving_average", "delayed"):
        assert float(seen(STATIC, estimator, xs).state("layer")["input_scale"]) < 0.2 * absmax


def test_delayed_scaling_is_transformer_engine_s() -> None:
    history = AmaxHistory(length=4)
    assert [history.update(amax) for amax in (3.5, 7, 1, 1, 1, 1)] == [128, 64, 64, 64, 64, 448]
    assert history.update(0.0) == 448 and AmaxHistory(length=4, scale=3.0).update(0.0) == 3.0
    for bad in (float("inf"), float("nan")):
        broken = AmaxHistory(length=2, scale=3.0)
        assert broken.update(bad) == 3.0 and broken.update(1.0) == 3.0 and broken.update(1.0) == 448
    assert AmaxHistory(length=4).update(1e-45) == torch.finfo(torch.float32).max
    assert AmaxHistory(length=4, margin=1).update(3.5) == 64
    with pytest.raises(BadInput, match="at least 1 step"):
        AmaxHistory(length=0)


def test_sinks_are_counted_and_kept_apart_where_the_format_says_so() -> None:
    plain, xs = batches(), batches(sink=1000.0)
    assert int(sinks(xs[0].reshape(-1, 96)).sum()) == 2
    with_them, without = seen(STATIC, "absmax", xs), seen(APART, "absmax", xs)
    assert with_them.sinks == without.sinks == 8 and with_them.describe()["largest_sink"] > 900
    others = torch.cat([x[:, 1:] for x in plain]).reshape(-1, 96)
    assert torch.equal(without.state("layer")["input_scale"], STATIC.params(others)[0])
    scale = without.state("layer")["input_scale"]
    for x in xs:
        rows = x.reshape(-1, 96)
        rounded = round_rows(rows, APART, (scale, None))
        own = round_rows(rows, parse_format("int8-token"))
        beyond = rows.abs().amax(1) > 127.5 * float(scale)
        assert torch.equal(rounded[beyond], own[beyond]) and int(beyond.sum()) == 2
        assert torch.equal(rounded[~beyond], round_rows(rows[~beyond], STATIC, (scale, None)))


def test_what_cannot_be_calibrated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="no calibration text reached"):
        InputRange(format=STATIC, estimator="absmax").state("layer")
    for estimator in ("absmax", "delayed", "mse"):
        with pytest.raises(FewbitsError, match="layer: calibration inputs are NaN"):
            seen(STATIC, estimator, [torch.full((1, 4, 8), torch.nan), torch.ones(1, 4, 8)]).state("layer")
    with pytest.raises(BadInput, match="range of activations"):
        estimator_called("median")
    with pytest.raises(BadInput, match="W8A8_STATIC or FP8"):
        run(tmp_path, tmp_path / "q", "W8A8", act_range="mse")
    with pytest.raises(BadInput, match="static scales are for activations"):
        run(tmp_path, tmp_path / "q", "int8-tensor-static")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(intermediate_size=192), tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize(
    ("scheme", "kind", "options"),
    [
        ("W8A8_STATIC", "compressed-tensors", {"act_range": "mse"}),
        ("FP8", "compressed-tensors", {}),
        ("int8-tensor/int8-tensor", "compressed-tensors", {}),
        ("W8A8_STATIC_SINKS", "fewbits", {"act_range": "percentile"}),
        ("int8-channel/int8-asym-g32-static", "fewbits", {}),
    ],
)
def test_what_is_measured_is_what_is_written(
    dense: Path, tmp_path: Path, scheme: str, kind: str, options, monkeypatch
) -> None:
    from transformers import AutoModelForCausalLM

    from fewbits.evaluation import evaluate
    from fewbits.kernels.reference import KERNEL

    out = run(dense, tmp_path / "q", scheme, method="gptq", **options)
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["checkpoint_format"] == kind
    static = "static" in certificate["scheme"]["activations"]
    assert certificate["scheme"].get("act_range") == (options.get("act_range", "absmax") if static else None)
    written = tensors(out)
    assert ("model.layers.0.mlp.down_proj.input_scale" in written) == static
    q, k = (written.get(f"model.layers.1.self_attn.{part}_proj.input_scale") for part in "qk")
    assert not static or torch.equal(q, k)
    stated = certificate["evaluations"][0]
    found = evaluate(str(out), against=str(dense), samples=2, sequence_length=stated["text"]["sequence_length"])
    assert found.kl.mean == pytest.approx(stated["kl"]["mean"], rel=0.1)
    if static:
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert kind != "fewbits" or config["version"] == 6
        ids = torch.arange(48)[None] * 5 % 256
        monkeypatch.setattr("fewbits.nn.qlinear.choose", lambda spec: KERNEL)  # float32: no other level for a last bit
        ours, theirs = load(out)[0], AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.no_grad():
            assert float((ours(ids).logits - theirs(ids).logits).norm() / theirs(ids).logits.norm()) < 0.02
        assert set(ours.state_dict()) >= {name for name in written if kind == "fewbits"}


def test_a_damaged_input_scale_is_refused(dense: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for number, scheme in enumerate(("W8A8_STATIC", "W8A8_STATIC_SINKS")):
        out = run(dense, tmp_path / str(number), scheme, method="rtn", eval_samples=0)
        changed = tensors(out)
        changed["model.layers.0.mlp.up_proj.input_scale"] *= -1
        save_file(changed, out / "model.safetensors", {"format": "pt"})
        with pytest.raises(BadInput, match=r"up_proj.*input_scale.*damaged"):
            load(out)
