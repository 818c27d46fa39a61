"""Rows of a benchmark: settings of `fewbits.quantize`, each measured on the same held-out text, several at a time.

`lost` is the rise of the negative log-likelihood over the original in float32, paired token by token, its standard
error by windows; perplexity grows by exp(lost) - 1. Rows are kept in a file as they come, each with its machine and
commit: a run that is stopped loses what was under way and no more, and what is in the file, or in the record named by
--since, is not measured again.

The text: `WINDOWS` windows of 512 tokens of the built-in text, those of its evaluation split and, where these are too
few, windows of its calibration split. Methods learn from `LEARNED` other windows of the latter.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import random
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from certified import certified, outcome
from recorded import commit, device_name, save

from fewbits.calibration.data import TokenSet, pack, read_texts
from fewbits.checkpoints.source import open_source
from fewbits.core.record import environment, write_json

LENGTH = 512
WINDOWS, LEARNED = 64, 16
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Arguments of `quantize`; `more` goes into the row as it is."""

    key: str
    scheme: str
    method: str = "rtn"
    options: dict[str, Any] = field(default_factory=dict)
    act_range: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


@functools.cache
def texts(windows: int, learned: int) -> tuple[TokenSet, TokenSet]:
    """What methods learn from, and what they are measured on: no token is in both."""
    tokenizer = open_source("demo").load_tokenizer()

    def every(split: str) -> torch.Tensor:
        documents, described = read_texts(None, split=split)
        return pack(documents, tokenizer, sequence_length=LENGTH, samples=None, description=described).ids

    held, other = every("evaluation"), every("calibration")
    order = random.Random(0).sample(range(len(other)), len(other))
    known, rest = other[sorted(order[:learned])], other[sorted(order[learned:])]
    if windows > len(held) + len(rest):
        raise SystemExit(f"{windows} windows to measure on, and the built-in text has {len(held) + len(rest)}")
    first, more = min(windows, len(held)), max(0, windows - len(held))
    held = held[sorted(random.Random(1).sample(range(len(held)), first))]
    rest = rest[sorted(random.Random(2).sample(range(len(rest)), more))]
    both = f"built-in text: {first} windows of its evaluation split, {more} others"
    return (
        TokenSet.of(known, {"description": "built-in calibration text", "seed": 0}),
        TokenSet.of(torch.cat([held, rest]), {"description": both, "seed": 0}),
    )


def measure(setting: Setting, windows: int, learned: int, device: str | None) -> Row:
    known, held = texts(windows, learned)
    ranges = {} if setting.act_range is None else {"act_range": setting.act_range}
    certificate = certified(
        "demo", setting.scheme, method=setting.method, method_options=setting.options, calibration=known,
        eval_samples=held, device=device, **ranges,
    )  # fmt: skip
    return {
        **setting.more,
        "scheme": setting.scheme,
        "method": setting.method,
        "options": setting.options,
        "act_range": setting.act_range,
        "weights": certificate["scheme"]["weights"],
        "activations": certificate["scheme"]["activations"],
        "learned_from": learned,
        **outcome(certificate, "lost", "dtype"),
    }


def rise(row: Row) -> tuple[float, float]:
    """Perplexity over fp32, and its standard error, both as shares."""
    ratio, error = math.exp(row["lost"]["mean"]), row["lost"]["stderr"]
    return ratio - 1, ratio * (math.nan if error is None else error)  # one window has no standard error


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", type=Path, help="JSON file that keeps the rows as they come")
    parser.add_argument("--since", type=Path, help="a record whose rows count as measured")
    parser.add_argument("--only", action="append", metavar="KEY", help="measure this row alone; may be repeated")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of 512 tokens to measure on")
    parser.add_argument("--learned", type=int, default=LEARNED, help="windows that methods learn from")
    parser.add_argument("--device", help="cpu or cuda; by default whichever there is")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each in its process")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so many; needs --resume")
    parser.add_argument("--record", action="store_true", help="record the rows of --resume, measure nothing")
    parser.add_argument("--commit", help="of the tree, where git cannot tell it")
    return parser


def run(benchmark: str, settings: Sequence[Setting], given: argparse.Namespace, tell: Callable[[Row], str]) -> None:
    """Measures what is asked for and not in the file yet, and records all of it once nothing is missing.

    tell: what is printed of a row.
    """
    kept: dict[str, Any] = {"rows": {}}
    if given.resume and given.resume.exists():
        kept = json.loads(given.resume.read_text(encoding="utf-8"))
    if given.since:
        before = json.loads(given.since.read_text(encoding="utf-8"))[benchmark]
        kept["rows"] = {**_same(settings, before), **kept["rows"]}
    if not given.record:
        kept |= {"environment": {**environment(), "device": device_name()}, "commit": given.commit or commit()}
    rows: dict[str, Row] = kept["rows"]
    wanted = [
        setting for setting in settings if setting.key not in rows and (not given.only or setting.key in given.only)
    ]
    failed = [] if given.record else _measured(wanted, kept, given, tell)
    left = [setting.key for setting in settings if setting.key not in rows]
    if failed or (left and not given.record):
        raise SystemExit(f"{len(left)} rows are left: run again with the same --resume. Failed: {failed or 'none'}")
    ordered = [rows[setting.key] for setting in settings if setting.key in rows]
    print(save(benchmark, {"environment": kept["environment"], "rows": ordered}, kept["commit"]))


def _same(settings: Sequence[Setting], record: dict[str, Any]) -> dict[str, Row]:
    """The rows of `record` that are rows of `settings`, by key."""
    device = record["environment"].get("device")
    found = {}
    for setting in settings:
        asked = {name: getattr(setting, name) for name in ("scheme", "method", "options", "act_range")} | setting.more
        for row in record["rows"]:
            if all(row.get(name) == value for name, value in asked.items()):
                found[setting.key] = {"device": device, **row}
    return found


def devices(record: dict[str, Any]) -> str:
    """The machines that the rows of `record` come from, the one of most rows first."""
    names = [row.get("device") or record["environment"].get("device", "") for row in record["rows"]]
    counted = sorted(set(names), key=lambda name: -names.count(name))
    return " and ".join(f"{name.replace('-', ' ').upper()} ({names.count(name)} rows)" for name in counted)


def _measured(
    wanted: Sequence[Setting], kept: dict[str, Any], given: argparse.Namespace, tell: Callable[[Row], str]
) -> list[str]:
    """Adds rows to what is `kept`; the keys of those that failed."""
    ends, failed = time.monotonic() + given.seconds, []
    threads = max(1, torch.get_num_threads() // given.jobs)
    with ProcessPoolExecutor(
        given.jobs, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        ask = (given.windows, given.learned, given.device)
        futures: dict[Future[Row | None], str] = {
            pool.submit(_in_time, ends, setting, *ask): setting.key for setting in wanted
        }
        for future in as_completed(futures):
            key = futures[future]
            try:
                row = future.result()
            except Exception:
                failed.append(key)
                print(f"{key} failed:\n{traceback.format_exc()}", flush=True)
                continue
            if row is None:
                continue
            kept["rows"][key] = {**row, "commit": kept["commit"], "device": device_name()}
            if given.resume:
                write_json(given.resume, kept)
            print(f"{key:48} {tell(row)}  {row['seconds']:.0f} s", flush=True)
    return failed


def _in_time(ends: float, setting: Setting, *ask: Any) -> Row | None:
    """The row, or None once it is too late to begin: CLOCK_MONOTONIC is the same in every process."""
    return None if time.monotonic() > ends else measure(setting, *ask)
