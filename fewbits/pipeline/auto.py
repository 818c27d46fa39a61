"""Trials for `--method auto`: what each candidate loses on a block well into the model, and how long it takes.

    walk      the blocks are quantized by GPTQ, one after the other, to a third of the depth or as far as time goes, so
              that the next one sees what quantized blocks leave
    trial     each candidate on that next block, by the code the run itself uses (streams.py)
    again     the best that fit in time on a block at two thirds of the depth, if there is time

An eighth of the calibration windows is held back: errors are taken there, and a candidate that only fits the rest gains
nothing. Learning is given three times the text of the others by default, here as in the run itself; where no learning
can be done in time, only the others' text is walked with. The text that the certificate's evaluation is made on plays
no part. What decides is in planner/auto.py.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.algorithms.learned import token_loss
from fewbits.calibration.collect import Ref
from fewbits.core.errors import FewbitsError
from fewbits.core.progress import OnProgress, Progress
from fewbits.core.units import duration_text
from fewbits.pipeline.job import Job
from fewbits.pipeline.journal import Journal, Streams
from fewbits.pipeline.measure import measure
from fewbits.pipeline.shell import ModelShell
from fewbits.pipeline.streams import batches, embed, solve_and_advance
from fewbits.planner.auto import CONTENDERS, FIRST, Candidate, Times, Trials, refuses

_HELD = 8  # every how many windows one is held back
_WALK = 0.1  # of the budget, to get to the first block that candidates are tried on
_DRIFT = "gptq"
Clock = Callable[[], float]


def choose(
    job: Job,
    shell: ModelShell,
    chosen: Sequence[Sequence[Ref]],
    journal: Journal,
    passed: float,
    report: OnProgress,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """The decision (JSON; `Trials.decide`) for `job`, whose question is set. passed: seconds since the run began."""
    assert job.question is not None
    began = clock()
    probe = _Probe(job, shell, chosen, clock)
    trials = Trials(question=job.question, times=probe.times(journal))

    def now() -> tuple[float, float]:
        probed = clock() - began
        return passed + probed, probed

    learners = [candidate for candidate in job.question.candidates if candidate.iterations]
    if all(trials.why_not(candidate, *now()) for candidate in learners):
        probe.thin_out()
    first, second = probe.places()
    if now()[1] < trials.allowance:
        probe.walk(first, _drift(trials, now()), clock() + _WALK * trials.budget)
        _try_all(trials, probe, now, report)
    if second > probe.index and trials.errors:
        _try_again(trials, probe, second, now, report)
    return trials.decide(*now())


def _drift(trials: Trials, now: tuple[float, float]) -> Candidate:
    """What blocks are quantized with to get to others: GPTQ, or rounding where even that takes too long."""
    found = {candidate.name: candidate for candidate in trials.question.candidates}
    return found[FIRST] if trials.why_not(found[_DRIFT], *now) else found[_DRIFT]


def _try_all(trials: Trials, probe: _Probe, now: Callable[[], tuple[float, float]], report: OnProgress) -> None:
    candidates = trials.question.candidates
    for position, candidate in enumerate(candidates):
        reason = probe.refuses(candidate) or trials.why_not(candidate, *now())
        if reason is None:
            _try(trials, probe, candidate)
        else:
            trials.drop(candidate, reason)
        report(Progress("try", position + 1, len(candidates), _note(trials, candidate)))


def _try(trials: Trials, probe: _Probe, candidate: Candidate) -> None:
    try:
        error, seconds = probe.trial(candidate)
    except FewbitsError as failure:
        if candidate.name == FIRST:
            raise  # the model or the format is at fault, not the candidate
        trials.drop(candidate, str(failure))
        return
    if candidate.name == FIRST:
        trials.begin(probe.index, probe.floor, probe.scale)
    trials.add(candidate, probe.index, error, seconds)


def _note(trials: Trials, candidate: Candidate) -> str:
    if candidate.name not in trials.errors:
        return f"{candidate.name}: {trials.reasons[candidate.name]}"
    seconds = duration_text(trials.block_seconds(candidate))
    return f"{candidate.name}: {trials.loss(candidate):.3f} of rounding's loss, {seconds} a block"


def _try_again(
    trials: Trials, probe: _Probe, place: int, now: Callable[[], tuple[float, float]], report: OnProgress
) -> None:
    """The best so far on a second block, if all of them can be done in what is left for trials."""
    passed, probed = now()
    first = trials.question.candidates[0]
    best = [each for each in trials.fitting(passed) if each.name != FIRST][:CONTENDERS]
    drift = _drift(trials, (passed, probed))
    walk = (place - probe.index) * (trials.block_seconds(drift) + 2 * probe.thin * trials.times.per_pass)
    needed = walk + sum(map(trials.block_seconds, [first, *best]))
    if len(best) < 2 or probed + needed > trials.allowance:
        return
    probe.walk(place, drift)
    for position, candidate in enumerate([first, *best]):
        _try(trials, probe, candidate)
        report(Progress("try again", position + 1, len(best) + 1, _note(trials, candidate)))


class _Probe:
    """The streams that enter block `index`, behind quantized blocks.

    floor: the error of the original block there; scale: what rounding to nearest does to it, known once that was tried.
    """

    def __init__(self, job: Job, shell: ModelShell, chosen: Sequence[Sequence[Ref]], clock: Clock) -> None:
        assert job.calibration is not None and job.question is not None
        self.first = job.question.candidates[0]
        self.real, self.shell, self.chosen, self.clock = job, shell, chosen, clock
        ids = job.calibration.ids
        held = torch.arange(len(ids)) % _HELD == 0
        kept = ids if len(ids) == 1 else ids[~held]
        self.job = dataclasses.replace(
            job,
            calibration=dataclasses.replace(job.calibration, ids=kept),
            probe=dataclasses.replace(job.calibration, ids=ids[held]),
        )
        began = clock()
        self.streams = embed(self.job, shell)
        self.embedding = clock() - began
        self.thin = job.question.thin
        self.index = 0
        self.floor = self.scale = 0.0
        self.unchanged: list[Tensor] = []  # what the original block makes of the held-out text as it arrives

    def times(self, journal: Journal) -> Times:
        """What a run takes beside its trials, from one sample of each: a pass, a measured window, a state on disk."""
        real, used, held = self.real, self.job.calibration, self.job.probe
        assert real.calibration is not None and used is not None and held is not None
        evaluated = 0 if real.probe is None else real.probe.tokens
        per_token = self._forward() / held.tokens
        writing = self._timed(lambda: journal.rehearse(self.streams))
        state = sum(tensor.nbytes for part in self.streams.values() for tensor in part)
        per_window, loading = (self._measure() if evaluated else 0.0), self._timed(self._load_head)
        measuring = loading + max(0.0, per_window - loading) * evaluated / held.ids.shape[1]
        length = used.ids.shape[1]
        learner = self.job.recipe.learners[0]

        def beside(thin: int) -> float:
            missing = (real.calibration.tokens - used.tokens) / thin  # it is collected, quantized and original
            stored = (real.calibration.tokens / thin + evaluated) / (used.tokens + held.tokens)
            return per_token * (2 * (evaluated - held.tokens) + 3 * missing) + writing * stored

        return Times(
            fixed=self.embedding + measuring + 2 * real.source.nbytes * writing / state,  # codes are written twice
            extra=beside(self.thin),
            learned=beside(1),
            per_pass=per_token * used.tokens / self.thin,
            per_iteration=3 * per_token * learner.sequences(len(used.ids), length) * length,
            blocks=sum(1 for refs in self.chosen if refs),
        )

    def _timed(self, work: Callable[[], object]) -> float:
        began = self.clock()
        work()
        return self.clock() - began

    def _forward(self) -> float:
        """Seconds of the held-out text through a block, the least of some: forecasts are lower bounds."""
        prefix, block = self.shell.blocks[0]

        def run() -> float:
            return float(sum(self.shell.forward(0, hidden).float().sum() for hidden in self.streams["original"]))

        with self.shell.resident(prefix, block):
            return min(self._timed(run) for _ in range(4))

    def _load_head(self) -> None:
        with self.shell.resident_outside(head=True):
            pass

    def _measure(self) -> float:
        """Seconds of the measurement of one window, whatever its hidden states."""
        assert self.job.probe is not None
        window = dataclasses.replace(self.job.probe, ids=self.job.probe.ids[:1])
        hidden = [self.streams["original"][0][:1]]
        pairs = self.shell.logit_pairs(batches(window), hidden, hidden, self.job.dtype)
        return self._timed(lambda: measure("", "", "", window, pairs, self.shell.dtype, self.shell.device))

    def places(self) -> tuple[int, int]:
        """The blocks to try on, where there is time: at a third and at two thirds of the depth."""
        usable = [index for index, refs in enumerate(self.chosen) if refs]
        return usable[len(usable) // 3], usable[2 * len(usable) // 3]

    def thin_out(self) -> None:
        """Leaves only the text of candidates that learn nothing."""
        self.streams |= {name: self.streams[name][:: self.thin] for name in ("calibration", "reference")}
        self.thin = 1

    def walk(self, place: int, drift: Candidate, until: float = math.inf) -> None:
        """Quantizes blocks by `drift` up to `place`, or to the first one worth a trial once the clock shows `until`."""
        while self.index < place and (self.clock() < until or not self.chosen[self.index]):
            for candidate in (drift, self.first):
                streams = dict(self.streams)
                try:
                    self._solve(candidate, self.index, streams)
                    break
                except FewbitsError:  # told where the candidate is tried itself
                    if candidate is self.first:
                        raise
            self.streams = streams
            self.index += 1
        with self.shell.resident(*self.shell.blocks[self.index]):
            self.unchanged, expected = (
                [self.shell.forward(self.index, hidden) for hidden in self.streams[name]]
                for name in ("quantized", "original")
            )
        self.floor = _error(self.unchanged, expected)

    def trial(self, candidate: Candidate) -> tuple[float, float]:
        """Error on the text held back, and seconds, of block `index`."""
        began = self.clock()
        needs = candidate.recipe.statistics
        streams = dict(self.streams)
        if not needs:
            streams["calibration"] = []
        if not needs & {"cross", "reference"}:
            streams["reference"] = []
        if not candidate.iterations:
            streams |= {name: streams[name][:: self.thin] for name in ("calibration", "reference")}
        self._solve(candidate, self.index, streams)
        error = _error(streams["quantized"], streams["original"])
        seconds = self.clock() - began
        if not math.isfinite(error):
            raise FewbitsError(f"its outputs in block {self.index} are NaN or infinite")
        if candidate is self.first:
            self.scale = _error(streams["quantized"], self.unchanged)
        return error, seconds

    def _solve(self, candidate: Candidate, index: int, streams: Streams) -> None:
        job = dataclasses.replace(self.job, recipe=candidate.recipe, sequential=candidate.sequential)
        solve_and_advance(job, self.shell, index, self.chosen[index], streams)

    def refuses(self, candidate: Candidate) -> str | None:
        prefix = self.shell.blocks[self.index][0]
        formats = [self.real.weights(f"{prefix}.{ref.name}", ref.shape[1]) for ref in self.chosen[self.index]]
        return refuses(candidate, formats, known_family=self.shell.topology is not None)


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The mean over tokens of their squared error, as a share of what is expected."""
    losses = [token_loss(*pair).flatten() for pair in zip(found, expected, strict=True)]
    return float(torch.cat(losses).double().mean())
