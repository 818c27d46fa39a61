"""Injected outliers change no logit, and make the inputs of the linears as much larger as they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_pipeline import run
from test_topology import CONFIGS, build
from tiny_runtime_models import saved, tiny_llama

from fewbits.algorithms.compose import compose
from fewbits.algorithms.inject import Inject
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput
from fewbits.models.skeleton import load_model


def never(module: str) -> bool:
    return False


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "olmo2"])
def test_the_function_stays_and_the_channels_grow(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = build(CONFIGS[name]).eval()
    saved(dense, tmp_path)
    source = open_source(tmp_path)
    done = Inject(factor=100.0, channels=3).rewrite(source, never)
    models = [load_model(found, device="cpu", dtype=torch.float32).eval() for found in (source, done.source)]
    seen: list[torch.Tensor] = []
    for model in models:
        norm = next(m for n, m in model.named_modules() if n.endswith("post_attention_layernorm"))
        norm.register_forward_hook(lambda module, args, y: seen.append(y))
    ids = torch.arange(12)[None] % dense.config.vocab_size
    with torch.no_grad():
        first, second = (model(ids).logits for model in models)
    assert float((first - second).norm() / first.norm()) < 1e-5
    ratio = (seen[1].abs().amax((0, 1)) / seen[0].abs().amax((0, 1))).round().long()
    assert sorted(ratio.tolist())[-3:] == [100, 100, 100] and ratio.tolist().count(1) == len(ratio) - 3


def test_it_goes_in_front_and_what_follows_takes_it_back(tmp_path: Path) -> None:
    assert compose("inject,rotate,gptq").names == ("inject", "rotate", "gptq")
    for options in ({"factor": 0.0}, {"channels": 0}):
        with pytest.raises(BadInput, match="a factor above 0"):
            compose("inject", options)
    saved(tiny_llama(intermediate_size=192), tmp_path / "dense")
    kl = {}
    for method in ("rtn", "inject", "inject,llm_int8", "inject,smoothquant", "inject,rotate"):
        options = {"inject.factor": 100.0, "inject.channels": 2} if "inject" in method else {}
        out = run(tmp_path / "dense", tmp_path / method, "W8A8", method=method, method_options=options)
        kl[method] = json.loads((out / "certificate.json").read_text())["evaluations"][0]["kl"]["mean"]
    assert kl["inject"] > 30 * kl["rtn"]
    for helped in ("inject,llm_int8", "inject,smoothquant", "inject,rotate"):
        assert kl[helped] < 0.1 * kl["inject"], kl
