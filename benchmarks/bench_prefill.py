"""Reading a prompt of 512 tokens: 8 bits on both sides beside bfloat16 and float32, and what their products cost.

Models: the embedded one through transformers, in bfloat16 and float32; the same with its linears as W8A8 (`QLinear`),
and that in fewbits' decode engine. Rounds go through all in turn and medians are reported, so that a busy moment of the
machine hits all alike. Products, of 512 x 576 by 576 x 1536: float32, bfloat16, and the two that torch has for INT8,
`torch._int_mm` and oneDNN's, with the largest error of their sums beside exact ones. Of each model, torch's profiler
says how much goes into the products of its blocks and how much into attention. Recorded as "prefill".

    python benchmarks/bench_prefill.py [--rounds 3] [--threads 2] [--dry-run]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from recorded import save
from torch import Tensor

from fewbits.core.record import environment
from fewbits.formats import parse_format
from fewbits.models.topology import find_topology
from fewbits.models.walk import blocks, linears
from fewbits.nn import QLinear
from fewbits.runtime.engine import Engine
from fewbits.runtime.load import load

TOKENS = 512
SHAPE = (512, 576, 1536)  # tokens, inputs, outputs
# What takes a model's time -> torch's operations. The head multiplies one token and is in neither.
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::_int_mm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
}


def w8a8(model: Any) -> Any:
    """A copy of `model` with the linears of its blocks as W8A8, rounded to nearest."""
    model = copy.deepcopy(model)
    weights, token = parse_format("int8-channel"), parse_format("int8-token")
    topology = find_topology(model.config.to_dict())
    for prefix, block in blocks(model, topology):
        for ref in linears(block, topology):
            module = QLinear.from_quantized(weights.quantize(ref.weight, ref.name), ref.bias, token).prepack()
            model.set_submodule(f"{prefix}.{ref.name}", module)
    return model


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one run that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds(run)
            if turn:
                found[name].append(taken)
    return {name: statistics.median(times) for name, times in found.items()}


def spent(run: Callable[[], object], rounds: int) -> dict[str, float]:
    """Seconds that a run spends in each of `KINDS`, mean of `rounds`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(rounds):
            run()
    taken = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}  # microseconds
    return {kind: sum(taken.get(name, 0) for name in names) / 1e6 / rounds for kind, names in KINDS.items()}


def products() -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """Product -> (what runs it, the exact result)."""
    tokens, inputs, outputs = SHAPE
    generator = torch.Generator().manual_seed(0)

    def levels(rows: int, top: int) -> Tensor:
        return torch.randint(-top, top + 1, (rows, inputs), generator=generator)

    x, w, w7 = levels(tokens, 127), levels(outputs, 127), levels(outputs, 63)
    exact, exact7 = x.double() @ w.double().t(), x.double() @ w7.double().t()
    xf, wf, xb, wb, x8, w8 = x.float(), w.float(), x.bfloat16(), w.bfloat16(), x.to(torch.int8), w.to(torch.int8)
    ones, zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
    unsigned = (x + 128).to(torch.uint8)

    def onednn(weight: Tensor) -> Callable[[], Tensor]:
        packed = torch.ops.onednn.qlinear_prepack(weight.to(torch.int8), [tokens, inputs])
        return lambda: torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )

    return {
        "float32": (lambda: xf @ wf.t(), exact),
        "bfloat16": (lambda: xb @ wb.t(), exact),
        "torch._int_mm": (lambda: torch._int_mm(x8, w8.t()), exact),
        "oneDNN, 8-bit weights": (onednn(w), exact),
        "oneDNN, 7-bit weights": (onednn(w7), exact7),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dry-run", action="store_true", help="print, write no record")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = products()
    multiplied = in_turns({name: run for name, (run, _) in known.items()}, options.rounds)
    rows: list[dict[str, Any]] = []
    for name, (run, exact) in known.items():
        error = float((run().double() - exact).abs().max() / exact.abs().max())
        rows.append({"product": name, "seconds": multiplied[name], "largest_error": error})
        print(f"{name:40} {1e3 * multiplied[name]:9.1f} ms   largest error {error:.1e} of the largest sum", flush=True)

    dense, tokenizer = load("demo", "cpu", torch.float32)
    half, few = copy.deepcopy(dense).to(torch.bfloat16), w8a8(dense)
    text = "The history of the city began in the year " * TOKENS
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]

    def by_transformers(model: Any) -> Callable[[], object]:
        return lambda: model(ids, logits_to_keep=1)

    engine = Engine(few, TOKENS)

    def by_engine() -> None:
        engine.tokens.clear()  # or it would not read the same prompt again
        engine.prefill(ids[0].tolist())

    runs = {
        "transformers, bfloat16": by_transformers(half),
        "transformers, float32": by_transformers(dense),
        "transformers, W8A8": by_transformers(few),
        "fewbits engine, W8A8": by_engine,
    }
    with torch.inference_mode():
        taken = in_turns(runs, options.rounds)
        parts = {name: spent(run, options.rounds) for name, run in runs.items()}
    for name, value in taken.items():
        rows.append({"model": name, "seconds": value, "tokens_per_second": TOKENS / value, "spent": parts[name]})
        times = taken["transformers, bfloat16"] / value
        of_it = ", ".join(f"{kind} {1e3 * part:.0f}" for kind, part in parts[name].items())
        print(
            f"{name:40} {TOKENS / value:9.1f} tokens/s   {times:.2f} x bfloat16   {1e3 * value:.0f} ms: {of_it}",
            flush=True,
        )
    if not options.dry_run:
        multiplies = {"INT8": torch.cpu._is_vnni_supported(), "bfloat16": torch.cpu._is_avx512_bf16_supported()}
        about = {
            "environment": environment(), "threads": options.threads, "tokens": TOKENS, "shape": list(SHAPE),
            "multiplies": multiplies,
        }  # fmt: skip
        print(save("prefill", {**about, "rows": rows}))


if __name__ == "__main__":
    main()
