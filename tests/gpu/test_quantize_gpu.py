"""`fewbits.quantize` on a CUDA device, inputs rounded: what it writes is what a CPU would, to the noise of sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runtime_models import saved, tiny_llama

from fewbits.pipeline.quantize import quantize

CASES = [
    ("W8A8", "smoothquant", {}),
    ("W8A8", "rotate,smoothquant", {"rotate.residual": False, "rotate.online": True}),
    ("W8A8", "llm_int8", {"fixed": True, "threshold": 1.0}),
    ("W8A8_STATIC", "rtn", {"act_range": "moving_average"}),
    ("W8A8_STATIC_SINKS", "smoothquant", {"act_range": "percentile"}),
    ("MXFP4", "rotate,gptq", {"rotate.block": 32}),
    ("NVFP4_4OVER6", "gptq", {}),
    ("fp4_fit-g32/fp4_e2m1-token", "llm_fp4", {}),
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny_llama(), tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize(("scheme", "method", "options"), CASES)
def test_both_devices_lose_the_same(
    dense: Path, tmp_path: Path, scheme: str, method: str, options: dict[str, Any]
) -> None:
    options = dict(options)
    ranges = {"act_range": options.pop("act_range")} if "act_range" in options else {}
    kl = {}
    for device in ("cpu", "cuda"):
        out = quantize(
            dense, scheme, method=method, method_options=options, calibration=["some text, and more of it. " * 40],
            samples=4, sequence_length=64, eval_samples=2, device=device, out=tmp_path / device, **ranges,
        )  # fmt: skip
        kl[device] = json.loads((out / "certificate.json").read_text(encoding="utf-8"))["evaluations"][0]["kl"]["mean"]
    assert kl["cuda"] == pytest.approx(kl["cpu"], rel=0.25)
