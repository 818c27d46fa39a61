"""8 bits on both sides: fewbits beside other projects, on the same text.

Each peer quantizes the re-ordered embedded model after the same calibration windows, in an environment of its own, and
runs it there over the evaluation windows: where inputs are rounded, weights alone say too little. What its head would
read is handed back, and one judge makes logits of it and compares them with the float32 original (peers/running.py).
Installing, resuming and going on from a record are those of bench_peers.py.

    python benchmarks/bench_w8a8_peers.py [--only torchao] [--record FILE] [--dry-run]

The record is "w8a8_peers"; `make docs` puts it into docs/w8a8.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import bench_peers
import torch
from bench_peers import arguments, machine, results_of
from peers.measure import Judge
from peers.page import TEXT
from peers.registry import PEERS
from peers.w8a8 import CONTESTANTS, SCRIPTS
from recorded import save


class Run(bench_peers.Run):
    """Contestants run the model themselves, over the built-in text."""

    benchmark: ClassVar[str] = "w8a8_peers"
    contestants = CONTESTANTS
    handed: ClassVar[str] = "states.safetensors"
    own_folders: ClassVar[tuple[str, ...]] = (*bench_peers.Run.own_folders, "kernels", "nn")

    def script(self, peer: str) -> Path:
        return SCRIPTS[peer]

    def given(self) -> list[Path]:
        return [self.work / "texts" / "evaluation-built-in.safetensors"]

    def evaluations(self, judge: Judge, handed: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
        return {TEXT: judge.measure_states(TEXT, handed)}


def main() -> None:
    options = arguments(__doc__)
    if options.text:
        raise SystemExit("--text: these contestants run the built-in text alone; bench_peers.py takes others")
    run = Run(options)
    results = results_of(run)
    record = {
        "environment": machine(run.benchmark),
        "model": options.model,
        "calibration": run.calibration.description,
        "texts": {name: text.description for name, text in run.texts.items()},
        "peers": {name: {**PEERS[name].environment.spec(), **run.installed(name)} for name in SCRIPTS if name in PEERS},
        "results": results,
    }
    if not options.dry_run:
        print(save(run.benchmark, record))


if __name__ == "__main__":
    main()
