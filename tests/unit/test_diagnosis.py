"""Why rounding inputs costs what it does: the channels that were made large, and the remedies that are for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_certificate import fake_certificate
from test_pipeline import run
from tiny_runtime_models import llama_with_outliers, saved

from fewbits.algorithms.diagnosis import diagnose
from fewbits.formats import parse_format
from fewbits.report import rounding, write_report
from fewbits.report.certificate import read_certificate


def layer(outlier: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 128, generator=generator), torch.randn(32, 128, generator=generator)
    x[:, 9] *= outlier
    return x, weight


@pytest.mark.parametrize("activations", ["int8-token", "int4-token", "int8-tensor-static", "int8-tensor-static-sinks"])
def test_an_outlier_channel_is_blamed_and_its_remedies_help(activations: str) -> None:
    x, weight = layer(60.0)
    found = diagnose(x, [weight], parse_format("int8-channel"), parse_format(activations))
    channel, share = found["channels"][0]
    assert channel == 9 and share > 0.9
    assert found["remedies"]["llm_int8"] < 0.2 * found["error"]
    assert found["remedies"]["smoothquant"] < 0.3 * found["error"]
    assert ("token" in found["remedies"]) == ("sinks" in found["remedies"]) == ("tensor" in activations)
    assert 0.8 * found["error"] < found["inputs"] < 1.2 * found["error"]


def test_a_sink_is_seen_though_it_loses_nothing_itself() -> None:
    x, weight = layer(1.0)
    x[0] *= 3000
    found = diagnose(x, [weight], parse_format("int8-channel"), parse_format("int8-tensor-static"))
    assert found["error"] > 0.5  # of all tokens, it would be one in a million
    assert max(found["remedies"][name] for name in ("sinks", "token")) < 1e-3
    assert min(found["remedies"][name] for name in ("llm_int8", "smoothquant")) > 0.3
    apart = diagnose(x, [weight], parse_format("int8-channel"), parse_format("int8-tensor-static-sinks"))
    assert apart["error"] == found["remedies"]["sinks"] and found["sinks"] == pytest.approx(1 / 64)


def test_without_outliers_no_channel_is_to_blame() -> None:
    x, weight = layer(1.0)
    found = diagnose(x, [weight[:16], weight[16:]], parse_format("int8-channel"), parse_format("int8-token"))
    assert all(share < 0.2 for _, share in found["channels"])
    assert min(found["remedies"].values()) > 0.5 * found["error"]
    nothing = diagnose(torch.zeros(4, 128), [weight], parse_format("int8-channel"), parse_format("int8-token"))
    assert nothing["error"] == 0 and nothing["inputs"] == 0


def test_the_report_says_what_would_help(tmp_path: Path) -> None:
    saved(llama_with_outliers((3, 40), intermediate_size=192), tmp_path / "dense")
    out = run(tmp_path / "dense", tmp_path / "q", "W8A8", method="rtn")
    certificate = read_certificate(out)
    found = rounding.diagnosed(certificate)
    # q, k and v are looked at together, as are gate and up: four inputs a block.
    assert len(found) == 4 * 4 and found[0].error >= found[-1].error
    blamed = {channel for layer in found if "q_proj" in layer.name for channel, share in layer.channels if share > 0.1}
    assert blamed and blamed <= {3, 40}
    assert "SmoothQuant" in rounding.lead(certificate) and "Channels to blame" in rounding.layers(certificate)
    plain = run(tmp_path / "dense", tmp_path / "w", "W8A16", method="rtn")
    assert rounding.layers(read_certificate(plain)) == "" and rounding.lead(read_certificate(plain)) == ""


def test_damaged_entries_are_left_out(tmp_path: Path) -> None:
    raw = fake_certificate(blocks=2)
    good = {"error": 0.5, "inputs": 0.4, "channels": [[3, 0.9]], "remedies": {"rotate": 0.1}, "sinks": 0.015}
    damaged = ["?", {}, {"error": "x", "inputs": 1}, {**good, "channels": [[1], "a", ["<b>", 2]], "remedies": []}, good]
    for entry, value in zip(raw["layers"], damaged, strict=False):
        entry["rounding"] = value
    (tmp_path / "certificate.json").write_text(json.dumps(raw))
    found = rounding.diagnosed(read_certificate(tmp_path))
    assert [(len(each.channels), each.remedies) for each in found] == [(0, {}), (1, {"rotate": 0.1})]
    assert "What rounding the inputs costs" in write_report(tmp_path).read_text()
    assert "In 2 of 2 inputs some tokens (at most 1.5" in rounding.lead(read_certificate(tmp_path))
