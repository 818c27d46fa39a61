"""A random GPTQ checkpoint of any size converted to compressed-tensors: time against copying it, and peak memory.

    python benchmarks/bench_convert.py --billions 7        # 3.9 GB of weights, 32 blocks of Llama-7B's shapes
    python benchmarks/bench_convert.py --billions 0.7

The record is "convert"; `make docs` writes its line in docs/checkpoints.md. The copy is `cp` and an fsync of every
file, on the same disk and with the source in the page cache in both cases; the better of two turns counts. Peak memory
is that of the process that converts, torch included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from recorded import save

from fewbits.checkpoints.safetensors_file import write_stream
from fewbits.core.record import environment

HIDDEN, MIDDLE, GROUP, VOCABULARY, BLOCKS_OF_7B = 4096, 11008, 128, 32000, 32
SHAPES = {
    **{f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"},
    "mlp.gate_proj": (MIDDLE, HIDDEN),
    "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}


def make(folder: Path, blocks: int) -> int:
    """Random codes and scales in GPTQ's layout, a file a block; the bytes written."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "dtype": "float16",
        "intermediate_size": MIDDLE, "num_hidden_layers": blocks, "num_attention_heads": 32, "vocab_size": VOCABULARY,
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False,
                                "checkpoint_format": "gptq"},
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    draw, weight_map, total = torch.Generator().manual_seed(0), {}, 0
    zeros = 0x77777777
    for block in range(blocks):
        tensors = {f"model.layers.{block}.input_layernorm.weight": torch.ones(HIDDEN, dtype=torch.float16)}
        for name, (rows, columns) in SHAPES.items():
            module, groups = f"model.layers.{block}.{name}", columns // GROUP
            words = torch.randint(-(2**31), 2**31, (columns // 8, rows), generator=draw, dtype=torch.int32)
            tensors[f"{module}.qweight"] = words
            tensors[f"{module}.qzeros"] = torch.full((groups, rows // 8), zeros, dtype=torch.int32)
            tensors[f"{module}.scales"] = torch.rand((groups, rows), generator=draw).half() + 0.5
            tensors[f"{module}.g_idx"] = torch.arange(columns, dtype=torch.int32) // GROUP
        if block == 0:
            for name in ("model.embed_tokens", "lm_head"):
                tensors[f"{name}.weight"] = torch.zeros((VOCABULARY, HIDDEN), dtype=torch.float16)
            tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.float16)
        file = f"model-{block + 1:05}-of-{blocks:05}.safetensors"
        items = [(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]
        total += write_stream(folder / file, items)
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def copy(source: Path, target: Path) -> float:
    began = time.monotonic()
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        handle = os.open(target / path.name, os.O_RDWR)
        os.fsync(handle)
        os.close(handle)
    return time.monotonic() - began


def convert(source: Path, target: Path) -> None:
    from fewbits.pipeline.convert import convert as run

    began = time.monotonic()
    done = run(source, "compressed-tensors", target)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.monotonic() - began, "peak_bytes": peak, "actions": dict(done.actions)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--billions", type=float, default=7.0)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary directory")
    parser.add_argument("--convert", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.convert:
        convert(*given.convert)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        source, blocks = Path(folder) / "gptq", max(1, round(given.billions / 7 * BLOCKS_OF_7B))
        written = make(source, blocks)
        copies, results = [], []
        for turn in range(2):  # in turns, since a disk has good and bad seconds; the better of two
            copies.append(copy(source, Path(folder) / "copy"))
            shutil.rmtree(Path(folder) / "copy")
            command = [sys.executable, __file__, "--convert", str(source), str(Path(folder) / f"out{turn}")]
            results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            shutil.rmtree(Path(folder) / f"out{turn}")
        copied, result = min(copies), min(results, key=lambda result: result["seconds"])
    record = {
        "blocks": blocks, "source_bytes": written, "copy_seconds": round(copied, 2),
        "convert_seconds": round(result["seconds"], 2), "ratio": round(result["seconds"] / copied, 2),
        "peak_bytes": result["peak_bytes"], "actions": result["actions"],
        "turns": [{"copy_seconds": round(a, 2), "convert_seconds": round(b["seconds"], 2)}
                  for a, b in zip(copies, results, strict=True)],
        "load_average": round(os.getloadavg()[1], 1), "environment": environment(),
    }  # fmt: skip
    print(json.dumps(record, indent=2))
    print(save("convert", record))


if __name__ == "__main__":
    main()
