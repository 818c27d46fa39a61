"""Which kernel, with which choices, for a product: what was measured, on this device or the one most like it.

A file of measured choices, `tuned/<device>.json` beside this one, or in the cache folder where `fewbits bench kernels
--tune` leaves it (which goes first), holds

    {"version": 3, "device": "NVIDIA H200", "capability": 9, "environment": {...},
     "cases": [{"bits": 4, "table": false, "group": 128, "n": 4096, "k": 4096, "m": 16,
                "kernel": "few", "choices": {...}}]}

A case of a product with inputs rounded to E4M3 says `"e4m3": true` besides, and is asked for those alone.

`version` is that of the choices; files of another are left alone. `kernel` is few, many or dense. A product takes the
case of the same bits and kind of codes (else of any) whose N, K and number of tokens are nearest, on a scale of
logarithms, among those that fit it. No file for the device: one of the same major capability; none at all: rules of
thumb.
"""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fewbits.core.errors import BadInput, first_line
from fewbits.core.record import write_json
from fewbits.kernels import nvrtc
from fewbits.kernels.fragment_choices import SHARED_LIMIT, Config, Few, Many, dense_takes, fits, runs_on
from fewbits.kernels.fragment_layout import Layout

VERSION = 3  # 2: `few` kept units in registers, `many` knew no clusters
KERNELS: dict[str, type[Few] | type[Many]] = {"few": Few, "many": Many}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A measured product and the fastest choice; None: decode once."""

    bits: int
    table: bool
    group: int
    n: int
    k: int
    m: int
    config: Config | None
    e4m3: bool = False


def file_name(device: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split()) + ".json"


_PRODUCT = ("bits", "table", "group", "n", "k", "m")


def _product(row: dict[str, Any]) -> tuple[Any, ...]:
    return *(row[name] for name in _PRODUCT), row.get("e4m3", False)


def _case(row: dict[str, Any]) -> Case:
    config = None if row["kernel"] == "dense" else KERNELS[row["kernel"]](**row["choices"])
    return Case(**{name: row[name] for name in _PRODUCT}, e4m3=row.get("e4m3", False), config=config)


def _shipped() -> list[Path]:
    return sorted(Path(str(entry)) for entry in (files("fewbits.kernels") / "tuned").iterdir())


def _own(device: str) -> Path:
    return nvrtc.folder() / "tuned" / file_name(device)


def _of(device: str) -> list[Path]:
    """Files of this very device, the one that goes first before the other."""
    return [_own(device), *(path for path in _shipped() if path.name == file_name(device))]


def _read(path: Path) -> tuple[int, dict[tuple[Any, ...], dict[str, Any]], tuple[Case, ...]] | None:
    """Capability, rows by product and cases of a file; None where there is none, or one of other choices."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["version"] != VERSION:
            return None
        rows = {_product(row): row for row in record["cases"]}
        return record["capability"], rows, tuple(map(_case, rows.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path} is no file of measured choices ({first_line(error)}): delete it, or measure again with "
            "fewbits bench kernels --tune"
        ) from error


@lru_cache(maxsize=8)
def cases(device: str, capability: int) -> tuple[Case, ...]:
    """The cases measured on `device`, else on another of its capability; empty where there are none."""
    of_device = _of(device)
    for path in [*of_device, *_shipped()]:
        if (found := _read(path)) is not None:
            measured_on, _, measured = found
            if path in of_device or measured_on == capability:
                return measured
    return ()


def keep(device: str, capability: int, environment: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Writes what was measured to the cache folder, beside what was known of other products on this device.

    In place of a file there that cannot be read.
    """
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in reversed(_of(device)):
        with contextlib.suppress(BadInput):
            if (found := _read(path)) is not None:
                known |= found[1]
    known |= {_product(row): row for row in rows}
    record = {"version": VERSION, "device": device, "capability": capability, "environment": environment}
    path = _own(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**record, "cases": list(known.values())})
    forget()
    return path


def forget() -> None:
    """Files are read again before the next choice."""
    cases.cache_clear()
    choice.cache_clear()


def _distance(case: Case, layout: Layout, n: int, k: int, m: int) -> float:
    kind = 8.0 * ((case.bits, case.table) != (layout.bits, layout.table)) + 1.0 * (case.group != layout.group)
    shape = abs(math.log2(case.n / n)) + abs(math.log2(case.k / k))
    # A choice for more tokens takes these in the time it takes for its own; one for fewer may need a second round.
    return kind + shape + 2.0 * abs(math.log2(case.m / m)) + (2.0 if m > case.m else 0.0)


@lru_cache(maxsize=4096)  # asked at every product
def choice(
    device: str, capability: int, layout: Layout, n: int, k: int, m: int, sms: int, limit: int = SHARED_LIMIT
) -> Config | None:
    """The kernel for x [m, k] times a weight [n, k]; None: decode the weight once for a dense product."""
    same = [case for case in cases(device, capability) if case.e4m3 == layout.e4m3]
    nearest = sorted(same, key=lambda case: _distance(case, layout, n, k, m))
    for case in nearest:
        if case.config is None:
            if not dense_takes(layout, n):
                continue
            return None
        config = case.config
        if runs_on(config, capability) and fits(config, layout, n, k, m, sms, limit):
            return config
    return rule(capability, layout, n, k, m, sms, limit)


def rule(capability: int, layout: Layout, n: int, k: int, m: int, sms: int, limit: int = SHARED_LIMIT) -> Config | None:
    """A choice without measurements."""
    if layout.e4m3:
        if m >= 1024 and dense_takes(layout, n):
            return None
        nt = next(size for size in (16, 32, 64, 128) if m <= size or size == 128)
        tries = [Many(nt=tokens, stages=stages, share=1, apart=True) for tokens in (nt, 16) for stages in (6, 4, 3, 2)]
        return next((config for config in tries if fits(config, layout, n, k, m, sms, limit)), None)
    for config in (Few(), Few(mt=2), Few(mt=2, warps=8), Few(mt=2, split=2), Few(mt=2, split=4)):
        if runs_on(config, capability) and m <= 16 and fits(config, layout, n, k, m, sms, limit):
            return config
    if runs_on(Many(), capability) and m <= 256:
        nt = next(size for size in (16, 32, 64, 128) if m <= size or size == 128)
        for stages in (4, 3, 2):
            config = Many(nt=nt, stages=stages, share=1)
            if fits(config, layout, n, k, m, sms, limit):
                return config
    return None
