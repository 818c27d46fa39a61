"""`--method auto`: of the compositions below, the one that loses least and is done in the time there is.

Which steps pay depends on the format, the model and the machine: at 8 bits rounding is enough, at 2 bits learning is
worth every minute. So candidates are tried, cheap to dear, on a block well into the model, on the text and behind
the quantized blocks that the run itself would see (pipeline/auto.py), and on a second block if there is time. A trial
gives

    error     mean over held-out tokens of |y_t - y*_t|^2 / |y*_t|^2, y the block's output, y* that of the original
              behind original blocks. Part of it comes in with the inputs: `floor`, the original block's error there.
    loss      (error - floor) / scale, scale being what rounding to nearest does to the block on those same inputs
              (over several blocks: the mean). A method that undoes what earlier blocks did can be below 0.
    seconds   of the block, from which the whole run takes  passed + MARGIN (fixed + blocks (seconds + extra))

`fixed` is what is done once (embedding, the final measurement, writing), `extra` what a block needs besides. Trials get
PROBING of the time. None begins whose forecast does not fit into what is left of that, or whose run would not fit into
the whole. A forecast is a lower bound: the time of the candidate that is contained in it, what passes over the text
add, and three forwards for an iteration of learning; once some learning was timed, a line through the times.

The least loss that fits is taken, the fastest of those within TIE of it. What auto does not try: rotations (the
checkpoint loads in fewbits only), other formats (`fewbits plan` does), other text.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewbits.algorithms import METHODS
from fewbits.algorithms.compose import Recipe, compose, option_names
from fewbits.core.errors import BadInput, unknown
from fewbits.core.units import duration_text
from fewbits.formats.mix import Mix, Weights

NAME = "auto"
MINUTES = 6.0
PROBING, MARGIN, TIE = 0.2, 1.15, 0.01
CONTENDERS = 3  # tried on a second block
_STEPS = ("iterations", "learned.iterations")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A composition. after: name of the candidate whose work it contains; passes: over the calibration text, that it
    adds at the least; iterations: of learning."""

    method: str
    after: str | None = None
    passes: int = 0
    sequential: bool = False
    iterations: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        if self.iterations is not None:
            return f"{self.method} {self.iterations}"
        return f"{self.method} sequential" if self.sequential else self.method

    @property
    def recipe(self) -> Recipe:
        return compose(self.method, dict(self.options))


_LEARNED = "gptq,refine,learned"
CANDIDATES = (
    Candidate(method="rtn"),
    Candidate(method="hqq", after="rtn"),
    Candidate(method="gptq", after="rtn", passes=1),
    Candidate(method="gptq,refine", after="gptq"),
    Candidate(method="gptaq,refine", after="gptq,refine", passes=1),
    Candidate(method="awq,gptq,refine", after="gptq,refine"),
    Candidate(method="gptq,refine", after="gptq,refine", passes=1, sequential=True),
    *(
        Candidate(method=_LEARNED, after="gptq,refine", passes=1, iterations=n, options={"learned.iterations": n})
        for n in (25, 50, 100, 200, 400)
    ),
)
FIRST = CANDIDATES[0].name  # what is left where nothing fits, and what losses are measured by


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be chosen, and within which time, in minutes. thin: every how many windows of the calibration text go
    to candidates that learn nothing, for which fewer are enough."""

    minutes: float
    candidates: tuple[Candidate, ...]
    thin: int = 1

    @property
    def recipe(self) -> Recipe:
        """One that needs all that any candidate needs."""
        return self.candidates[-1].recipe


def ask(method: str, minutes: float | None, options: Mapping[str, Any], *, sequential: bool, thin: int = 1) -> Question:
    """The question that `--method auto` poses; BadInput for what it cannot be combined with."""
    if method != NAME:
        raise BadInput(f"method {method}: auto chooses all steps; name it alone, or name the steps yourself")
    if sequential:
        raise BadInput("--sequential with method auto, which chooses that too: leave it out, or name the steps")
    found = MINUTES if minutes is None else minutes
    if not (math.isfinite(found) and found > 0):
        raise BadInput(f"{found:g} minutes; a time above 0 is needed, e.g. --minutes {MINUTES:g}")
    return Question(minutes=found, candidates=_with_options(options), thin=thin)


def _with_options(options: Mapping[str, Any]) -> tuple[Candidate, ...]:
    """CANDIDATES, each with those `options` that its steps have; BadInput for one that none has."""
    if given := [name for name in _STEPS if name in options]:
        raise BadInput(f"option {given[0]}: auto chooses the iterations; leave it out, or name the steps yourself")
    found, taken = [], set()
    for candidate in CANDIDATES:
        own = {name: value for name, value in options.items() if _has(candidate, name)}
        taken |= set(own)
        found.append(dataclasses.replace(candidate, options={**candidate.options, **own}))
        _ = found[-1].recipe  # values are checked before any work
    if missing := [name for name in options if name not in taken]:
        steps = sorted({step for candidate in CANDIDATES for step in candidate.method.split(",")})
        known = sorted({f"{step}.{name}" for step in steps for name in option_names(METHODS.get(step))} - set(_STEPS))
        raise unknown("option of the steps that auto tries", missing[0], known)
    return tuple(found)


def _has(candidate: Candidate, option: str) -> bool:
    step, _, name = option.rpartition(".")
    steps = candidate.method.split(",")
    return any(name in _fields(each) for each in steps if step in ("", each))


def _fields(step: str) -> set[str]:
    return {field.name for field in dataclasses.fields(METHODS.get(step))}


def refuses(candidate: Candidate, formats: Iterable[Weights], *, known_family: bool) -> str | None:
    """Why `candidate` is of no use for these formats and this model, or None."""
    formats, steps = list(formats), candidate.method.split(",")
    mix = next((format.name for format in formats if isinstance(format, Mix)), None)
    if candidate.iterations and mix is not None:
        return f"{mix} is not learned: it is of several formats"
    nested = next((format.name for format in formats if not isinstance(format, Mix) and format.nested), None)
    if "hqq" in steps and nested is not None:
        return f"the scales of {nested} depend on each other: it would round to nearest"
    if "awq" in steps and not known_family:
        return "no table says what feeds the linears of this family"
    return None


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds known before anything is tried. fixed: once a run; extra: for a block, beside a trial, and learned: that
    where something is learned; per_pass: of the text of those that learn nothing through a block; per_iteration: of
    learning, at the least; blocks: how many are quantized."""

    fixed: float
    extra: float
    learned: float
    per_pass: float
    per_iteration: float
    blocks: int


