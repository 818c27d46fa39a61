"""Decoding speed on this machine, batch 1, side by side in one run: tokens/s of the embedded model.

Rounds go through all contestants in turn and medians are reported, so a busy moment of the machine hits all
alike. The weights are rounded to nearest in memory: which integers they hold does not change the time. The
dense model runs in the decode engine as well: what the engine gains and what 4 bits gain are different
things.

    python benchmarks/bench_decode.py [--tokens 64] [--rounds 5] [--threads 2] [--only engine]
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from recorded import save

from fewbits.cli.speed import transformers_rate
from fewbits.core.record import environment
from fewbits.formats import parse_format
from fewbits.models.topology import find_topology
from fewbits.models.walk import blocks, linears
from fewbits.nn import QLinear, qlinears
from fewbits.runtime.generate import stream
from fewbits.runtime.load import load

PROMPT = "The history of the city began in the year"
BASELINE = "transformers generate, bfloat16"


def quantized(model: Any, name: str) -> Any:
    """A copy of `model` with the linears of its blocks as QLinear, rounded to nearest."""
    model = copy.deepcopy(model)
    format = parse_format(name).with_scale_dtype(torch.bfloat16)
    topology = find_topology(model.config.to_dict())
    for prefix, block in blocks(model, topology):
        for ref in linears(block, topology):
            module = QLinear.from_quantized(format.quantize(ref.weight, ref.name), ref.bias).prepack()
            model.set_submodule(f"{prefix}.{ref.name}", module)
    return model


def engine_rate(model: Any, tokenizer: Any, tokens: int) -> float | None:
    text = stream(model, tokenizer, PROMPT, max_new_tokens=tokens, ignore_eos=True)
    for _ in text:
        pass
    assert text.runner == "fewbits decode engine", text.runner
    return text.stats.decode_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="contestants whose name holds this")
    parser.add_argument("--dry-run", action="store_true", help="print, write no record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense, tokenizer = load(options.model, options.device, torch.float32)
    half = copy.deepcopy(dense).to(torch.bfloat16)
    models = {name: quantized(dense, name) for name in ("int4-asym-g64", "int8-channel", "nf4-g64")}
    four = models["int4-asym-g64"]

    def by_transformers(model: Any) -> Callable[[], float | None]:
        return lambda: transformers_rate(model, tokenizer, PROMPT, options.tokens)

    def by_engine(model: Any) -> Callable[[], float | None]:
        return lambda: engine_rate(model, tokenizer, options.tokens)

    runs = {
        BASELINE: by_transformers(half),
        "transformers generate, float32": by_transformers(dense),
        "transformers generate, int4-asym-g64": by_transformers(four),
        "engine, bfloat16": by_engine(half),
        "engine, float32": by_engine(dense),
        **{f"engine, {name}": by_engine(model) for name, model in models.items()},
    }
    runs = {name: run for name, run in runs.items() if options.only in name}
    for run in runs.values():  # engines built, caches allocated
        run()
    gc.collect()
    rates: dict[str, list[float]] = {name: [] for name in runs}
    load_before = os.getloadavg()[0]
    for _ in range(options.rounds):
        for name, run in runs.items():
            rate = run()
            assert rate is not None
            rates[name].append(rate)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, rate in medians.items():
        ratio = f"{rate / medians[BASELINE]:5.2f} x" if BASELINE in medians else ""
        print(f"{name:<40} {rate:7.1f} tokens/s {ratio}")
    record = {
        "environment": {**environment(), "threads": options.threads, "load_average_before": load_before},
        "model": options.model,
        "batch": 1,
        "new_tokens": options.tokens,
        "tokens_per_second": medians,
        "rounds": rates,
        "kernels": {name: sorted({str(m.kernel) for _, m in qlinears(found)}) for name, found in models.items()},
    }
    if not options.dry_run:
        print(save("decode", record))


if __name__ == "__main__":
    main()
