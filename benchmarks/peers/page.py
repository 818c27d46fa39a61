"""The record "peers" as Markdown tables and as a figure; computes nothing but who is ahead of whom.

A row is won when, for the peer with the lowest KL among those within the row's budget, one of ours stores no more
bits and has no more KL. `ratio` is our KL over theirs: below 1 is ahead.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fewbits.core.units import bytes_text, duration_text
from fewbits.report.figure import INK, LINE, METHOD, MUTED, SERIES
from peers.registry import OURS

TEXT = "built-in"  # the text that decides
MARKERS = "osD^vP<X"
COLOURS = (*SERIES[1:], MUTED, INK)  # without the blue that ours would be mistaken for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The best peer of a row, the best of ours at no more bits (None: there is none), and what to say of it."""

    peer: dict[str, Any]
    ours: dict[str, Any] | None

    @property
    def ratio(self) -> float | None:
        return None if self.ours is None else kl(self.ours) / kl(self.peer)

    def __str__(self) -> str:
        theirs = f"{named(self.peer)} ({self.peer['bits_per_weight']:.2f} bits, KL {kl(self.peer):.4f})"
        if self.ours is None:
            return f"best peer {theirs}; none of ours at its bits"
        mine = f"{self.ours['label']} ({self.ours['bits_per_weight']:.2f} bits, KL {kl(self.ours):.4f})"
        return f"best peer {theirs}; ours at no more bits {mine}: {self.ratio:.2f} of its KL"


def kl(result: dict[str, Any]) -> float:
    return float(result["evaluations"][TEXT]["kl"]["mean"])


def named(result: dict[str, Any]) -> str:
    return f"{result['peer']} {result['label']}"


def measured(record: dict[str, Any], row: str | None = None) -> list[dict[str, Any]]:
    """The results that have figures, best first."""
    found = [each for each in record["results"] if not each["error"] and row in (None, each["row"])]
    return sorted(found, key=kl)


def verdict(record: dict[str, Any], row: dict[str, Any]) -> Verdict | None:
    """Of one row; None without a peer in it."""
    peers = [each for each in measured(record, row["name"]) if each["peer"] != OURS]
    within = [each for each in peers if each["bits_per_weight"] <= row["budget"] + 1e-6]
    if not within:
        return None
    allowed = within[0]["bits_per_weight"] + 1e-6
    ours = [each for each in measured(record) if each["peer"] == OURS and each["bits_per_weight"] <= allowed]
    return Verdict(peer=within[0], ours=ours[0] if ours else None)


def verdicts(record: dict[str, Any]) -> dict[str, str]:
    """Row -> what to say of it."""
    return {row["name"]: str(verdict(record, row) or "no peer measured") for row in record["rows"]}


# ---- Markdown


