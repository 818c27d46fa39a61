"""Mixed bit-rates against uniform ones of the same size, on the embedded model.

A budget that no format meets exactly is met uniformly by two neighbouring widths, a whole block at a time, the wider
ones spread evenly over the depth. `plan` then gets the bits this took, and both are quantized by GPTQ and measured on
held-out text. The measurement behind the plans is made once and kept in a file. With --within a third plan of the same
size may also mix formats within a linear.

    python benchmarks/bench_mixed.py [--measurements FILE] [--bits 3.0 3.5 4.0] [--within]

The record is "mixed", with --within "within"; `make docs` makes the tables in docs/plans.md from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from certified import certified, outcome
from recorded import save

from fewbits.checkpoints.source import open_source
from fewbits.core.record import environment
from fewbits.formats import Format
from fewbits.pipeline.planning import plan
from fewbits.planner.candidates import candidates
from fewbits.planner.plan import Plan

EVAL_SAMPLES = 16


def uniform(like: Plan, bits: float, shapes: dict[str, tuple[int, int]]) -> tuple[Plan, float]:
    """The layers of `like` at two neighbouring widths, spread evenly over the blocks; and their average bits."""
    formats, total = candidates((), 64, torch.bfloat16), sum(rows * columns for rows, columns in shapes.values())

    def average(chosen: dict[str, Format]) -> float:
        return sum(chosen[name].bits_per_weight(shape) * shape[0] * shape[1] for name, shape in shapes.items()) / total

    sizes = sorted((average(dict.fromkeys(shapes, format)), format.name, format) for format in formats)
    fewer, _, low = max(size for size in sizes if size[0] <= bits + 1e-9)
    more, _, high = min(size for size in sizes if size[0] > bits + 1e-9)
    blocks = sorted({block_of(name) for name in shapes})
    count = int(len(blocks) * (bits - fewer) / (more - fewer) + 1e-6)
    wide = {block for block in blocks if (block + 1) * count // len(blocks) > block * count // len(blocks)}
    chosen = {name: high if block_of(name) in wide else low for name in shapes}
    layers = {name: format.name for name, format in chosen.items()}
    raw = {**{key: like.raw[key] for key in ("kind", "version", "source", "target")}, "bits": bits, "layers": layers}
    return dataclasses.replace(like, layers=layers, raw=raw), average(chosen)


def block_of(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def measure(chosen: Plan, device: str | None) -> dict[str, Any]:
    certificate = certified("demo", plan=chosen, eval_samples=EVAL_SAMPLES, device=device)
    return {
        "formats": {name: list(chosen.layers.values()).count(name) for name in chosen.formats},
        "method": certificate["method"],
        **outcome(certificate),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measurements", type=Path, help="file that keeps what layers cost")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 3.5, 4.0])
    parser.add_argument("--within", action="store_true", help="plan with mixes of formats within linears, too")
    parser.add_argument("--device")
    options = parser.parse_args()
    source, rows = open_source("demo"), []
    with tempfile.TemporaryDirectory() as directory:
        kept = options.measurements or Path(directory) / "measurements.json"
        for bits in options.bits:
            like = plan("demo", bits, measurements=kept, device=options.device)
            shapes = {name: tuple(source.info(f"{name}.weight").shape) for name in like.layers}
            even, size = uniform(like, bits, shapes)
            mixed = plan("demo", size, measurements=kept, device=options.device)
            pair = {"bits": bits, "uniform": measure(even, options.device), "planned": measure(mixed, options.device)}
            pair["ratio"] = pair["planned"]["kl"]["mean"] / pair["uniform"]["kl"]["mean"]
            if options.within:
                inside = plan("demo", size, measurements=kept, device=options.device, within=True)
                pair["within"] = measure(inside, options.device)
                pair["predicted"] = {"planned": mixed.raw["predicted_kl"], "within": inside.raw["predicted_kl"]}
                pair["within_ratio"] = pair["within"]["kl"]["mean"] / pair["planned"]["kl"]["mean"]
            rows.append(pair)
            for name in ("uniform", "planned", "within")[: 3 if options.within else 2]:
                kl = pair[name]["kl"]
                print(
                    f"{bits:.2f} {name:8} {pair[name]['bits_per_weight']:.4f} bits  KL {kl['mean']:.4f} "
                    f"± {kl['stderr']:.4f}  {pair[name]['seconds']:.0f} s",
                    flush=True,
                )
            print(f"{'':5}planned / uniform = {pair['ratio']:.3f}", flush=True)
            if options.within:
                print(f"{'':5}within / planned = {pair['within_ratio']:.3f}", flush=True)
    # The command without its other arguments: where the measurement was kept repeats nothing elsewhere.
    made = {**environment(), "command": "python benchmarks/bench_mixed.py" + (" --within" if options.within else "")}
    print(save("within" if options.within else "mixed", {"environment": made, "rows": rows}))


if __name__ == "__main__":
    main()
