"""Peak memory of quantizing does not grow with the depth of the model.

The embedded model (30 blocks) and random-weight models of its shape with 30 and 60 blocks are quantized with
GPTQ, each in a process of its own; the highest resident memory of each is recorded as "memory". Few
calibration windows: what is compared is the model's share, not the text's.

    python benchmarks/bench_memory.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from recorded import save

from fewbits.checkpoints.safetensors_file import write_stream
from fewbits.checkpoints.source import open_source
from fewbits.core.record import environment, write_json

SAMPLES = 8
SCRIPT = """
import sys
from fewbits.pipeline.quantize import quantize
quantize(sys.argv[1], "W4A16_ASYM", group_size=64, out=sys.argv[2], samples=int(sys.argv[3]), eval_samples=4)
"""


def random_twin(directory: Path, layers: int) -> Path:
    """A bfloat16 model of the embedded model's shape with `layers` blocks of random weights."""
    demo = open_source("demo")
    shapes = {}
    for name in demo.names():
        if name.startswith("model.layers."):
            if name.startswith("model.layers.0."):
                for layer in range(layers):
                    shapes[name.replace(".0.", f".{layer}.", 1)] = demo.info(name).shape
        else:
            shapes[name] = demo.info(name).shape

    def provider(name: str, shape: tuple[int, ...]) -> Any:
        def make() -> torch.Tensor:
            if "norm" in name:
                return torch.ones(shape, dtype=torch.bfloat16)
            generator = torch.Generator().manual_seed(hash(shape) % 1000)
            return (0.02 * torch.randn(shape, generator=generator)).bfloat16()

        return make

    directory.mkdir()
    items = [(name, torch.bfloat16, shape, provider(name, shape)) for name, shape in shapes.items()]
    write_stream(directory / "model.safetensors", items, {"format": "pt"})
    write_json(directory / "config.json", {**demo.config(), "num_hidden_layers": layers})
    demo.load_tokenizer().save_pretrained(directory)
    return directory


def peak(model: str, out: Path) -> dict[str, Any]:
    subprocess.run([sys.executable, "-c", SCRIPT, model, str(out), str(SAMPLES)], check=True)
    certificate = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
    return {
        "blocks": len({layer["block"] for layer in certificate["layers"]}),
        "parameters": certificate["source"]["parameters"],
        "peak_rss_bytes": certificate["peak_rss_bytes"],
        "seconds": certificate["seconds"],
    }


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        models = {"SmolLM2-135M": "demo"}
        for layers in (30, 60):
            models[f"random, {layers} blocks"] = str(random_twin(Path(scratch) / str(layers), layers))
        for name, model in models.items():
            rows.append({"model": name, **peak(model, Path(scratch) / f"out-{len(rows)}")})
            millions, gibibytes = rows[-1]["parameters"] / 1e6, rows[-1]["peak_rss_bytes"] / 2**30
            print(f"{name:20} {millions:6.0f} M parameters  peak {gibibytes:.2f} GiB", flush=True)
    print(save("memory", {"environment": environment(), "calibration_windows": SAMPLES, "rows": rows}))


if __name__ == "__main__":
    main()