@dataclass(kw_only=True)
class Trials:
    """What was tried on which block: candidate -> block -> error, seconds; and why the others were not. floors, scales:
    of the blocks."""

    question: Question
    times: Times
    errors: dict[str, dict[int, float]] = field(default_factory=dict)
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    floors: dict[int, float] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)

    @property
    def budget(self) -> float:
        return 60 * self.question.minutes

    @property
    def allowance(self) -> float:
        """Seconds for all trials together."""
        return PROBING * self.budget

    def begin(self, block: int, floor: float, scale: float) -> None:
        """What errors of `block` are read against."""
        self.floors[block], self.scales[block] = floor, scale

    def add(self, candidate: Candidate, block: int, error: float, seconds: float) -> None:
        self.errors.setdefault(candidate.name, {})[block] = error
        self.seconds.setdefault(candidate.name, {})[block] = seconds

    def drop(self, candidate: Candidate, reason: str) -> None:
        """`candidate` cannot be had, whatever it did before."""
        self.errors.pop(candidate.name, None)
        self.reasons[candidate.name] = reason

    def total(self, candidate: Candidate, passed: float) -> float:
        """How long the whole run takes, with `passed` seconds behind it."""
        seconds = self.block_seconds(candidate) + (self.times.learned if candidate.iterations else self.times.extra)
        return passed + MARGIN * (self.times.fixed + self.times.blocks * seconds)

    def block_seconds(self, candidate: Candidate) -> float:
        """Of a block, measured if it was, else at the least."""
        if known := self.seconds.get(candidate.name):
            return sum(known.values()) / len(known)
        base = next((other for other in self.question.candidates if other.name == candidate.after), None)
        least = 0.0 if base is None else self.block_seconds(base)
        if not candidate.iterations:
            return least + candidate.passes * self.times.per_pass
        # The original's pass over all of the text, and two of ours over what others do without.
        thin = self.question.thin
        least += (candidate.passes * thin + 2 * (thin - 1)) * self.times.per_pass
        timed = {0: least} | {
            other.iterations: self.block_seconds(other)
            for other in self.question.candidates
            if other.iterations and other.method == candidate.method and other.name in self.seconds
        }
        if len(timed) == 1:
            return least + candidate.iterations * self.times.per_iteration
        (n1, t1), (n2, t2) = sorted(timed.items())[-2:]
        return t2 + (candidate.iterations - n2) * max(0.0, t2 - t1) / (n2 - n1)

    def why_not(self, candidate: Candidate, passed: float, probed: float) -> str | None:
        """Why `candidate` is not to be tried, `passed` seconds into the run, `probed` of them on trials; or None."""
        seconds = self.block_seconds(candidate)
        if candidate.name != FIRST and (whole := self.total(candidate, passed + seconds)) > self.budget:
            return f"not tried: it would take {duration_text(whole)} or more"
        left = self.allowance - probed
        if seconds > left or left <= 0:
            return (
                f"not tried: {duration_text(seconds)} or more for a block, with {duration_text(max(left, 0.0))} left "
                f"of the {duration_text(self.allowance)} for trials"
            )
        return None

    def fitting(self, passed: float) -> list[Candidate]:
        """Those tried whose run fits, least loss first."""
        tried = [candidate for candidate in self.question.candidates if candidate.name in self.errors]
        fit = [each for each in tried if self.total(each, passed) <= self.budget]
        return sorted(fit, key=lambda each: (-len(self.errors[each.name]), self.loss(each)))

    def loss(self, candidate: Candidate) -> float:
        """What `candidate` adds to the error, in units of what rounding to nearest does."""
        found = self.errors[candidate.name]
        tiny = 1e-300  # a block of zeros loses nothing
        losses = [(error - self.floors[block]) / max(self.scales[block], tiny) for block, error in found.items()]
        return sum(losses) / len(losses)

    def equal(self, candidate: Candidate, best: Candidate) -> bool:
        """Whether it loses no more than `best`, but for a difference that says nothing."""
        return self.loss(candidate) <= self.loss(best) + TIE * abs(self.loss(best))

    def decide(self, passed: float, probed: float) -> dict[str, Any]:
        """JSON: the choice and all that it rests on."""
        fit = self.fitting(passed)
        most = [each for each in fit if len(self.errors[each.name]) == len(self.errors[fit[0].name])]
        best = [each for each in most if self.equal(each, most[0])]
        chosen = min(best, key=self.block_seconds, default=self.question.candidates[0])
        predicted = self.total(chosen, passed)
        return {
            "minutes": self.question.minutes,
            "chosen": chosen.name,
            "why": self._why(chosen, fit, predicted),
            "fallback": chosen.name == FIRST and [each.name for each in fit] in ([], [FIRST]),
            "predicted_seconds": predicted,
            "probe_seconds": probed,
            "tried_on": sorted(self.floors),
            "floors": {str(block): floor for block, floor in self.floors.items()},
            "scales": {str(block): scale for block, scale in self.scales.items()},
            "times": dataclasses.asdict(self.times),
            "margin": MARGIN,
            "candidates": [self._entry(each, passed, chosen) for each in self.question.candidates],
        }

    def _entry(self, candidate: Candidate, passed: float, chosen: Candidate) -> dict[str, Any]:
        tried = candidate.name in self.errors
        seconds, total = self.block_seconds(candidate), self.total(candidate, passed)
        return {
            "name": candidate.name,
            "method": candidate.method,
            "options": dict(candidate.options),
            "sequential": candidate.sequential,
            "loss": self.loss(candidate) if tried else None,
            "errors": {str(block): error for block, error in self.errors.get(candidate.name, {}).items()},
            "block_seconds": seconds if tried else None,
            "seconds": total if tried else None,
            "why_not": None if candidate is chosen else self._lost_to(chosen, candidate, total),
        }

    def _lost_to(self, chosen: Candidate, candidate: Candidate, total: float) -> str:
        if candidate.name not in self.errors:
            return self.reasons.get(candidate.name, "not tried: no time was left for trials")
        if total > self.budget:
            return f"it would take {duration_text(total)}"
        if len(self.errors[candidate.name]) < len(self.errors[chosen.name]):
            return f"not among the best {CONTENDERS} at first"
        if self.equal(candidate, chosen):
            return f"within {100 * TIE:.0f} % of the best, and slower"
        return "loses more"

    def _why(self, chosen: Candidate, fit: Sequence[Candidate], predicted: float) -> str:
        time = f"{self.question.minutes:g} minute{'s' * (self.question.minutes != 1)}"
        if not self.errors:
            return f"auto takes {chosen.name}: a fifth of {time} is too short to try anything; give it more"
        if not fit:
            return f"auto takes {chosen.name}: nothing fits {time}; it is predicted to take {duration_text(predicted)}"
        if chosen.name == FIRST and len(fit) == 1:
            return f"auto takes {chosen.name}: nothing else fits {time}"
        blocks = " and ".join(str(block) for block in self.errors[chosen.name])
        where = f"block{'s' * (len(self.errors[chosen.name]) > 1)} {blocks}"
        loss = (
            "no other loses less" if chosen.name == FIRST else f"{self.loss(chosen):.2f} of rounding to nearest's loss"
        )
        return (
            f"auto takes {chosen.name}: {loss} in {where}, the best of {len(fit)} that fit {time}; predicted to take "
            f"{duration_text(predicted)}"
        )


def candidate_called(question: Question, name: object) -> Candidate:
    """The candidate that a decision on disk names."""
    for candidate in question.candidates:
        if candidate.name == name:
            return candidate
    raise unknown("candidate of method auto", str(name), [candidate.name for candidate in question.candidates])
