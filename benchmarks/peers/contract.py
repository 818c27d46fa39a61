"""What a peer's script is given and what it gives back. Runs inside the peer's environment: torch, transformers and
safetensors, nothing of fewbits.

    python with_<peer>.py MODEL TOKENS OPTIONS OUT

MODEL is a directory with the dense model in float32, TOKENS a safetensors file with int64 "ids" [samples, length],
OPTIONS a JSON object (`bits`, `group_size`, and what else the peer takes), OUT a directory to write into:

    decoded.safetensors   every tensor the peer changed, as its own library decodes it, float32, under MODEL's names
    facts.json            versions, seconds, peak memory, stored bits by part, settings in words, notes

Bits count what the peer stores for the linears it quantized: codes, scales, zero points, indices. What a container
pads or repeats for its kernels' sake (int4 codes kept one a byte) is not held against it, and `notes` says so.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


@dataclasses.dataclass
class Job:
    """What is to be done, and the clock that runs while the peer quantizes."""

    model: Path
    ids: torch.Tensor
    options: dict[str, Any]
    out: Path
    seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)
    device: str = "cpu"  # where the peer computes
    _started: float = 0.0

    @property
    def bits(self) -> int:
        return int(self.options["bits"])

    @property
    def group_size(self) -> int:
        return int(self.options["group_size"])

    def accelerator(self) -> str:
        """The device for a peer that can use a GPU, "cuda" where there is one; goes on record."""
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        return self.device

    def start(self) -> None:
        self._started = time.monotonic()

    def __enter__(self) -> Job:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._started


def job() -> Job:
    """The job of this process's command line."""
    model, tokens, options, out = sys.argv[1:5]
    torch.manual_seed(0)
    return Job(model=Path(model), ids=load_file(tokens)["ids"], options=json.loads(options), out=Path(out))


def load(job: Job, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The dense model through transformers, in eval mode; the clock starts when it is there."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval().to(device)
    job.start()
    return model


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears of the blocks by name; embeddings and head stay as they are for everyone."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if ".layers." in name}


def group_parts(
    shapes: list[tuple[int, int]], bits: float, group_size: int, scale_bits: float, zero_bits: float = 0
) -> dict[str, float]:
    """Stored bits by part for [out, in] matrices whose rows are cut into groups; a row's last group may be short."""
    weights = sum(rows * columns for rows, columns in shapes)
    groups = sum(rows * math.ceil(columns / group_size) for rows, columns in shapes)
    parts = {"codes": bits * weights, "scales": scale_bits * groups, "zero points": zero_bits * groups}
    return {name: count for name, count in parts.items() if count}


def finish(
    job: Job,
    decoded: dict[str, torch.Tensor],
    parts: dict[str, float],
    packages: list[str],
    settings: str,
    weights: int | None = None,
) -> None:
    """Writes the result. parts: stored bits by part over all `weights` (default: the 2-D tensors of `decoded`)."""
    hand_back(job, decoded, "decoded.safetensors")
    weights = weights or sum(tensor.numel() for tensor in decoded.values() if tensor.dim() == 2)
    write_facts(job, parts, packages, settings, weights)


def hand_back(job: Job, tensors: dict[str, torch.Tensor], name: str) -> None:
    """Writes `tensors` as float32 into the file `name` of OUT."""
    job.out.mkdir(parents=True, exist_ok=True)
    plain = {key: tensor.detach().float().cpu().contiguous() for key, tensor in tensors.items()}
    save_file(plain, job.out / name)


def write_facts(
    job: Job, parts: dict[str, float], packages: list[str], settings: str, weights: int, **more: Any
) -> None:
    """facts.json; arguments as for `finish`, `more` facts as they are."""
    versions = {name: importlib.metadata.version(name) for name in (*packages, "torch")}
    facts = {
        "versions": {"python": platform.python_version(), **versions},
        "device": torch.cuda.get_device_name() if job.device == "cuda" else "cpu",
        "seconds": round(job.seconds, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "weights": weights,
        "stored_bits": parts,
        "bits_per_weight": sum(parts.values()) / weights,
        "settings": settings,
        "notes": job.notes,
        **more,
    }
    (job.out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
