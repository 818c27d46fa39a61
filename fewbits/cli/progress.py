"""Progress on standard error: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from fewbits.core.progress import Progress
from fewbits.core.units import duration_text


class Clock:
    """Time left in a stage, from the pace of the steps seen so far.

    A run that resumes starts with steps done by an earlier process; they do not count towards the pace.
    """

    def __init__(self, now: float) -> None:
        self.stage: str | None = None
        self.done = 0
        self.started, self.first, self.last = now, 0, now
        self.deadline: float | None = None

    def update(self, event: Progress, now: float) -> bool:
        """Takes `event` in; whether it begins a stage (a new one, or the same over again)."""
        begins = event.stage != self.stage or event.done < self.done
        if begins:
            self.stage, self.started, self.deadline = event.stage, self.last, None
            self.first = event.done if event.done > 1 else 0
        self.done, self.last = event.done, now
        fresh = event.done - self.first
        if fresh > 0:
            self.deadline = now + (now - self.started) / fresh * max(event.total - event.done, 0)
        return begins

    def left(self, now: float) -> str:
        return "" if self.deadline is None else f"{duration_text(max(self.deadline - now, 0))} left"


class _TimeLeft(ProgressColumn):
    max_refresh = 0.5

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def render(self, task: Task) -> Text:
        return Text(self.clock.left(time.monotonic()), style="cyan")


class ProgressBar:
    """A context; call it with each `Progress`. `quiet` shows nothing."""

    LINE_EVERY = 10.0  # seconds between lines where standard error is no terminal

    def __init__(self, *, quiet: bool = False) -> None:
        self.clock = Clock(time.monotonic())
        self.quiet = quiet
        self._printed = float("-inf")
        self._bar: RichProgress | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                _TimeLeft(self.clock),
                TextColumn("{task.fields[note]}", style="dim", markup=False),
                console=Console(stderr=True),
                transient=True,
            )

    def __enter__(self) -> ProgressBar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, event: Progress) -> None:
        now = time.monotonic()
        begins = self.clock.update(event, now)
        if self._bar:
            self._draw(event, begins)
        elif not self.quiet:
            self._line(event, begins, now)

    def step(self, stage: str, done: int, total: int) -> None:
        """The same, for callers that pass the values one by one."""
        self(Progress(stage, done, total))

    def _draw(self, event: Progress, begins: bool) -> None:
        assert self._bar is not None
        if begins:
            for task in list(self._bar.task_ids):
                self._bar.remove_task(task)
            self._bar.add_task(event.stage, total=event.total, note=event.note)
        task = self._bar.task_ids[0]
        self._bar.update(task, completed=event.done, total=event.total, note=event.note)

    def _line(self, event: Progress, begins: bool, now: float) -> None:
        notable = begins or event.done == event.total
        if not notable and now - self._printed < self.LINE_EVERY:
            return
        self._printed = now
        left = self.clock.left(now) if event.done < event.total else ""
        parts = [f"{event.stage} {event.done}/{event.total}", left, event.note]
        print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)
