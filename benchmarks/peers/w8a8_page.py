"""The record "w8a8_peers" as what docs/w8a8.md says of other projects; computes nothing but who is ahead."""

from __future__ import annotations

import math
from typing import Any

from fewbits.core.units import duration_text
from peers.page import TEXT, kl, measured, named, table
from peers.registry import OURS

_TEXT = """{verdict}

{results}

{failed}{settings}

Calibrated methods saw {samples} windows of {length} tokens ({calibration}). KL in nats per token to the float32
original over {tokens} tokens of {text}, ± one standard error by windows. Times on {cpus}, {threads}, while
others used the machine: orders of magnitude. {date}."""


def page(record: dict[str, Any]) -> str:
    """Everything between the page's marks, but where it is from."""
    results = measured(record)
    calibration, text = record["calibration"], record["texts"][TEXT]
    threads = sorted({each["threads"] for each in results})
    return _TEXT.format(
        verdict=verdict(results), results=_results(results), failed=_failed(record), settings=_settings(record),
        samples=calibration["samples"], length=calibration["sequence_length"],
        calibration=calibration["description"], tokens=text["tokens"], text=text["description"],
        cpus=", ".join(sorted({each["machine"]["cpu"] for each in results})),
        threads=" or ".join("one thread" if count == 1 else f"{count} threads" for count in threads),
        date=record["environment"]["date"][:10],
    )  # fmt: skip


def verdict(results: list[dict[str, Any]]) -> str:
    """Who is ahead among `results`, best first; a lead within two standard errors is called none."""
    ours = next((each for each in results if each["peer"] == OURS), None)
    theirs = next((each for each in results if each["peer"] != OURS), None)
    if ours is None or theirs is None:
        return "Not everyone was measured."
    errors = math.hypot(*(each["evaluations"][TEXT]["kl"]["stderr"] for each in (ours, theirs)))
    ahead = "level with" if abs(kl(ours) - kl(theirs)) < 2 * errors else f"{kl(ours) / kl(theirs):.2f} of"
    return f"`{ours['label']}` is {ahead} the KL of the best peer, {named(theirs)}."


def _results(results: list[dict[str, Any]]) -> str:
    head = ["", "inputs", "bits per weight", "KL", "perplexity over fp32, %", "same top token", "quantized", "run"]
    rows = []
    for each in results:
        found = each["evaluations"][TEXT]
        rise, error = math.exp(found["lost"]["mean"]), found["lost"]["stderr"]
        rows.append([
            f"**{named(each)}**" if each["peer"] == OURS else named(each),
            _inputs(each["rounding"]),
            f"{each['bits_per_weight']:.2f}",
            f"{found['kl']['mean']:.5f} ± {found['kl']['stderr']:.5f}",
            f"{100 * (rise - 1):+.2f} ± {100 * rise * error:.2f}",
            f"{100 * found['top1']['mean']:.1f} %",
            duration_text(each["seconds"]),
            duration_text(each["run_seconds"]),
        ])  # fmt: skip
    return table(head, rows, left=2)


def _inputs(rounding: dict[str, int]) -> str:
    """What the linears do with what they read."""
    rounded, every = rounding["linears"], rounding["of"]
    return "8 bits" if rounded == every else f"8 bits in {rounded} of {every}" if rounded else "not rounded"


def _failed(record: dict[str, Any]) -> str:
    lines = [f"- {named(each)}: {each['error']}" for each in record["results"] if each["error"]]
    return "Not measured:\n\n" + "\n".join(lines) + "\n\n" if lines else ""


def _settings(record: dict[str, Any]) -> str:
    """One line a result: what was asked for, in which versions."""
    lines = []
    for each in record["results"]:
        if each["error"]:
            continue
        own = {name: version for name, version in each["versions"].items() if name != "python"}
        shown = ", ".join(f"{name} {version}" for name, version in own.items())
        notes = "".join(f"; {note}" for note in each["notes"])
        lines.append(f"- {named(each)}: {each['settings']}{notes} ({shown})")
    return "\n".join(lines)
