"""One run of `fewbits.quantize`, for the sake of what its certificate says."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from fewbits.pipeline.quantize import quantize

MEASURES = ("perplexity", "reference_perplexity", "kl", "top1", "text")


def certified(model: str, scheme: str | None = None, **options: Any) -> dict[str, Any]:
    """The certificate of `model` quantized with `options` of `quantize`; the output itself is removed."""
    with tempfile.TemporaryDirectory() as directory:
        out = quantize(model, scheme, out=Path(directory) / "q", **options)
        return json.loads((out / "certificate.json").read_text(encoding="utf-8"))


def outcome(certificate: dict[str, Any], *more: str) -> dict[str, Any]:
    """What a record keeps of any run: size, cost and measures, `more` of these than usual."""
    found = certificate["evaluations"][0]
    return {
        "bits_per_weight": certificate["size"]["bits_per_weight"],
        "seconds": certificate["seconds"],
        "peak_rss_bytes": certificate["peak_rss_bytes"],
        **{name: found[name] for name in (*more, *MEASURES)},
    }
