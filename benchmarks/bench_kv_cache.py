"""What a cache of keys and values in few bits costs the embedded model, and what it saves.

Text is read 32 tokens at a time behind the quantized cache, as `fewbits eval --kv` does; the loss of a setting is the
difference of the two models' mean log-probabilities, paired window by window. Keys of one window are also rounded on
their own, per channel and per token. Recorded under benchmarks/results as "kv_cache".

    python benchmarks/bench_kv_cache.py [--windows 5] [--length 768] [--only int4]
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from recorded import save

from fewbits.core.record import environment
from fewbits.evaluation.evaluate import opened, remember, score
from fewbits.evaluation.forward import Forward
from fewbits.formats.kv import parse_kv
from fewbits.metrics import block_estimate
from fewbits.nn.kv_cache import QuantizedKVCache, QuantizedKVLayer

BARE = "-recent0-first0"  # every token is quantized as soon as its group is whole
SETTINGS = ["int8", "fp8", "int4", f"int4{BARE}", f"int4-rotated-token{BARE}", "int2", f"int2{BARE}",
            f"int2-token{BARE}"]  # fmt: skip


def measure(loaded: Any, reference: Any, name: str) -> dict[str, Any]:
    kv = parse_kv(name)
    started = time.monotonic()
    scores = score(Forward(loaded.model, loaded.name, kv), reference.tokens.ids, reference)
    nats = block_estimate(scores.nll - reference.nll)
    config = loaded.model.config
    width = config.head_dim
    token = config.num_hidden_layers * kv.bytes_per_token(config.num_key_value_heads, width)
    kl = block_estimate(scores.kl)
    return {
        "cache": name,
        "bits": sum(kv.bits_per_number(width)) / 2,
        "bytes_per_token": token,
        "nats": {"mean": nats.mean, "stderr": nats.stderr},
        "perplexity_change": math.expm1(nats.mean),
        "kl": {"mean": kl.mean, "stderr": kl.stderr},
        "seconds": round(time.monotonic() - started, 1),
    }


def key_errors(loaded: Any, ids: torch.Tensor) -> list[dict[str, float]]:
    """Of each layer: the largest channel's rms over the median's, and the 2-bit error per token over per channel."""
    cache = loaded.model(ids[None, :512], use_cache=True).past_key_values
    rows = []
    for layer in cache.layers:
        keys = layer.keys[:, :, 32:]  # without the first tokens
        errors = []
        for name in (f"int2{BARE}", f"int2-token{BARE}", f"int2-rotated-token{BARE}"):
            rounded = QuantizedKVLayer(parse_kv(name))
            rounded.update(keys, keys)
            found, _ = rounded.update(keys[:, :, :0], keys[:, :, :0])
            errors.append(float((found - keys).square().mean()))
        rms = keys.square().mean(2).sqrt()
        rows.append(
            {
                "largest_channel": float((rms.amax(-1) / rms.median(-1).values).max()),
                "token_over_channel": errors[1] / errors[0],
                "rotated_token_over_channel": errors[2] / errors[0],
            }
        )
    return rows


def decode_seconds(loaded: Any, ids: torch.Tensor, name: str | None, steps: int = 6) -> float:
    """Of one token behind `ids`, the median of `steps`."""
    cache = None if name is None else QuantizedKVCache(loaded.model.config, name)
    cache = loaded.model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        loaded.model(ids[None, :1], past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - started)
    return sorted(times)[steps // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--length", type=int, default=768)
    parser.add_argument("--only", action="append")
    given = parser.parse_args()
    rows = []
    with (
        opened("demo") as loaded,
        remember((loaded.model, loaded.tokenizer), samples=given.windows, sequence_length=given.length) as reference,
    ):
        for name in given.only or SETTINGS:
            row = measure(loaded, reference, name)
            rows.append(row)
            nats, change = row["nats"], 100 * row["perplexity_change"]
            print(
                f"{name:34} {row['bits']:.2f} bits {row['bytes_per_token'] / 1024:6.2f} KiB/token  perplexity "
                f"{change:+.2f} % ± {100 * nats['stderr']:.2f}  KL {row['kl']['mean']:.5f}  {row['seconds']:.0f} s",
                flush=True,
            )
        keys = key_errors(loaded, reference.tokens.ids[0])
        ids = reference.tokens.ids[0]
        decode = {str(name): decode_seconds(loaded, ids, name) for name in (None, "int4", f"int2{BARE}")}
        config = loaded.model.config
        plain = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    for name in ("largest_channel", "token_over_channel", "rotated_token_over_channel"):
        ordered = sorted(row[name] for row in keys)
        print(f"keys, {name}: {ordered[0]:.2f} to {ordered[-1]:.2f}, median {ordered[len(ordered) // 2]:.2f}")
    print("a token behind a window:", {name: f"{1000 * seconds:.0f} ms" for name, seconds in decode.items()})
    record = {
        "environment": environment(),
        "windows": [given.windows, given.length],
        "bytes_per_token_16_bit": plain,
        "rows": rows,
        "keys": keys,
        "decode_seconds": decode,
    }
    print(save("kv_cache", record))


if __name__ == "__main__":
    main()
