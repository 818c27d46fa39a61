"""Certificates like those a real run writes, for tests of what reads them."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

KINDS = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
RECORD = {
    "date": "2026-11-24T10:11:12+00:00",
    "command": "fewbits quantize demo -o smollm2-w4 --scheme W4A16_ASYM --group-size 64",
    "cpu": "AMD EPYC 7B13",
    "cores": 2,
    "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
    "versions": {"python": "3.11.2", "fewbits": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
}
SAMPLES = [
    {
        "prompt": "What is the capital of France, and what is it known for?",
        "original": "The capital of France is Paris. It is a city renowned for its historical landmarks, "
        "culture, and the iconic Eiffel Tower.",
        "quantized": "The capital of France is Paris. It is a city known for its art, fashion and cuisine, "
        "and for the Eiffel Tower.",
    },
    {
        "prompt": "Explain in two sentences why the sky is blue.",
        "original": "The sky is blue because of Rayleigh scattering.\nShorter wavelengths scatter more.",
        "quantized": "The sky is blue because of Rayleigh scattering.\nShorter wavelengths scatter more.",
    },
]


def fake_layers(blocks: int, chance: random.Random) -> list[dict[str, Any]]:
    layers = []
    for block in range(blocks):
        for index, (kind, shape) in enumerate(KINDS.items()):
            rtn = 0.012 * (1 + 0.5 * math.sin(index)) * math.exp(0.02 * block + chance.gauss(0, 0.15))
            layers.append(
                {
                    "name": f"model.layers.{block}.{kind}",
                    "kind": kind.partition(".")[2],
                    "block": block,
                    "shape": list(shape),
                    "format": "int4-asym-g64",
                    "bits": 4.5 if kind != "mlp.down_proj" or block > 1 else 8.25,
                    "parameters": shape[0] * shape[1],
                    "relative_error": rtn * (0.55 + 0.1 * chance.random()),
                    "rtn_relative_error": rtn,
                    "error_of": "outputs",
                    "weight_sqnr_db": 20 + chance.gauss(0, 1),
                    "seconds": 0.4,
                    "notes": ["Cholesky failed at damping 0.01, retried at 0.1"] if block == 3 and index == 6 else [],
                }
            )
    return layers


def fake_distribution(name: str, chance: random.Random) -> dict[str, Any]:
    bins, bound = 101, 0.9
    edges = [-bound + 2 * bound * index / bins for index in range(bins + 1)]
    counts = [
        int(330000 * math.exp(-((edges[i] / 0.09) ** 2) / 2) + 9 * math.exp(-abs(edges[i]) * 6) * chance.random())
        for i in range(bins)
    ]
    return {
        "name": name,
        "edges": edges,
        "counts": counts,
        "levels": [0.024 * (level - 7) for level in range(16)],
        "relative_error": 0.0123,
    }


def fake_evaluation(what: str, kl: float, chance: random.Random) -> dict[str, Any]:
    edges = [0, 1, 2, 3, 4, 6, 7, 8, 10, 11, 13, 16, 19, 23, 27, 32, 64, 128, 256, 512]
    return {
        "what": what,
        "model": "smollm2-w4",
        "against": "demo",
        "method": "chunked: 16 windows of 512 tokens, no overlap, errors by window",
        "perplexity": {"mean": 10.94 * math.exp(kl * 0.9), "stderr": 0.61, "n": 8176},
        "reference_perplexity": {"mean": 10.94, "stderr": 0.58, "n": 8176},
        "kl": {"mean": kl, "stderr": kl * 0.04, "median": kl * 0.4, "p99": kl * 9, "n": 8192},
        "top1": {"mean": 1 - kl * 1.1, "stderr": 0.004, "n": 8192},
        "kl_by_position": [
            {
                "start": a,
                "end": b,
                "mean": kl * (1 + 1.5 / (1 + a)) * chance.uniform(0.9, 1.1),
                "stderr": kl * 0.1,
                "n": 16,
            }
            for a, b in itertools.pairwise(edges)
        ],
        "text": {
            "description": "built-in evaluation text: 17 topics of pydoc_data.topics",
            "sha256": "c40fb44f5c0472be1647ed4178188e38897b83aa5f539e4901ee28d2b7f5da29",
            "tokens": 8192,
            "sequence_length": 512,
        },
        "record": RECORD,
    }


def fake_certificate(blocks: int = 30) -> dict[str, Any]:
    chance = random.Random(0)
    layers = fake_layers(blocks, chance)
    worst = sorted(layers, key=lambda layer: -layer["relative_error"])[:6]
    return {
        "fewbits": "0.1.0",
        "created": "2026-11-24T10:14:15+00:00",
        "environment": RECORD,
        "command": RECORD["command"],
        "checkpoint_format": "compressed-tensors",
        "source": {
            "path": "demo",
            "identity": "5f1c6d2e9a" * 6 + "abcd",
            "bytes": 98362432,
            "parameters": 134515008,
            "dtype": "float32",
            "model_type": "llama",
        },
        "scheme": {
            "name": "W4A16_ASYM",
            "weights": "int4-asym-g64",
            "activations": None,
            "ignore": ["lm_head"],
        },
        "method": {"name": "gptq", "sequential": True, "block_size": 128, "damping": 0.01, "act_order": True},
        "calibration": {
            "description": "built-in calibration text: 61 topics of pydoc_data.topics",
            "sha256": "7a" * 32,
            "samples": 32,
            "sequence_length": 512,
            "seed": 0,
            "tokens": 16384,
        },
        "layers": layers,
        "tensors": [
            *({"name": layer["name"], "action": "quantized", "reason": "", "bytes": 90000} for layer in layers),
            {
                "name": "model.embed_tokens.weight",
                "action": "kept",
                "reason": "not a linear",
                "bytes": 56623104,
            },
            {
                "name": "lm_head.weight",
                "action": "tied",
                "reason": "shares model.embed_tokens.weight",
                "bytes": 0,
            },
        ],
        "distributions": [fake_distribution(layer["name"], chance) for layer in worst],
        "size": {
            "bytes": 116500000,
            "source_bytes": 98362432,
            "source_bytes_16bit": 269030016,
            "bits_per_weight": 4.5,
            "bits_per_weight_model": 6.93,
        },
        "fallbacks": ["model.layers.3.mlp.down_proj: Cholesky failed at damping 0.01, retried at 0.1"],
        "evaluations": [fake_evaluation("rtn", 0.214, chance), fake_evaluation("gptq", 0.118, chance)],
        "samples": SAMPLES,
        "seconds": 142.5,
        "peak_rss_bytes": 1_900_000_000,
    }


def write_fake(directory: Path, certificate: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    found = fake_certificate() if certificate is None else certificate
    (directory / "certificate.json").write_text(json.dumps(found), encoding="utf-8")
    return directory
