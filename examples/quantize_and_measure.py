"""Quantize a model, load it, measure what was lost.

python examples/quantize_and_measure.py [MODEL] [OUT] [METHOD]
"""

from __future__ import annotations

import sys

import fewbits


def main(model: str = "demo", out: str = "quantized", method: str = "gptq") -> None:
    path = fewbits.quantize(
        model,
        "W4A16_ASYM",
        group_size=64,
        method=method,
        out=out,
        on_progress=lambda event: print(f"{event.stage} {event.done}/{event.total} {event.note}", file=sys.stderr),
    )
    quantized = fewbits.load(path)  # (model, tokenizer); the model is an ordinary transformers model
    result = fewbits.evaluate(quantized, against=model, samples=4, sequence_length=256)
    print(f"perplexity {result.perplexity}, of the original {result.reference_perplexity}")
    print(f"KL(original || quantized) {result.kl} nats per token; same most likely token {result.top1}")


if __name__ == "__main__":
    main(*sys.argv[1:])
