"""`--method auto`: the time is kept, the choice is the best that fits, and an interruption does not change it."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pipeline import Stop, run, same, tensors
from tiny_runtime_models import saved, tiny_llama
from typer.testing import CliRunner

from fewbits.algorithms import METHODS
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.core.progress import Progress
from fewbits.formats import parse_format
from fewbits.pipeline import auto as trials_module
from fewbits.pipeline import quantize as run_module
from fewbits.planner import auto
from fewbits.planner.auto import CANDIDATES, FIRST, Candidate, Question, Times, Trials, ask, refuses

LAYERS = 4
TIMES = Times(fixed=10, extra=0.5, learned=0.5, per_pass=0.5, per_iteration=0.1, blocks=10)


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(layers=LAYERS), tmp_path_factory.mktemp("dense"))


# ---- what fits, and what is best: no model


def question(minutes: float = 6.0) -> Question:
    return ask("auto", minutes, {}, sequential=False)


def called(name: str) -> Candidate:
    return next(candidate for candidate in CANDIDATES if candidate.name == name)


def trials(minutes: float, **found: tuple[float, float]) -> Trials:
    """Trials with loss and seconds of the candidates named (a blank as two underscores)."""
    made = Trials(question=question(minutes), times=TIMES)
    made.begin(3, 0.0, 1.0)
    for name, (loss, seconds) in {"rtn": (1.0, 0.1), **found}.items():
        made.add(called(name.replace("__", " ").replace("_", ",")), 3, loss, seconds)
    return made


def test_every_candidate_is_a_composition_of_registered_steps() -> None:
    names = [candidate.name for candidate in CANDIDATES]
    assert len(set(names)) == len(names) and names[0] == FIRST == "rtn"
    for candidate in CANDIDATES:
        assert set(candidate.method.split(",")) <= set(METHODS)
        assert not candidate.recipe.rewrites, "the walk is through one model"
        assert candidate.after is None or names.index(candidate.after) < names.index(candidate.name)
        assert candidate.recipe.statistics <= CANDIDATES[-1].recipe.statistics | {"cross", "mean_abs"}


def test_the_whole_run_is_blocks_and_what_is_beside_them_with_a_margin() -> None:
    made = trials(6, gptq=(0.4, 2.0))
    made.times = dataclasses.replace(TIMES, learned=0.9)
    assert made.total(called("gptq"), 30.0) == pytest.approx(30 + 1.15 * (10 + 10 * (2.0 + 0.5)))
    made.add(called("gptq,refine,learned 25"), 3, 0.3, 8.0)
    assert made.total(called("gptq,refine,learned 25"), 30.0) == pytest.approx(30 + 1.15 * (10 + 10 * (8.0 + 0.9)))


def test_the_least_loss_that_fits_is_chosen() -> None:
    found = {"gptq": (0.4, 2.0), "gptq_refine": (0.3, 5.0), "gptaq_refine": (0.2, 40.0)}
    decided = trials(6, **found).decide(passed=20.0, probed=15.0)
    assert decided["chosen"] == "gptq,refine" and not decided["fallback"]
    assert decided["predicted_seconds"] == pytest.approx(20 + 1.15 * (10 + 10 * 5.5))
    slow = next(entry for entry in decided["candidates"] if entry["name"] == "gptaq,refine")
    assert slow["why_not"].startswith("it would take") and slow["loss"] == pytest.approx(0.2)
    assert "0.30 of rounding to nearest's loss in block 3" in decided["why"] and "6 minutes" in decided["why"]
    assert trials(20, **found).decide(passed=20.0, probed=15.0)["chosen"] == "gptaq,refine"


def test_of_equals_the_fastest_is_chosen() -> None:
    assert trials(20, gptq=(0.4, 2.0), gptq_refine=(0.3985, 5.0)).decide(20.0, 1.0)["chosen"] == "gptq"
    assert trials(20, gptq=(0.4, 2.0), gptq_refine=(0.39, 5.0)).decide(20.0, 1.0)["chosen"] == "gptq,refine"


def test_losses_are_what_is_added_to_the_floor_by_the_scale_of_the_block() -> None:
    made = trials(20, gptq=(0.5, 2.0), hqq=(0.2, 1.0), awq_gptq_refine=(0.1, 3.0))
    made.begin(7, 0.02, 0.01)
    for name, error in (("rtn", 0.031), ("gptq", 0.021), ("hqq", 0.03)):
        made.add(called(name), 7, error, 4.0)
    assert made.loss(called("gptq")) == pytest.approx((0.5 + 0.1) / 2)
    decided = made.decide(20.0, 1.0)
    assert decided["chosen"] == "gptq", "awq is better on the one block that it was tried on"
    assert decided["tried_on"] == [3, 7] and "blocks 3 and 7" in decided["why"]


def test_undoing_what_came_in_is_better_than_adding_nothing() -> None:
    made = trials(20, gptq=(0.01, 2.0), gptaq_refine=(-0.1, 3.0), awq_gptq_refine=(-0.1005, 4.0))
    decided = made.decide(20.0, 1.0)
    assert decided["chosen"] == "gptaq,refine" and "-0.10 of rounding" in decided["why"]
    assert by_name(decided)["awq,gptq,refine"]["why_not"] == "within 1 % of the best, and slower"


@pytest.mark.parametrize(("minutes", "says"), [(1.0, "nothing else fits 1 minute"), (0.5, "nothing fits 0.5 minutes")])
def test_it_falls_back_to_rounding_and_says_so(minutes: float, says: str) -> None:
    decided = trials(minutes, gptq=(0.4, 9.0)).decide(passed=20.0, probed=5.0)
    assert decided["chosen"] == "rtn" and decided["fallback"] and says in decided["why"]


def test_rounding_that_is_best_is_no_fallback() -> None:
    decided = trials(20, gptq=(1.2, 2.0)).decide(20.0, 1.0)
    assert decided["chosen"] == "rtn" and not decided["fallback"] and "no other loses less" in decided["why"]


def test_nothing_is_tried_that_cannot_fit() -> None:
    made = trials(6, gptq=(0.4, 2.0))
    made.add(called("gptq,refine"), 3, 0.3, 3.0)
    learned = {n: called(f"gptq,refine,learned {n}") for n in (25, 50, 100)}
    # A lower bound: the solution it starts from, a pass for the targets, three forwards an iteration.
    assert made.block_seconds(learned[100]) == pytest.approx(3 + 0.5 + 100 * 0.1)
    assert made.why_not(learned[100], 30.0, 10.0) is None
    made.add(learned[25], 3, 0.25, 3.5 + 25 * 0.4)
    assert made.block_seconds(learned[100]) == pytest.approx(3.5 + 100 * 0.4), "timed once: on the line"
    assert "it would take 9m51s" in str(made.why_not(learned[100], 30.0, 10.0))
    made.add(learned[50], 3, 0.25, 3.5 + 25 * 0.4 + 25 * 0.2)
    assert made.block_seconds(learned[100]) == pytest.approx(3.5 + 25 * 0.4 + 75 * 0.2), "by the last two"


def test_learning_has_more_text_and_that_takes_time() -> None:
    made = trials(6)
    made.add(called("gptq,refine"), 3, 0.3, 3.0)
    made.question = dataclasses.replace(made.question, thin=3)
    assert made.block_seconds(called("gptq,refine,learned 50")) == pytest.approx(3 + (3 + 2 * 2) * 0.5 + 50 * 0.1)
    assert made.block_seconds(called("gptaq,refine")) == pytest.approx(3.5)


def test_trials_end_with_their_share_of_the_time() -> None:
    made = trials(6, gptq=(0.4, 2.0))
    assert made.allowance == pytest.approx(0.2 * 360)
    assert made.why_not(called("gptq,refine"), 90.0, 69.9) is None
    assert "0.1s left of the 1m12s for trials" in str(made.why_not(called("gptq,refine"), 90.0, 71.9))
    assert made.why_not(called(FIRST), 90.0, 72.1) is not None


def test_what_is_of_no_use_is_not_tried() -> None:
    plain, nested = parse_format("int4-g32"), parse_format("nf4-g32-dq")
    assert refuses(called("hqq"), [plain], known_family=True) is None
    assert "nf4-g32-dq" in str(refuses(called("hqq"), [plain, nested], known_family=True))
    assert "family" in str(refuses(called("awq,gptq,refine"), [plain], known_family=False))
    assert refuses(called("gptq,refine"), [nested], known_family=False) is None


def test_options_reach_the_steps_that_have_them() -> None:
    asked = ask("auto", None, {"damping": 0.02, "learned.tokens": 512}, sequential=False)
    assert asked.minutes == auto.MINUTES
    steps = {candidate.name: candidate.recipe.steps for candidate in asked.candidates}
    assert steps["gptq,refine"]["gptq"].damping == steps["gptq,refine"]["refine"].damping == 0.02  # type: ignore[attr-defined]
    assert steps["gptq,refine,learned 50"]["learned"].tokens == 512  # type: ignore[attr-defined]
    assert steps["gptq,refine,learned 50"]["learned"].iterations == 50  # type: ignore[attr-defined]


# ---- trials of a tiny model


SCHEME = "int3-asym-g32"
SMALL: dict[str, Any] = {"samples": 16, "sequence_length": 64, "eval_samples": 2, "method": "auto"}
COST = {"rtn": 1.0, "hqq": 2.0, "gptq": 3.0, "gptq,refine": 5.0, "gptaq,refine": 6.0, "awq,gptq,refine": 6.0}


def watch(patch: pytest.MonkeyPatch) -> Clock:
    """A clock: a run costs what COST says, and half a second for an iteration of learning; all else is free."""
    found, solve, times = Clock(), trials_module.solve_and_advance, trials_module._Probe.times

    def solve_and_advance(job: Any, *args: Any) -> Any:
        steps = job.recipe.steps
        learned = steps["learned"].iterations if "learned" in steps else 0
        found.now += COST[job.recipe.name.removesuffix(",learned")] + 0.5 * learned
        # What few iterations learn is as good to a test.
        return solve(dataclasses.replace(job, recipe=_quick(job.recipe)), *args)

    def known(probe: Any, *args: Any) -> Times:
        return dataclasses.replace(
            times(probe, *args), fixed=2.0, extra=0.1, learned=0.1, per_pass=0.1, per_iteration=0.4
        )

    patch.setattr(trials_module, "solve_and_advance", solve_and_advance)
    patch.setattr(trials_module._Probe, "times", known)
    patch.setattr(run_module, "choose", partial(trials_module.choose, clock=found))
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return watch(monkeypatch)


@pytest.fixture(scope="module")
def whole(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Clock, list[Progress]]:
    """A run of three minutes, undisturbed; what it said, and the clock after it."""
    seen: list[Progress] = []
    with pytest.MonkeyPatch.context() as patch:
        clock = watch(patch)
        out = run(dense, tmp_path_factory.mktemp("whole") / "q", SCHEME, **SMALL, minutes=3, on_progress=seen.append)
    return out, clock, seen


def _quick(recipe: Any) -> Any:
    return dataclasses.replace(
        recipe,
        learners=tuple(dataclasses.replace(each, iterations=min(each.iterations, 4)) for each in recipe.learners),
    )


def certificate(out: Path) -> dict[str, Any]:
    return json.loads((out / "certificate.json").read_text())


def by_name(choice: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry for entry in choice["candidates"]}


def test_the_time_given_bounds_trials_and_run(whole: tuple[Path, Clock, list[Progress]]) -> None:
    out, clock, seen = whole
    choice = certificate(out)["auto"]
    tried = {name: entry for name, entry in by_name(choice).items() if entry["loss"] is not None}
    assert clock.now <= 0.2 * 180 and choice["probe_seconds"] == clock.now
    assert choice["predicted_seconds"] <= 180
    assert {"rtn", "hqq", "gptq", "gptq,refine"} <= set(tried)
    assert not [name for name in tried if "learned" in name and int(name.split()[-1]) > 25]
    assert tried["gptq,refine"]["block_seconds"] == 5.0
    least = min(entry["loss"] for entry in tried.values() if entry["seconds"] <= 180)
    assert tried[choice["chosen"]]["loss"] <= least + 0.01 * abs(least)
    assert tried["gptq"]["loss"] < tried["rtn"]["loss"]
    assert all(entry["why_not"] for entry in by_name(choice).values() if entry["loss"] is None)
    assert certificate(out)["method"]["name"] == by_name(choice)[choice["chosen"]]["method"]
    assert [p.note for p in seen if p.stage == "choose"] == [choice["why"]]
    assert [p.done for p in seen if p.stage == "try"] == list(range(1, len(CANDIDATES) + 1))


def test_more_time_tries_a_second_block(dense: Path, tmp_path: Path, clock: Clock) -> None:
    out = run(dense, tmp_path / "q", "int2-asym-g32", **SMALL, minutes=50)
    choice = certificate(out)["auto"]
    assert choice["tried_on"] == [1, 2] and clock.now <= 0.2 * 3000
    assert by_name(choice)["gptq,refine,learned 400"]["loss"] is not None
    assert sum(len(entry["errors"]) == 2 for entry in choice["candidates"]) == 1 + auto.CONTENDERS
    assert len(by_name(choice)[choice["chosen"]]["errors"]) == 2


def test_too_little_time_for_anything_is_rounding_and_a_fallback(dense: Path, tmp_path: Path, clock: Clock) -> None:
    out = run(dense, tmp_path / "q", **SMALL, minutes=0.05)
    found = certificate(out)
    assert found["method"]["name"] == "rtn" and found["auto"]["why"] in found["fallbacks"]
    assert found["calibration"] is None


def test_the_error_of_a_trial_is_that_of_the_model_as_far_as_it_is_quantized(dense: Path, tmp_path: Path) -> None:
    """Blocks 0 and 1 rounded to nearest, then block 2, by hand, on whole models."""
    from fewbits.algorithms.learned import token_loss
    from fewbits.pipeline.job import prepare
    from fewbits.pipeline.shell import ModelShell
    from fewbits.runtime.load import load

    asked = (tmp_path / "q", dense, "int4-asym-g32", None, "auto", {}, None, 16, 64, 0, ("lm_head",), None, None)
    job = prepare(*asked, "auto", 0, False, "borrow", None, 6.0)  # type: ignore[arg-type]
    shell = ModelShell(job.source, job.device, torch.float32)
    chosen = [run_module._chosen(shell, index, job) for index in range(LAYERS)]
    probe = trials_module._Probe(job, shell, chosen, Clock())
    probe.walk(2, job.question.candidates[0])  # type: ignore[union-attr]
    error, _ = probe.trial(job.question.candidates[0])  # type: ignore[union-attr]
    model, _ = load(dense)
    ids, block = job.calibration.ids[::8], model.model.layers[2]  # type: ignore[union-attr]

    def put_out() -> torch.Tensor:
        reached = []
        handle = block.register_forward_hook(lambda module, args, output: reached.append(output))
        with torch.no_grad():
            model(ids)
        handle.remove()
        return reached[0][0] if isinstance(reached[0], tuple) else reached[0]

    def rounded(index: int) -> None:
        for module in model.model.layers[index].modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.copy_(job.scheme.weights.quantize(module.weight.detach()).dequantize())

    original = put_out()
    rounded(0)
    rounded(1)
    unchanged = put_out()
    rounded(2)
    found = put_out()
    assert error == pytest.approx(float(token_loss(found, original).mean()), rel=1e-4)
    assert probe.floor == pytest.approx(float(token_loss(unchanged, original).mean()), rel=1e-4)
    assert probe.scale == pytest.approx(float(token_loss(found, unchanged).mean()), rel=1e-4)


def test_a_candidate_that_fails_is_told_and_the_rest_goes_on(
    dense: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbits.algorithms.gptq import GPTQ

    def fails(*args: Any) -> Any:
        raise FewbitsError("the Hessian cannot be factored")

    monkeypatch.setattr(GPTQ, "solve", fails)
    choice = certificate(run(dense, tmp_path / "q", **SMALL, minutes=3))["auto"]
    assert by_name(choice)["gptq"]["why_not"] == "the Hessian cannot be factored"
    assert choice["chosen"] in ("rtn", "hqq")


@pytest.mark.parametrize("layers", [1, 2])
def test_models_of_few_blocks(tmp_path: Path, clock: Clock, layers: int) -> None:
    saved(tiny_llama(layers=layers), tmp_path / "m")
    choice = certificate(run(tmp_path / "m", tmp_path / "q", **{**SMALL, "samples": 1}, minutes=3))["auto"]
    assert choice["chosen"] and choice["tried_on"] in ([0], [0, 1])


def test_activations_and_plans_are_measured_as_they_will_run(dense: Path, tmp_path: Path, clock: Clock) -> None:
    found = certificate(run(dense, tmp_path / "w8a8", "W8A8", **SMALL, minutes=1))
    assert by_name(found["auto"])["gptq"]["loss"] is not None and found["scheme"]["activations"]
    assert by_name(found["auto"])["gptq"]["loss"] is not None
    pytest.importorskip("scipy")
    found = certificate(run(dense, tmp_path / "bits", None, **SMALL, minutes=1, bits=4.2, group_size=32))  # type: ignore[arg-type]
    assert found["auto"]["chosen"] and len({layer["format"] for layer in found["layers"]}) > 1


@pytest.mark.parametrize(("minutes", "windows"), [(1.0, 20), (10.0, 60)])
def test_the_text_is_that_of_the_method_taken(
    dense: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, minutes: float, windows: int
) -> None:
    """By default learning has three times the text; what is taken has what it would have had if it were named."""
    if minutes > 1:  # learning is to be best here
        monkeypatch.setattr(auto, "TIE", 0.0)
        monkeypatch.setattr(Trials, "loss", lambda self, each: 1 / (1 + (each.iterations or 0)))
    given = {**SMALL, "samples": None, "sequence_length": 32}
    found = certificate(run(dense, tmp_path / "q", SCHEME, **given, minutes=minutes))
    assert ("learned" in found["method"]["name"]) == (minutes > 1)
    assert found["calibration"]["samples"] == windows
    assert found["calibration"]["tokens"] == windows * 32


# ---- interruptions


@pytest.mark.parametrize("stage", [("choose", 1), ("quantize", 2)])
def test_an_interruption_keeps_the_choice(
    dense: Path, tmp_path: Path, clock: Clock, whole: tuple[Path, Clock, list[Progress]], stage: tuple[str, int]
) -> None:
    def stop(progress: Progress) -> None:
        if (progress.stage, progress.done) == stage:
            raise Stop

    out, seen = tmp_path / "q", []
    with pytest.raises(Stop):
        run(dense, out, SCHEME, **SMALL, minutes=3, on_progress=stop)
    kept = json.loads((tmp_path / ".q.partial" / "choice.json").read_text())
    clock.now += 1e6  # nothing would fit any more: were it asked again, the answer would be another
    run(dense, out, SCHEME, **SMALL, minutes=3, on_progress=seen.append)
    assert not [p for p in seen if p.stage == "try"]
    assert certificate(out)["auto"] == kept and kept["chosen"] == certificate(whole[0])["auto"]["chosen"]
    assert same(tensors(out), tensors(whole[0]))
    before = clock.now
    run(dense, out, SCHEME, **SMALL, minutes=3, on_progress=seen.append)
    assert seen[-1].note.endswith("already complete") and clock.now == before


def test_another_time_is_another_run_and_a_lost_choice_is_not_guessed(
    dense: Path, tmp_path: Path, clock: Clock
) -> None:
    out = tmp_path / "q"

    def stop(progress: Progress) -> None:
        if (progress.stage, progress.done) == ("quantize", 1):
            raise Stop

    with pytest.raises(Stop):
        run(dense, out, **SMALL, minutes=1, on_progress=stop)
    with pytest.raises(BadInput, match=r"other settings \(method\)"):
        run(dense, out, **SMALL, minutes=2)
    (tmp_path / ".q.partial" / "choice.json").unlink()
    with pytest.raises(BadInput, match=r"choice\.json is missing.*--restart"):
        run(dense, out, **SMALL, minutes=1)
    run(dense, out, **SMALL, minutes=2, restart=True)
    assert certificate(out)["auto"]["minutes"] == 2


# ---- what is refused, and the command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0}, "0 minutes; a time above 0"),
        ({"minutes": -2}, "-2 minutes; a time above 0"),
        ({"minutes": float("nan")}, "nan minutes"),
        ({"method": "auto,gptq"}, "method auto,gptq: auto chooses all steps"),
        ({"method": "awq, auto"}, "auto chooses all steps"),
        ({"sequential": True}, "--sequential with method auto"),
        ({"method_options": {"smoothing.ratio": 1}}, "unknown option of the steps that auto tries 'smoothing.ratio'"),
        ({"method_options": {"dampening": 1}}, r"'dampening'; known: .*damping"),
        ({"method_options": {"learned.iterations": 100}}, "auto chooses the iterations"),
        ({"method_options": {"iterations": 100}}, "auto chooses the iterations"),
        ({"method_options": {"damping": -1}}, "damping -1"),
        ({"method_options": {"damping": "abc"}}, "option damping 'abc': a number, e.g. 0.01"),
        ({"method_options": {"learned.lr": "x"}}, "option learned.lr 'x': a number or none"),
        ({"method": "gptq", "minutes": 5}, "5 minutes given with method gptq"),
    ],
)
def test_errors_name_the_way_out(dense: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run(dense, tmp_path / "q", **{**SMALL, **options})
    assert not list(tmp_path.iterdir())


def test_the_command_explains_its_choice(dense: Path, tmp_path: Path, clock: Clock) -> None:
    from fewbits.cli.main import app

    command = ["quantize", str(dense), "-o", str(tmp_path / "q"), "--scheme", "int4-g32", "--method", "auto"]
    command += ["--samples", "8", "--sequence-length", "64", "--eval-samples", "0", "--minutes", "1"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert re.search(r"^auto takes \S+.* of rounding to nearest's loss in block 1, the best of \d+", done.stdout, re.M)
    again = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert again["auto"]["chosen"] in {candidate.name for candidate in CANDIDATES}
    assert again["auto"]["minutes"] == 1 and again["method"]["name"]
    refused = CliRunner().invoke(app, [*command[:-1], "0"])
    assert refused.exit_code == 2 and "a time above 0" in refused.output


def test_the_report_draws_the_choice(whole: tuple[Path, Clock, list[Progress]], tmp_path: Path) -> None:
    from fewbits.report import choice
    from fewbits.report.certificate import read_certificate
    from fewbits.report.html import page

    found = read_certificate(whole[0])
    text = page(found, whole[0])
    assert "How the method was chosen" in text and "not tried: it would take" in text
    assert "the time given: 3 min" in text
    for damaged in (
        [],
        {"candidates": 3},
        {"candidates": [{"name": 1}, {"name": "rtn", "loss": "x", "errors": {"1": []}}], "minutes": -1},
    ):
        broken = dataclasses.replace(found, raw={**found.raw, "auto": damaged})
        assert choice.chart(broken) == "" and choice.lead(broken)
        choice.candidates(broken)


def test_the_benchmark_measures_and_draws(dense: Path, clock: Clock) -> None:
    import bench_auto
    import make_auto_page
    from matplotlib.figure import Figure

    from fewbits.report.figure import styled

    small = {name: SMALL[name] for name in ("samples", "sequence_length", "eval_samples")}
    given: list[tuple[str, float | None]] = [("rtn", None), ("auto", 0.05), ("auto", 1.0)]
    rows = [bench_auto.measure(str(dense), "W3A16_ASYM", 32, method, minutes, **small) for method, minutes in given]
    assert len({bench_auto.key(row) for row in rows}) == 3
    assert bench_auto.told(rows[2]).startswith("int3-asym-g32  auto 1 min: ")
    record = {"rows": sorted(rows, key=bench_auto.key)}
    assert make_auto_page.table(record).count("\n") == 4
    for wide in (True, False):
        canvas = Figure()
        with styled():
            make_auto_page.draw(canvas, wide, record)
        assert len(canvas.axes) == 1
