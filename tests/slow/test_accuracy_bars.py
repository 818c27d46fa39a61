"""What GPTQ must recover on the embedded model, against the float32 original on held-out text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fewbits.pipeline.quantize import quantize


def certificate(scheme: str, method: str, out: Path) -> dict[str, Any]:
    quantize("demo", scheme, group_size=64, method=method, out=out, eval_samples=16)
    return json.loads((out / "certificate.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("scheme", "share"), [("W4A16_ASYM", 0.65), ("W3A16_ASYM", 0.45)])
def test_gptq_recovers_most_of_what_rounding_loses(scheme: str, share: float, tmp_path: Path) -> None:
    nearest = certificate(scheme, "rtn", tmp_path / "rtn")["evaluations"][0]["kl"]
    done = certificate(scheme, "gptq", tmp_path / "gptq")
    solved = done["evaluations"][0]["kl"]
    assert solved["mean"] + 2 * solved["stderr"] <= share * (nearest["mean"] - 2 * nearest["stderr"])
    assert done["size"]["bits_per_weight"] < 4.32
