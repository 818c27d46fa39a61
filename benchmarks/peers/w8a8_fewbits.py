"""fewbits through the same door: quantize, load what was written, run it on this machine's kernels.

Runs in this project's own environment.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from contract import job
from running import finish_running

from fewbits.calibration.data import TokenSet
from fewbits.nn.qlinear import qlinears
from fewbits.pipeline.quantize import quantize
from fewbits.runtime.load import load


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        with job() as work:
            options = work.options
            out = quantize(
                str(work.model),
                options["scheme"],
                method=options["method"],
                method_options=options["method_options"],
                act_range=options.get("act_range"),
                calibration=TokenSet.of(work.ids, {}),
                dtype="float32",
                eval_samples=0,
                out=Path(scratch) / "quantized",
            )
        certificate = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
        model, _ = load(out, "cpu", torch.float32)
    weights = sum(module.in_features * module.out_features for _, module in qlinears(model))
    parts = {"everything stored": certificate["size"]["bits_per_weight"] * weights}
    settings = f"{options['scheme']}, {options['method']}"
    settings += "".join(f", {name} {value}" for name, value in options["method_options"].items())
    settings += f", ranges by {options['act_range']}" if "act_range" in options else ""
    finish_running(work, model, parts, ["transformers"], settings)


if __name__ == "__main__":
    main()
