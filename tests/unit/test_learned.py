"""Learned rounding: it starts at the solver's codes, never ends worse, and takes any grid and any block."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import Stop, run, same, tensors
from tiny_runtime_models import saved, tiny_llama
from torch import Tensor, nn

from fewbits.algorithms.base import Lesson, Pupil
from fewbits.algorithms.compose import compose
from fewbits.algorithms.learned import LearnedRounding, block_sums, distance, token_loss
from fewbits.calibration.collect import collect_inputs
from fewbits.calibration.stats import Inputs
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.formats import parse_format
from fewbits.models.walk import linears

FORMATS = [
    "int3-g16", "int2-asym-g16", "int3-asym-channel", "int3-min-g16", "nf4-g16", "nf4-g16-dq", "nvfp4",
    "nvfp4_4over6", "mxfp4", "lloyd3_fit-g16", "fp4_e2m1-tensor", "fp8_block", "int3-g20",
]  # fmt: skip
QUICK = LearnedRounding(iterations=30, tokens=64)


class Toy(nn.Module):
    """A block: two layers and what passes by them."""

    def __init__(self, width: int = 32, middle: int = 48) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, middle, bias=False), nn.Linear(middle, width, bias=False)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x + self.down(nn.functional.silu(self.up(normed)))


def lesson(format_name: str, method: str = "gptq", *, sequences: int = 16, drift: float = 0.01) -> tuple[Toy, Lesson]:
    """A toy block quantized by `method`, its decoded weights in place, on inputs that have drifted."""
    torch.manual_seed(0)
    block = Toy().requires_grad_(False)
    mixing = torch.eye(32) + 0.15 * torch.randn(32, 32)
    reference = torch.randn(sequences, 32, 32) @ mixing
    inputs = reference + drift * torch.randn(sequences, 32, 32) @ mixing
    targets = block(reference)
    refs = linears(block)
    sums = collect_inputs([[ref] for ref in refs], block, [inputs], frozenset({"hessian"}))
    recipe, pupils = compose(method), []
    for ref in refs:
        weight = ref.weight.clone()
        seen = sums[ref.name].inputs(ref.name)
        format = parse_format(format_name).with_scale_dtype(torch.bfloat16)
        solved = recipe.weights.solve(weight, format, seen, ref.name)
        ref.write(solved.quantized.dequantize())
        pupils.append(Pupil(ref=ref, weight=weight, quantized=solved.quantized, inputs=seen))
    return block, Lesson(name="toy", pupils=pupils, forward=block, inputs=list(inputs), targets=list(targets))


def weights(block: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.clone() for name, parameter in block.named_parameters()}


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_it_starts_at_the_solvers_codes_and_never_ends_worse(format_name: str, method: str) -> None:
    block, given = lesson(format_name, method)
    before = weights(block)
    still = dataclasses.replace(QUICK, iterations=0).learn(given)
    assert still.before == still.after
    for pupil, quantized in zip(given.pupils, still.quantized, strict=True):
        assert torch.equal(quantized.codes, pupil.quantized.codes) and torch.equal(
            quantized.scale, pupil.quantized.scale
        )
    assert all(torch.equal(value, before[name]) for name, value in weights(block).items())
    found = QUICK.learn(given)
    assert found.before == still.before and found.after <= found.before
    for pupil, quantized in zip(given.pupils, found.quantized, strict=True):
        assert int((quantized.codes.int() - pupil.quantized.codes.int()).abs().max()) <= 1, "a neighbour or itself"
        back = type(quantized).from_state(pupil.quantized.format, quantized.shape, quantized.to_state())
        assert torch.equal(back.dequantize(), quantized.dequantize()), "what was learned is what is stored"
    assert not any(p.requires_grad or p.grad is not None for p in block.parameters())


BOUNDS = {"int2-asym-g16": 0.75, "int3-g16": 0.92, "nf4-g16": 0.92, "nvfp4": 0.99}
THOROUGH = LearnedRounding(iterations=100, tokens=128, held=0.25)


@pytest.mark.parametrize("format_name", BOUNDS)
def test_the_held_loss_falls_below_that_of_rounding(format_name: str) -> None:
    _, given = lesson(format_name, "rtn", sequences=64)
    found = THOROUGH.learn(given)
    assert found.after < BOUNDS[format_name] * found.before


def test_gptq_is_improved_too_by_either_kind_of_variable() -> None:
    _, given = lesson("int2-asym-g16", sequences=64)
    assert (both := THOROUGH.learn(given)).after < 0.93 * both.before
    offsets = dataclasses.replace(THOROUGH, range_lr=0).learn(given)
    assert offsets.after < 0.97 * offsets.before
    scales = dataclasses.replace(THOROUGH, lr=0).learn(given)
    assert scales.after < 0.93 * scales.before
    for pupil, codes, ranges in zip(given.pupils, offsets.quantized, scales.quantized, strict=True):
        assert torch.equal(codes.scale, pupil.quantized.scale) and not torch.equal(codes.codes, pupil.quantized.codes)
        assert torch.equal(ranges.codes, pupil.quantized.codes) and not torch.equal(ranges.scale, pupil.quantized.scale)


@pytest.mark.parametrize("held", [0.0, 0.25])
def test_the_loss_reported_is_that_of_what_is_returned(held: float) -> None:
    block, given = lesson("int3-asym-g16", "rtn")
    step = LearnedRounding(iterations=40, tokens=64, held=held)
    found = step.learn(given)
    for pupil, quantized in zip(given.pupils, found.quantized, strict=True):
        pupil.ref.write(quantized.dequantize())
    _, chosen_by = step._split(16, step.sequences(16, 32))
    losses = [token_loss(block(given.inputs[i][None])[0], given.targets[i]).mean() for i in chosen_by]
    again = torch.stack(losses).mean()
    assert float(again) == pytest.approx(found.after, rel=1e-4)


def test_the_same_seed_gives_the_same_codes() -> None:
    runs = [QUICK.learn(lesson("int3-asym-g16", "rtn")[1]) for _ in "ab"]
    assert runs[0].after == runs[1].after
    for first, second in zip(runs[0].quantized, runs[1].quantized, strict=True):
        assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)


def test_a_sink_token_is_one_token_among_others() -> None:
    """In plain squares a token of magnitude 26,000 would be all of the loss."""
    target = torch.ones(8, 16)
    target[0] = 26_000
    noisy = target * 1.01
    loss = token_loss(noisy, target)
    assert torch.allclose(loss, torch.full((8,), 1e-4), rtol=1e-2)
    plain = (noisy - target).square().sum(-1)
    assert float(plain[0] / plain.sum()) > 0.999_999
    assert bool(torch.isfinite(token_loss(torch.zeros(2, 4), torch.zeros(2, 4))).all())


def test_distance_is_that_of_the_best_value_given_the_others() -> None:
    _, given = lesson("int3-g16")
    pupil = given.pupils[0]
    r = distance(pupil)
    hessian = pupil.inputs.hessian.clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    values = pupil.quantized.dequantize().double()
    row, column, step = 3, 5, float(pupil.quantized.scale[3, 0])
    at = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    tried = values[row].repeat(len(at), 1)
    tried[:, column] += at * step
    delta = pupil.weight[row].double() - tried
    best = float(at[((delta @ hessian) * delta).sum(1).argmin()])
    assert float(r[row, column]) == pytest.approx(min(max(best, -0.49), 0.49), abs=2e-3)
    alone = distance(dataclasses.replace(pupil, inputs=Inputs()))
    expected = (pupil.weight - values)[row, column] / step
    assert float(alone[row, column]) == pytest.approx(float(expected.clamp(-0.49, 0.49)), abs=1e-3)


@pytest.mark.parametrize("format_name", ["int4-g16", "int4-g20", "int4-channel", "fp4_e2m1-tensor", "fp8_block"])
def test_sums_by_block_are_the_adjoint_of_expanding(format_name: str) -> None:
    format = parse_format(format_name)
    x = torch.randn(150, 200, dtype=torch.float64)
    scale = torch.randn(format.parameter_shape((150, 200)), dtype=torch.float64)
    spread = format.expand(scale, None, (150, 200))[0].expand(150, 200)
    assert float((x * spread).sum()) == pytest.approx(float((block_sums(x, format) * scale).sum()))


def test_bad_options_and_overflow_are_said() -> None:
    for options in ({"iterations": -1}, {"held": 1.0}, {"lr": -0.1}, {"tokens": 0}):
        with pytest.raises(BadInput):
            LearnedRounding(**options)
    _, given = lesson("int3-g16")
    given.targets[0][0, 0] = torch.nan
    with pytest.raises(FewbitsError, match=r"toy: .*NaN"):
        dataclasses.replace(QUICK, iterations=0).learn(given)


def test_sequences_are_split_for_any_number_of_them() -> None:
    for samples in range(1, 40):
        size = LearnedRounding().sequences(samples, 512)
        everything = list(range(samples))
        trained, held = LearnedRounding(held=0.25)._split(samples, size)
        assert len(trained) >= size and len(held) >= size and len(held) % size == 0
        assert samples == 1 or sorted(trained + held) == everything
        trained, chosen_by = LearnedRounding()._split(samples, size)
        assert trained == everything and len(chosen_by) % size == 0 and set(chosen_by) <= set(everything)


# --- in the pipeline ------------------------------------------------------------------------------

LEARN: dict[str, Any] = {
    "method": "gptq,learned", "method_options": {"iterations": 12, "tokens": 128}, "samples": 8, "eval_samples": 0,
}  # fmt: skip

SOLVER: dict[str, Any] = {"method": "gptq", "samples": 8, "eval_samples": 0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(layers=2), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def learned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(dense, tmp_path_factory.mktemp("out") / "q", "int2-asym-g32", **LEARN)


def test_the_certificate_says_what_was_learned(learned: Path) -> None:
    certificate = json.loads((learned / "certificate.json").read_text())
    assert certificate["method"]["name"] == "gptq,learned"
    losses = [layer["block_loss"] for layer in certificate["layers"]]
    assert len(losses) == 14 and all(0 < loss["after"] <= loss["before"] for loss in losses)
    assert any(loss["after"] < loss["before"] for loss in losses)
    assert all(layer["error_of"] == "outputs" for layer in certificate["layers"])


def test_no_iterations_leave_the_solvers_bytes(dense: Path, tmp_path: Path) -> None:
    options = {**LEARN, "method_options": {"iterations": 0}}
    solver = run(dense, tmp_path / "gptq", "int3-asym-g32", **SOLVER)
    assert same(tensors(run(dense, tmp_path / "q", "int3-asym-g32", **options)), tensors(solver))


def test_an_interrupted_run_continues_to_the_same_bytes(dense: Path, learned: Path, tmp_path: Path) -> None:
    def stop(progress: Any) -> None:
        if (progress.stage, progress.done) == ("quantize", 1):
            raise Stop

    with pytest.raises(Stop):
        run(dense, tmp_path / "q", "int2-asym-g32", on_progress=stop, **LEARN)
    assert same(tensors(run(dense, tmp_path / "q", "int2-asym-g32", **LEARN)), tensors(learned))


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("W8A8", "rtn,learned"),
        ("nvfp4", "awq,gptq,refine,learned"),
        ("int3-g32", "gptaq,learned"),
        ("int2-asym-g32", "rotate,gptq,learned"),
    ],
)
def test_it_composes(dense: Path, tmp_path: Path, scheme: str, method: str) -> None:
    out = run(dense, tmp_path / "q", scheme, **{**LEARN, "method": method, "sequential": method == "gptaq,learned"})
    layers = json.loads((out / "certificate.json").read_text())["layers"]
    assert all(layer["block_loss"]["after"] <= layer["block_loss"]["before"] for layer in layers)
    assert method != "rtn,learned" or any(
        layer["block_loss"]["after"] < layer["block_loss"]["before"] for layer in layers
    )


def test_rounding_of_activations_lets_gradients_through() -> None:
    from fewbits.pipeline.rounding import quantized_activations

    block = Toy()
    refs = linears(block)
    with quantized_activations(refs, parse_format("int4-token")):
        block(torch.randn(2, 8, 32)).square().sum().backward()
    assert all(ref.gradient is not None and float(ref.gradient.abs().sum()) > 0 for ref in refs)


def test_fused_experts_learn(tmp_path: Path) -> None:
    model = tiny_llama(
        layers=1, model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, tied=False,
        decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    saved(model, tmp_path / "moe")
    options = {**LEARN, "samples": 32, "method_options": {"iterations": 40, "tokens": 512}}
    solver = run(tmp_path / "moe", tmp_path / "gptq", "int2-asym-g16", **{**SOLVER, "samples": 32})
    found, before = tensors(run(tmp_path / "moe", tmp_path / "q", "int2-asym-g16", **options)), tensors(solver)
    moved = {name for name in found if ".experts." in name and not torch.equal(found[name], before[name])}
    assert {name.split(".")[-2] for name in moved} == {"gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[-3] for name in moved} == {"0", "1", "2", "3"}
