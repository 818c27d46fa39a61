"""What `--method auto` makes of 2, 6 and 20 minutes on the embedded model: KL against time.

KL to the float32 original on held-out built-in text, taken while quantizing as in bench_quality.py but on the default
of 8 windows, since measuring counts in the time given; at 4 and 3 bits; beside it methods that were named (`--fixed`).
Recorded under benchmarks/results as "auto"; rows of the same commit and machine are kept, so that the long runs can be
made one at a time. `make docs` draws docs/images/auto.svg from it.

    python benchmarks/bench_auto.py [--minutes 2 6 20] [--only W3A16_ASYM:64] [--fixed rtn gptq]

Times are those of the machine as it is: run it where nothing else does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from certified import certified, outcome
from recorded import commit, latest, save

from fewbits.core.record import environment

SETTINGS = [("W4A16_ASYM", 64), ("W3A16_ASYM", 64)]
MINUTES = (2.0, 6.0, 20.0)


def measure(model: str, scheme: str, group_size: int, method: str, minutes: float | None, **options: Any) -> dict:
    """One run; `minutes` for auto alone."""
    certificate = certified(model, scheme, group_size=group_size, method=method, minutes=minutes, **options)
    return {
        "scheme": scheme,
        "format": certificate["scheme"]["weights"],
        "method": method,
        "minutes": minutes,
        "choice": certificate.get("auto"),
        **outcome(certificate),
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["format"], row["method"], row["minutes"] or 0.0


def told(row: dict[str, Any]) -> str:
    """A row in a line."""
    kl, choice = row["kl"], row["choice"]
    what = row["method"] if choice is None else f"auto {row['minutes']:g} min: {choice['chosen']}"
    foreseen = "" if choice is None else f" (foreseen {choice['predicted_seconds']:.0f} s)"
    return f"{row['format']:14} {what:36} KL {kl['mean']:.4f} ± {kl['stderr']:.4f}  {row['seconds']:.0f} s{foreseen}"


def rows_so_far() -> list[dict[str, Any]]:
    """Of this machine and commit."""
    found = latest("auto")
    if found is None or not found[0].stem.endswith(f"_{commit()}"):
        return []
    return list(found[1]["rows"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", nargs="*", type=float, default=MINUTES, help="times given to auto")
    parser.add_argument("--fixed", nargs="*", default=("rtn", "gptq"), help="methods to set beside it")
    parser.add_argument("--only", help="one setting, SCHEME:GROUP")
    given = parser.parse_args(arguments)
    rows = {key(row): row for row in rows_so_far()}
    for scheme, group_size in SETTINGS:
        if given.only and given.only != f"{scheme}:{group_size}":
            continue
        runs = [(method, None) for method in given.fixed] + [("auto", minutes) for minutes in given.minutes]
        for method, minutes in runs:
            row = measure("demo", scheme, group_size, method, minutes)
            rows[key(row)] = row
            print(told(row), flush=True)
            save("auto", {"environment": environment(), "rows": sorted(rows.values(), key=key)})


if __name__ == "__main__":
    main()
