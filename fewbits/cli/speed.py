"""Tokens per second, the same way for every model: batch 1, greedy, the prompt's own time left out.

    rate = (n - 1) / (time of the last new token - time of the first)

The first token waits for the prompt to be read, which is another measure. Clocks run on the token ids as they
come, so neither tokenizer nor terminal is in the figure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


class Clock:
    """Notes when tokens arrive. Has the two methods transformers asks of a streamer."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, ids: Any) -> None:
        # transformers' generate hands in the prompt first, in one piece.
        if self._prompt_seen:
            self.tick()
        self._prompt_seen = True

    def end(self) -> None:
        return None

    def tick(self) -> None:
        self.times.append(time.perf_counter())

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first; None for fewer than two tokens."""
        if len(self.times) < 2 or self.times[-1] <= self.times[0]:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def transformers_rate(model: Any, tokenizer: Any, prompt: str, tokens: int) -> float | None:
    """Tokens per second of transformers' own `generate`, exactly `tokens` of them, greedily."""
    import torch

    clock = Clock()
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.eos_token_id,
            streamer=clock,
        )
    return clock.rate


def side_by_side(runs: dict[str, Callable[[], float | None]], rounds: int = 3) -> dict[str, float | None]:
    """The median rate of each of `runs`, in turns: a busy moment of the machine hits all alike."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            rate = run()
            if rate is not None:
                rates[name].append(rate)
    return {name: _median(found) for name, found in rates.items()}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
