"""What a peer gives back that runs the model itself, as one must that rounds inputs too. Beside contract.py.

    python w8a8_<peer>.py MODEL TOKENS OPTIONS OUT TEXT

TEXT is a safetensors file with int64 "ids" [windows, length]. The quantized model reads them in float32, one window at
a time and without a cache, up to its head. What the head would read is handed back:

    states.safetensors   "hidden" float32 [windows, length, width]; "head" [vocabulary, width] if a method changed it
    facts.json           as in contract.py, the seconds the windows took, and whether inputs were rounded

Nobody quantizes the head, so these are the logits, exactly, in a hundredth of their size (576 numbers a token and not
49152). The judge multiplies.

**Are inputs rounded?** A library may fall back to its weights alone where it has no kernel, and say nothing. A linear
whose weights alone are quantized is still linear, f(a + b) = f(a) + f(b) to the rounding of float32; one that rounds
its inputs is not. That is measured on every linear of the blocks; the facts say how many round.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import torch
from contract import Job, group_parts, hand_back, write_facts
from safetensors.torch import load_file
from torch import nn

LINEAR = 1e-4  # relative: float32 sums err by 1e-6, inputs of 8 bits by some 1e-2


def row_parts(weights: list[nn.Module], scale_bits: int = 32) -> dict[str, float]:
    """Stored bits by part for linears in 8 bits with one scale a row; before they are quantized."""
    return group_parts([tuple(module.weight.shape) for module in weights], 8, 1 << 30, scale_bits)


def nonlinearity(layer: nn.Module, width: int) -> float:
    """|f(a + b) - f(a) - f(b)| / |f(a + b)| of a layer without bias that reads `width` channels.

    Infinite where f(a + b) is zero: a fixed scale for large inputs rounds these away.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1, 64, width, generator=generator)
    with torch.inference_mode():
        both, parts = layer(a + b).float(), layer(a).float() + layer(b).float()
    return float((both - parts).norm() / both.norm()) if both.any() else math.inf


def finish_running(job: Job, model: Any, parts: dict[str, float], packages: list[str], settings: str) -> None:
    """Runs `model` over TEXT and writes the result. parts: stored bits by part; settings: in words."""
    model.eval()
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise TypeError(f"the head became a {type(head).__name__}; it stays as it is for everyone")
    ids = load_file(sys.argv[5])["ids"]
    started = time.monotonic()
    with torch.inference_mode():
        states = [model.model(input_ids=window[None], use_cache=False).last_hidden_state[0].float() for window in ids]
    seconds = time.monotonic() - started
    original = load_file(job.model / "model.safetensors")
    blocks = {name: tensor for name, tensor in original.items() if ".layers." in name and tensor.dim() == 2}
    kept = original.get("lm_head.weight", original["model.embed_tokens.weight"])
    handed = {"hidden": torch.stack(states)}
    if not torch.equal(kept, head.weight.float()):
        handed["head"] = head.weight
    errors = [
        nonlinearity(model.get_submodule(name.removesuffix(".weight")), tensor.shape[1])
        for name, tensor in blocks.items()
    ]
    weights = sum(tensor.numel() for tensor in blocks.values())
    hand_back(job, handed, "states.safetensors")
    write_facts(
        job, parts, packages, settings, weights,
        run_seconds=round(seconds, 1), threads=torch.get_num_threads(),
        rounding={"linears": sum(error > LINEAR for error in errors), "of": len(errors)},
    )  # fmt: skip
