"""fewbits through the same door as everyone: quantize, decode what was written, count what is stored.

Runs in this project's own environment.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from contract import finish, job
from safetensors.torch import load_file

from fewbits.calibration.continuations import continued
from fewbits.calibration.data import TokenSet
from fewbits.nn.qlinear import qlinears
from fewbits.pipeline.quantize import quantize
from fewbits.runtime.load import load


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        with job() as work:
            options, windows = work.options, TokenSet.of(work.ids, {})
            if copies := options.get("continuations", 0):
                original, _ = load(work.model, work.accelerator())
                windows = continued(original, windows, copies)
                del original
            out = quantize(
                str(work.model),
                options["scheme"],
                method=options["method"],
                method_options=options["method_options"],
                calibration=windows,
                dtype="bfloat16",
                device=work.accelerator(),
                eval_samples=0,
                out=Path(scratch) / "quantized",
            )
        certificate = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
        model, _ = load(out, "cpu", torch.float32)
        decoded = {f"{name}.weight": module.dequantize() for name, module in qlinears(model)}
        weights = sum(tensor.numel() for tensor in decoded.values())
        # What the method changed besides, norms that scales were folded into: more than rounding to bfloat16 does.
        original = load_file(work.model / "model.safetensors")
        for name, tensor in model.named_parameters():
            if name not in original or not torch.equal(tensor, original[name].bfloat16().float()):
                decoded[name] = tensor
    parts = {"codes, scales, zero points": certificate["size"]["bits_per_weight"] * weights}
    extra = "".join(f", {name} {value}" for name, value in options["method_options"].items())
    settings = f"{certificate['scheme']['weights']}, {options['method']}{extra}, bfloat16 scales"
    if copies:
        extra += f", {copies} continuations of each window by the original"
    finish(work, decoded, parts, ["transformers"], settings, weights)


if __name__ == "__main__":
    main()
