"""Quantizing and decoding a 4096 x 14336 matrix in every data type, against a pass that only copies it.

The copy is `w.clone()`: it reads every weight once and writes as many bytes to new memory. Rounds go through all
formats in turn and medians are reported, so a busy moment of the machine hits all alike.

    python benchmarks/bench_formats.py [--rounds 3] [--threads 2] [--rows 4096] [--only nf4] [--dry-run]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from recorded import save

from fewbits.core.record import environment
from fewbits.formats import parse_format
from fewbits.formats.elements import ELEMENTS
from fewbits.formats.parse import NAMED

SCALED = (
    "int8-channel",
    "int4-g128",
    "int4-asym-g128",
    "int4-narrow-g128",
    "int8-tensor",
    "fp8_e4m3-channel",
    "fp8_e4m3-tensor",
    "nf4-g64-dq",
)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="formats whose name holds this")
    parser.add_argument("--dry-run", action="store_true", help="print, write no record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    w = torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0)).to(device)
    weights = {"": w, "unsigned": w.abs()}  # dynamic8u has no level below 0
    names = [*SCALED, *(f"{element}-g64" for element in ELEMENTS), *NAMED]
    formats = {name: parse_format(name) for name in names if options.only in name}
    quantize: dict[str, list[float]] = {name: [] for name in formats}
    decode: dict[str, list[float]] = {name: [] for name in formats}
    copies = []
    load_before = os.getloadavg()[0]
    for turn in range(options.rounds + 1):  # the first fills caches and tables
        for name, format in formats.items():
            weight = weights["unsigned" if "dynamic8u" in name else ""]
            copy = timed(weight.clone, device)
            found: list[Any] = []
            took = timed(lambda format=format, weight=weight, into=found: into.append(format.quantize(weight)), device)
            back = timed(found[0].dequantize, device)
            if turn:
                copies.append(copy)
                quantize[name].append(took)
                decode[name].append(back)
    copy = statistics.median(copies)
    rows = {}
    for name in formats:
        there, back = statistics.median(quantize[name]), statistics.median(decode[name])
        rows[name] = {
            "kind": formats[name].grid.kind,
            "quantize_seconds": round(there, 4),
            "decode_seconds": round(back, 4),
            "quantize_copies": round(there / copy, 2),
            "decode_copies": round(back / copy, 2),
        }
        print(f"{name:<24} quantize {there:6.3f} s {there / copy:6.1f} x   decode {back:6.3f} s {back / copy:5.1f} x")
    print(f"copy {copy:.3f} s")
    record = {
        "environment": {**environment(), "threads": options.threads, "load_average_before": load_before},
        "shape": [options.rows, options.columns],
        "device": str(device),
        "copy_seconds": round(copy, 4),
        "formats": rows,
    }
    if not options.dry_run:
        print(save("formats" if device.type == "cpu" else "formats_gpu", record))


if __name__ == "__main__":
    main()