def page(record: dict[str, Any]) -> str:
    """Everything between the page's markers."""
    parts = [_summary(record), "![Bits against KL](images/peers.svg)", _own_methods(record)]
    for row in record["rows"]:
        parts += [f"### {row['name']}", _verdict_text(record, row), _results(record, row), _missing(record, row)]
    parts += ["### Peers", _peers(record), "### Settings", _settings(record), _source(record)]
    return "\n\n".join(part for part in parts if part)


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    rule = "|" + "|".join("---" if index < left else "---:" for index in range(len(head))) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def _summary(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        found = verdict(record, row)
        if found is None:
            continue
        theirs = [named(found.peer), f"{found.peer['bits_per_weight']:.3f}", _figure(found.peer)]
        if found.ours is None:
            rows.append([row["name"], *theirs, "-", "-", "-", "-"])
            continue
        bits = f"{found.ours['bits_per_weight']:.3f}"
        rows.append([row["name"], *theirs, found.ours["label"], bits, _figure(found.ours), f"{found.ratio:.2f}"])
    head = ["row", "best peer", "bits", "KL", "best of ours at no more bits", "bits", "KL", "ours / theirs"]
    return table(head, rows, left=2)


def _own_methods(record: dict[str, Any]) -> str:
    """Our methods on one grid, row by row: what each adds to the one before it."""
    labels = ("RTN asym", "GPTQ asym", "GPTAQ asym")
    found = {(each["row"], each["label"]): _figure(each) for each in measured(record) if each["peer"] == OURS}
    rows = [[row["name"], *(found.get((row["name"], label), "-") for label in labels)] for row in record["rows"]]
    return "KL of our own methods on the same asymmetric integers:\n\n" + table(["row", "RTN", "GPTQ", "GPTAQ"], rows)


def _figure(result: dict[str, Any], text: str = TEXT) -> str:
    found = result["evaluations"].get(text)
    return f"{found['kl']['mean']:.4f} ± {found['kl']['stderr']:.4f}" if found else "-"


def _verdict_text(record: dict[str, Any], row: dict[str, Any]) -> str:
    return f"Budget {row['budget']:.2f} bits per weight."


def _results(record: dict[str, Any], row: dict[str, Any]) -> str:
    others = [name for name in record["texts"] if name != TEXT]
    head = ["method", "bits per weight", "KL", "perplexity", "same top token", *(f"KL, {name}" for name in others)]
    rows = []
    for result in measured(record, row["name"]):
        found = result["evaluations"][TEXT]
        over = " (over)" if result["bits_per_weight"] > row["budget"] + 1e-6 else ""
        name = f"**{named(result)}**" if result["peer"] == OURS else named(result)
        rows.append([
            name,
            f"{result['bits_per_weight']:.3f}{over}",
            _figure(result),
            f"{found['perplexity']['mean']:.2f}",
            f"{100 * found['top1']['mean']:.1f}%",
            *(_figure(result, other) for other in others),
            f"{duration_text(result['seconds'])}, {_device(result)}",
        ])  # fmt: skip
    return table([*head, "time"], rows)


def _device(result: dict[str, Any]) -> str:
    return "CPU" if result["device"] == "cpu" else " ".join(result["device"].replace("NVIDIA ", "").split()[:1])


def _missing(record: dict[str, Any], row: dict[str, Any]) -> str:
    lines = [
        f"- {named(each)}: {each['error']}"
        for each in record["results"]
        if each["error"] and each["row"] == row["name"]
    ]
    lines += [f"- {each['peer']}: {each['reason']}" for each in record["absent"] if each["row"] == row["name"]]
    return "Not in this row:\n\n" + "\n".join(lines) if lines else ""


def _peers(record: dict[str, Any]) -> str:
    rows = []
    for name, peer in record["peers"].items():
        own = [each for each in record["results"] if each["peer"] == name and not each["error"]]
        versions = {key: value for each in own for key, value in each["versions"].items()}
        shown = ", ".join(f"{key} {value}" for key, value in versions.items())
        memory = bytes_text(max(each["peak_rss_bytes"] for each in own)) if own else "-"
        seconds = peer.get("seconds")
        state = peer.get("error") or ("-" if seconds is None else duration_text(seconds))
        rows.append([name, shown or "-", "yes" if peer["calibrated"] else "no", state, memory])
    return table(["peer", "versions", "calibrated", "installed in", "peak memory"], rows, left=3)


def _settings(record: dict[str, Any]) -> str:
    lines = []
    for result in record["results"]:
        if not result["error"]:
            notes = "".join(f"; {note}" for note in result["notes"])
            lines.append(f"- {result['row']}, {named(result)}: {result['settings']}{notes}")
    return "\n".join(dict.fromkeys(lines))


def _source(record: dict[str, Any]) -> str:
    made, text = record["environment"], record["texts"][TEXT]
    machines = sorted({each["machine"]["cpu"] for each in record["results"] if not each["error"]})
    calibration = record["calibration"]
    return (
        f"Calibrated methods saw {calibration['samples']} windows of {calibration['sequence_length']} tokens "
        f"({calibration['description']}). KL in nats per token to the float32 original over {text['tokens']} tokens "
        f"of {text['description']}, ± one standard error; all measured in float32 by one evaluation. "
        f"Times are of the machines at hand ({', '.join(machines)}, some with a GPU) while others used them: "
        f"read them as orders of magnitude. {made['date'][:10]}."
    )


# ---- the figure


def draw(record: dict[str, Any], figure: Any, wide: bool) -> None:
    """Bits against KL, peers by colour and marker, ours as a line through those nothing of ours beats."""
    axes = figure.subplots()
    names = list(dict.fromkeys(each["peer"] for each in measured(record) if each["peer"] != OURS))
    names.sort(key=list(record["peers"]).index)
    for index, name in enumerate(names):
        points = [each for each in measured(record) if each["peer"] == name]
        axes.scatter(
            [each["bits_per_weight"] for each in points], [kl(each) for each in points],
            s=34, marker=MARKERS[index % len(MARKERS)], facecolor="none", linewidths=1.4,
            edgecolor=COLOURS[index % len(COLOURS)], label=name, zorder=2,
        )  # fmt: skip
    ours = [each for each in measured(record) if each["peer"] == OURS]
    axes.scatter(
        [each["bits_per_weight"] for each in ours], [kl(each) for each in ours],
        s=90, marker="*", color=METHOD, label=OURS, zorder=4,
    )  # fmt: skip
    edge = frontier(ours)
    axes.plot(
        [each["bits_per_weight"] for each in edge], [kl(each) for each in edge], color=METHOD, linewidth=1.2, zorder=3
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(True, axis="both", color=LINE)
    axes.set_xlabel("bits per weight, scales and zero points counted")
    axes.set_ylabel("KL to the original, nats per token")
    axes.set_title("Lower and further left is better", color=INK)
    figure.legend(loc="outside right upper" if wide else "outside lower center", ncols=1 if wide else 2)


def frontier(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results that no other beats on both bits and KL, by bits."""
    kept: list[dict[str, Any]] = []
    for each in sorted(results, key=lambda each: (each["bits_per_weight"], kl(each))):
        if not kept or kl(each) < kl(kept[-1]):
            kept.append(each)
    return kept
