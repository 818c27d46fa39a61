"""Low-rank correction: optimal under the calibration metric, never worse once stored, computed as it is measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_learned import QUICK, lesson
from test_pipeline import Stop, run, same, tensors
from tiny_runtime_models import saved, tiny_llama
from torch import Tensor

from fewbits.algorithms.base import Solved, damped_hessian, proxy_loss
from fewbits.algorithms.compose import compose
from fewbits.algorithms.low_rank import LowRankCorrection, closed_form, stored
from fewbits.calibration.stats import Inputs
from fewbits.checkpoints import native
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, FewbitsError, Unsupported
from fewbits.core.progress import Progress
from fewbits.evaluation import evaluate
from fewbits.formats import parse_format
from fewbits.formats.low_rank import LowRank, LowRankSpec
from fewbits.kernels.reference import KERNEL
from fewbits.nn.qlinear import QLinear
from fewbits.pipeline.planning import plan as make_plan
from fewbits.report.certificate import read_certificate
from fewbits.runtime.engine import Engine
from fewbits.runtime.load import load, load_all

WIDE, TALL = (24, 40), (40, 24)


def problem(shape: tuple[int, int], seed: int = 0, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """(D, damped H) of correlated inputs, float64."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    mixing = torch.eye(columns, dtype=torch.float64) + 0.3 * torch.randn(
        columns, columns, generator=generator, dtype=torch.float64
    )
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) @ mixing
    delta = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return delta, damped_hessian(2 / tokens * x.T @ x, 0.01)


def loss_of(delta: Tensor, hessian: Tensor, out: Tensor, into: Tensor) -> float:
    return float(proxy_loss(delta - out @ into, hessian).sum())


# --- the closed form ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("rank", [1, 4])
def test_no_gradient_finds_a_better_residual(shape: tuple[int, int], rank: int) -> None:
    delta, hessian = problem(shape)
    best = loss_of(delta, hessian, *closed_form(delta, hessian, rank))
    generator = torch.Generator().manual_seed(1)
    out = torch.randn(shape[0], rank, generator=generator, dtype=torch.float64).mul_(0.1).requires_grad_()
    into = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64).mul_(0.1).requires_grad_()
    search = torch.optim.LBFGS([out, into], max_iter=500, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        left = delta - out @ into
        loss = ((left @ hessian) * left).sum()
        loss.backward()
        return loss

    search.step(closure)
    found = float(closure().detach())
    assert best <= found * (1 + 1e-9)
    assert found == pytest.approx(best, rel=1e-4), "the search got there, so the comparison says something"


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_what_is_left_are_the_singular_values_cut_off(shape: tuple[int, int]) -> None:
    delta, hessian = problem(shape)
    values = torch.linalg.svdvals(delta @ torch.linalg.cholesky(hessian))
    losses = [loss_of(delta, hessian, *closed_form(delta, hessian, rank)) for rank in range(1, 25)]
    for rank, loss in enumerate(losses, 1):
        assert loss == pytest.approx(float(values[rank:].square().sum()), rel=1e-8, abs=1e-9)
    assert losses == sorted(losses, reverse=True), "monotone in the rank"
    assert losses[-1] < 1e-9, "full rank is exact"


def test_without_calibration_it_is_the_plain_singular_value_decomposition() -> None:
    delta = problem(WIDE)[0].float()
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    plain = u[:, :3] * s[:3] @ v[:3]
    format = parse_format("int2-channel")
    solved = Solved(quantized=format.quantize(torch.zeros_like(delta)))
    for inputs in (Inputs(), Inputs(hessian=torch.zeros(40, 40, dtype=torch.float64))):
        done = LowRankCorrection(rank=3).correct(solved, [delta], inputs, "layer", pytest.fail)
        assert done.residuals[0] is not None
        assert float((done.residuals[0].dense(torch.float64) - plain).norm() / plain.norm()) < 5e-3


# --- as it is stored ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_what_is_stored_is_nearly_as_good_and_no_row_is_worse(shape: tuple[int, int], dtype: torch.dtype) -> None:
    delta, hessian = problem(shape)
    before = proxy_loss(delta, hessian)
    losses = []
    for rank in (1, 2, 4, 8, 16, 24):
        found = stored(delta, hessian, LowRankSpec(rank=rank, dtype=dtype), "layer")
        assert found.out.dtype == found.into.dtype == dtype and found.spec.rank == rank
        after = proxy_loss(delta - found.dense(torch.float64), hessian)
        assert bool((after <= before).all())
        best = loss_of(delta, hessian, *closed_form(delta, hessian, rank))
        assert best * (1 - 1e-9) <= float(after.sum()) <= best + 2e-4 * float(before.sum())
        losses.append(float(after.sum()))
    assert losses == sorted(losses, reverse=True)


def test_sizes_far_from_one_fit_into_float16() -> None:
    delta, hessian = problem(WIDE)
    for scale in (1e-4, 1e4):
        found = stored(delta * scale, hessian, LowRankSpec(rank=24, dtype=torch.float16), "layer")
        assert float((found.dense(torch.float64) - delta * scale).norm() / delta.norm()) < 1e-3 * scale
    with pytest.raises(FewbitsError, match=r"layer: its residual overflows float16.*stored=bfloat16"):
        stored(delta * 1e12, hessian, LowRankSpec(rank=4, dtype=torch.float16), "layer")


def test_a_row_that_needs_nothing_gets_nothing() -> None:
    delta, hessian = problem(WIDE)
    delta[5] = 0
    found = stored(delta, hessian, LowRankSpec(rank=4), "layer")
    assert not bool(found.out[5].any()) and bool(found.out.any())


# --- as a step ------------------------------------------------------------------------------------


def solvable(shape: tuple[int, int] = (48, 64), seed: int = 0) -> tuple[Tensor, Inputs]:
    delta, hessian = problem(shape, seed, tokens=400)
    return delta.float(), Inputs(hessian=hessian, tokens=400)


@pytest.mark.parametrize("format_name", ["int2-asym-g16", "int3-g16", "nf4-g16", "nvfp4", "int4-tensor"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq", "gptq,refine"])
def test_any_codes_are_corrected_and_the_loss_is_told(method: str, format_name: str) -> None:
    weight, inputs = solvable()
    format = parse_format(format_name).with_scale_dtype(torch.bfloat16)
    recipe = compose(method)

    def solve(stacked: Tensor) -> Solved:
        found = recipe.weights.solve(stacked, format, inputs, "layer")
        for refinement in recipe.refinements:
            found = refinement.refine(found, stacked, inputs, "layer")
        return found

    assert inputs.hessian is not None
    first = solve(weight)
    before = proxy_loss(weight - first.quantized.dequantize(), inputs.hessian)
    losses = [float(before.sum())]
    for step in (LowRankCorrection(rank=4), LowRankCorrection(rank=12), LowRankCorrection(rank=12, rounds=3)):
        done = step.correct(first, [weight[:16], weight[16:]], inputs, "layer", solve)
        residuals = [each for each in done.residuals if each is not None]
        assert [len(each.out) for each in residuals] == [16, 32], "each linear has its own"
        values = done.solved.quantized.dequantize() + torch.cat([each.dense() for each in residuals])
        after = proxy_loss(weight - values, inputs.hessian)
        assert done.solved.loss is not None and done.solved.zero_loss is not None and done.solved.rtn_loss is not None
        torch.testing.assert_close(done.solved.loss, after)
        torch.testing.assert_close(done.solved.zero_loss, proxy_loss(weight, inputs.hessian))
        rounded = proxy_loss(weight - format.quantize(weight).dequantize(), inputs.hessian)
        torch.testing.assert_close(done.solved.rtn_loss, rounded)
        losses.append(float(after.sum()))
    assert losses[1] < 0.95 * losses[0] and losses[2] < losses[1] and losses[3] <= losses[2] * (1 + 1e-6)


def test_rank_zero_leaves_all_as_it_is() -> None:
    weight, inputs = solvable()
    solved = compose("gptq").weights.solve(weight, parse_format("int3-g16"), inputs, "layer")
    done = LowRankCorrection(rank=0).correct(solved, [weight], inputs, "layer", pytest.fail)
    assert done.solved is solved and done.residuals == [None]
    assert LowRankCorrection(rank=0).spec((8, 8)) is None


def test_a_rank_is_never_more_than_the_linear_has() -> None:
    spec = LowRankCorrection(rank=64).spec((24, 40))
    assert spec is not None and spec.rank == 24
    assert spec.bits((24, 40)) == 16 * 24 * (24 + 40)
    weight, inputs = solvable((24, 40))
    solved = compose("rtn").weights.solve(weight, parse_format("int2-channel"), inputs, "layer")
    done = LowRankCorrection(rank=64).correct(solved, [weight], inputs, "layer", pytest.fail)
    assert done.solved.loss is not None and done.solved.zero_loss is not None
    assert float(done.solved.loss.sum()) < 1e-4 * float(done.solved.zero_loss.sum())


def test_drift_of_the_inputs_is_aimed_at() -> None:
    """Under GPTAQ's objective the residual of the drifted target is better than that of the weight."""
    weight, inputs = solvable()
    assert inputs.hessian is not None
    generator = torch.Generator().manual_seed(3)
    drift = 0.1 * torch.randn(64, 64, generator=generator, dtype=torch.float64)
    inputs = dataclasses.replace(inputs, cross=drift @ inputs.hessian)
    gptaq = compose("gptaq,lowrank", {"strength": 1.0, "rank": 8})
    solved = gptaq.weights.solve(weight, parse_format("int3-g16"), inputs, "layer")

    def objective(step: Any) -> float:
        done = step.correct(solved, [weight], inputs, "layer", pytest.fail)
        delta = weight - solved.quantized.dequantize() - done.residuals[0].dense()
        return float(gptaq.weights._objective(delta, weight, inputs).sum())  # type: ignore[attr-defined]

    assert gptaq.residual is not None
    assert objective(gptaq.residual) < objective(LowRankCorrection(rank=8, strength=0))


def test_bad_options_are_refused() -> None:
    for options in ({"rank": -1}, {"rounds": 0}, {"damping": 0}, {"stored": "float32"}):
        with pytest.raises(BadInput):
            LowRankCorrection(**options)  # type: ignore[arg-type]


def test_it_comes_before_learning_whatever_the_order_named() -> None:
    assert compose("learned,lowrank,refine,gptq").names == ("gptq", "refine", "lowrank", "learned")
    assert compose("lowrank").names == ("rtn", "lowrank")


@pytest.mark.parametrize("format_name", ["int2-asym-g16", "int3-min-g16"])
def test_learning_goes_on_with_the_residual_in_place(format_name: str) -> None:
    block, given = lesson(format_name, "gptq")
    pupils = []
    for pupil in given.pupils:
        solved = Solved(quantized=pupil.quantized)
        done = LowRankCorrection(rank=4).correct(solved, [pupil.weight], pupil.inputs, "toy", pytest.fail)
        pupils.append(dataclasses.replace(pupil, residual=done.residuals[0]))
        pupils[-1].ref.write(pupils[-1].values(pupil.quantized))
    corrected = dataclasses.replace(given, pupils=pupils)
    plain, found = QUICK.learn(given), QUICK.learn(corrected)
    assert found.before < plain.before and found.after < found.before and found.after < plain.after
    held = {name: parameter.clone() for name, parameter in block.named_parameters()}
    for pupil, quantized in zip(pupils, found.quantized, strict=True):
        assert torch.equal(held[f"{pupil.ref.name}.weight"], pupil.values(quantized))


# --- in a module ----------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [None, "int8-token"])
@pytest.mark.parametrize("orders", [(), (4,)])
def test_a_module_multiplies_by_the_sum(orders: tuple[int, ...], activations: str | None) -> None:
    torch.manual_seed(0)
    weight = parse_format("int4-asym-g32").quantize(torch.randn(48, 64))
    residual = LowRank(out=torch.randn(48, 4).bfloat16(), into=torch.randn(4, 64).bfloat16())
    format = None if activations is None else parse_format(activations)
    module = QLinear.from_quantized(weight, torch.randn(48), format, orders, residual)
    plain = QLinear.from_quantized(weight, module.bias, format, orders)
    for each in (module, plain):
        each.prepack(KERNEL)
    dense = weight.dequantize() + residual.out.float() @ residual.into.float()
    assert torch.equal(module.dequantize(), dense) and module.state_dict().keys() - plain.state_dict().keys() == {
        "residual_out", "residual_in",
    }  # fmt: skip
    x = torch.randn(3, 5, 64)
    assert not torch.allclose(module(x), plain(x), atol=0.1)
    eye = QLinear.from_quantized(parse_format("int8-channel").quantize(dense), module.bias, format, orders)
    eye.prepack(KERNEL)
    torch.testing.assert_close(module(x), eye(x), rtol=0.05, atol=0.5)
    half = module.to(torch.float16)
    assert half.get_buffer("residual_in").dtype == torch.bfloat16, "a cast moves no weight"
    assert "residual of rank 4" in repr(module)


# --- in the pipeline ------------------------------------------------------------------------------

SCHEME = "int3-asym-g32"
CORRECTED: dict[str, Any] = {"method": "gptq,lowrank", "method_options": {"rank": 4}}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(layers=2), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def corrected(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(dense, tmp_path_factory.mktemp("out") / "q", SCHEME, **CORRECTED)


def of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "certificate.json").read_text())
    return found


def test_the_residual_is_written_counted_and_reported(dense: Path, corrected: Path, tmp_path: Path) -> None:
    certificate, plain = of(corrected), of(run(dense, tmp_path / "gptq", SCHEME, method="gptq"))
    assert certificate["checkpoint_format"] == "fewbits" and certificate["method"]["name"] == "gptq,lowrank"
    extra = weights = 0.0
    for layer, before in zip(certificate["layers"], plain["layers"], strict=True):
        rows, columns = layer["shape"]
        each = 16 * 4 * (rows + columns) / (rows * columns)
        assert layer["residual"] == {"rank": 4, "dtype": "bfloat16", "bits": pytest.approx(each)}
        assert layer["bits"] == pytest.approx(before["bits"] + each)
        extra, weights = extra + each * rows * columns, weights + rows * columns
        if layer["block"] == 0:  # the same inputs, so the same codes
            assert layer["relative_error"] < before["relative_error"]
    assert certificate["size"]["bits_per_weight"] == pytest.approx(plain["size"]["bits_per_weight"] + extra / weights)
    config = json.loads((corrected / "config.json").read_text())["quantization_config"]
    assert config["version"] == 3
    assert config["modules"]["model.layers.0.mlp.up_proj"]["residual"] == {"rank": 4, "dtype": "bfloat16"}
    written = tensors(corrected)
    assert written["model.layers.0.mlp.up_proj.residual_out"].shape == (160, 4)
    assert written["model.layers.0.mlp.up_proj.residual_in"].shape == (4, 64)
    assert certificate["evaluations"][0]["kl"]["mean"] < plain["evaluations"][0]["kl"]["mean"]
    assert {layer.format for layer in read_certificate(corrected).layers} == {f"{SCHEME} + rank 4"}


def test_what_was_measured_is_what_loads(dense: Path, corrected: Path) -> None:
    stated = of(corrected)["evaluations"][0]
    found = evaluate(str(corrected), against=str(dense), samples=2, sequence_length=stated["text"]["sequence_length"])
    assert found.kl is not None and found.kl.mean == pytest.approx(stated["kl"]["mean"], rel=0.03)


def test_every_way_to_load_gives_the_same_logits(
    dense: Path, corrected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from fewbits.nn import qlinear

    monkeypatch.setattr(qlinear, "choose", lambda spec: KERNEL)
    loaded = load_all(corrected, dtype=torch.float32)
    ids = torch.arange(40)[None] * 5 % 256
    twin = load(dense, dtype=torch.float32)[0]
    with torch.no_grad():
        for name in loaded.quantized:
            twin.get_submodule(name).weight.copy_(loaded.model.get_submodule(name).dequantize())
        expected = twin(ids).logits
        torch.testing.assert_close(loaded.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        theirs = AutoModelForCausalLM.from_pretrained(corrected, dtype=torch.float32).eval()
        module = theirs.get_submodule("model.layers.1.mlp.down_proj")
        assert isinstance(module, QLinear) and module.get_buffer("residual_in").dtype == torch.bfloat16
        torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-4, atol=1e-4)
        loaded.model.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_decode_engine_adds_the_residual(dense: Path, corrected: Path) -> None:
    model, _ = load(corrected, dtype=torch.float32)
    ids = torch.arange(12)[None] * 7 % 256
    with torch.no_grad():
        expected = model(ids).logits[0, -1]
    engine = Engine(model)
    engine.prefill(ids[0, :-1].tolist())
    found = engine.step(int(ids[0, -1]))
    assert float((found.flatten() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_interrupted_run_continues_to_the_same_bytes(
    dense: Path, corrected: Path, tmp_path: Path, blocks: int
) -> None:
    def stop(progress: Progress) -> None:
        if (progress.stage, progress.done) == ("quantize", blocks):
            raise Stop

    with pytest.raises(Stop):
        run(dense, tmp_path / "q", SCHEME, on_progress=stop, **CORRECTED)
    assert same(tensors(run(dense, tmp_path / "q", SCHEME, **CORRECTED)), tensors(corrected))


@pytest.mark.parametrize(
    "method", ["lowrank", "rotate,gptq,refine,lowrank", "awq,gptaq,lowrank", "gptq,lowrank,learned"]
)
def test_it_goes_with_other_steps(dense: Path, tmp_path: Path, method: str) -> None:
    options: dict[str, Any] = {"rank": 4, "rounds": 2, "stored": "float16"}
    if "learned" in method:
        options |= {"iterations": 4, "tokens": 128}
    if "rotate" in method:
        options |= {"online": True}
    out = run(dense, tmp_path / "q", SCHEME, method=method, method_options=options, sequential="awq" in method)
    stated = of(out)["evaluations"][0]
    length = stated["text"]["sequence_length"]
    found = evaluate(str(out), against=str(dense), samples=2, sequence_length=length)
    assert found.kl is not None and found.kl.mean == pytest.approx(stated["kl"]["mean"], rel=0.03)


def test_rank_zero_writes_what_the_method_alone_does(dense: Path, tmp_path: Path) -> None:
    zero = run(dense, tmp_path / "zero", SCHEME, method="gptq,lowrank", method_options={"rank": 0}, eval_samples=0)
    assert same(tensors(zero), tensors(run(dense, tmp_path / "gptq", SCHEME, method="gptq", eval_samples=0)))
    assert of(zero)["checkpoint_format"] == "compressed-tensors"


def test_compressed_tensors_is_refused_with_the_way_out(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"compressed-tensors cannot say gptq,lowrank.*native"):
        run(dense, tmp_path / "q", SCHEME, checkpoint_format="compressed-tensors", **CORRECTED)


def test_rounded_activations_reach_the_residual_too(dense: Path, tmp_path: Path) -> None:
    out = run(dense, tmp_path / "q", "W8A8", method="lowrank", method_options={"rank": 4})
    stated = of(out)["evaluations"][0]
    found = evaluate(str(out), against=str(dense), samples=2, sequence_length=stated["text"]["sequence_length"])
    assert found.kl is not None and found.kl.mean == pytest.approx(stated["kl"]["mean"], rel=0.1)


def test_experts_have_residuals_of_their_own(tmp_path: Path) -> None:
    model = tiny_llama(
        layers=1, model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, tied=False,
        decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    saved(model, tmp_path / "moe")
    out = run(tmp_path / "moe", tmp_path / "q", SCHEME, **CORRECTED)
    written = tensors(out)
    assert written["model.layers.0.mlp.experts.3.up_proj.residual_out"].shape == (32, 4)
    stated = of(out)["evaluations"][0]
    found = evaluate(
        str(out), against=str(tmp_path / "moe"), samples=2, sequence_length=stated["text"]["sequence_length"]
    )
    assert found.kl is not None and found.kl.mean == pytest.approx(stated["kl"]["mean"], rel=0.03)


def test_a_plan_makes_room_for_it(dense: Path, tmp_path: Path) -> None:
    bits, options = 6.5, {**CORRECTED, "eval_samples": 0}
    out = run(dense, tmp_path / "q", None, bits=bits, group_size=32, **options)  # type: ignore[arg-type]
    found = of(out)
    assert bits - 0.2 < found["size"]["bits_per_weight"] <= bits
    with pytest.raises(BadInput, match=r"of which the residual takes .* lower rank"):
        make_plan(dense, 2.5, residual=LowRankCorrection(rank=4), samples=4, sequence_length=64)


# --- a damaged checkpoint -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rank": 0, "dtype": "bfloat16"}, "expected a rank from 1 to 64"),
        ({"rank": 65, "dtype": "bfloat16"}, "expected a rank from 1 to 64"),
        ({"rank": True, "dtype": "bfloat16"}, "expected a rank"),
        ({"rank": 4, "dtype": "float64"}, "a dtype of bfloat16, float16"),
        ("rank 4", "expected a rank"),
    ],
)
def test_what_a_configuration_may_say(entry: Any, message: str) -> None:
    module = {"format": "int4-g32", "shape": [64, 160], "scale_dtype": "bfloat16", "residual": entry}
    with pytest.raises(BadInput, match=message):
        native.read_modules({"version": 3, "modules": {"m": module}})


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.fill_(torch.nan), "NaN or infinite"),
    (lambda t: t[:, :2].contiguous(), r"rank 4 beside \(64, 64\)"),
    (lambda t: t.float(), "rank 4 beside"),
])  # fmt: skip
def test_damaged_factors_are_refused_by_name(corrected: Path, tmp_path: Path, change: Any, message: str) -> None:
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(corrected, tmp_path / "q")
    found, name = tensors(corrected), "model.layers.1.self_attn.q_proj.residual_out"
    found[name] = change(found[name])
    save_file(found, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=rf"layers\.1\.self_attn\.q_proj: residual_out .*{message}"):
        load_all(tmp_path / "q")
    assert open_source(corrected, allow_quantized=True).config()["quantization_config"]["version"] == 3
