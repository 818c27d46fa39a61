"""The certificate of a checkpoint: how it was made, what became of every tensor, what was measured."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.calibration import coverage
from fewbits.checkpoints.base import read_json
from fewbits.core.record import environment, now, versions, write_json
from fewbits.planner.plan import summary

if TYPE_CHECKING:
    from fewbits.pipeline.job import Job

NAME = "certificate.json"
_DISTRIBUTIONS = 6


def fingerprint_of(directory: Path) -> Any:
    """The fingerprint of the run that `directory` is the finished output of; None where it is none."""
    path = directory / NAME
    return read_json(path).get("fingerprint") if path.is_file() else None


def write(directory: Path, certificate: dict[str, Any]) -> None:
    write_json(directory / NAME, certificate)


def peak_rss_bytes() -> int:
    """The most memory this process has held, in bytes."""
    # macOS counts in bytes, Linux in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def build(
    job: Job,
    kind: str,
    layers: list[dict[str, Any]],
    tensors: list[dict[str, Any]],
    size: int,
    evaluations: list[dict[str, Any]],
    fingerprint: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """The certificate of a finished run; `size` is the bytes of tensor data written."""
    worst = sorted(layers, key=lambda layer: -layer["relative_error"])[:_DISTRIBUTIONS]
    distributions = [
        {"name": layer["name"], "relative_error": layer["relative_error"], **layer["distribution"]} for layer in worst
    ]
    bits = sum(layer["bits"] * layer["parameters"] for layer in layers)
    quantized = sum(layer["parameters"] for layer in layers)
    parameters = sum(_count(job, entry["name"]) for entry in tensors if entry["bytes"])
    config = job.source.config()
    record = environment()
    experts = coverage.report(layers, job.experts)
    fallbacks = [*job.notes, *sorted({f"{layer['name']}: {note}" for layer in layers for note in layer["notes"]})]
    if job.choice is not None and job.choice["fallback"]:
        fallbacks.append(job.choice["why"])
    if experts is not None and experts["few"]:
        fallbacks.append(coverage.sentence(experts))
    return {
        "fewbits": versions().get("fewbits", "unknown"),
        "created": now(),
        "command": record["command"],
        "environment": record,
        "fingerprint": fingerprint,
        "checkpoint_format": kind,
        "source": {
            "path": str(job.source.path),
            "identity": job.source.identity,
            "bytes": job.source.nbytes,
            "parameters": parameters,
            "dtype": str(job.source.dtype).removeprefix("torch."),
            "model_type": config.get("model_type"),
        },
        "scheme": {
            "name": job.scheme.name,
            "weights": job.scheme.weights.name if job.plan is None else ", ".join(job.plan.formats),
            "activations": job.scheme.activations and job.scheme.activations.name,
            **({} if job.act_range is None else {"act_range": job.act_range}),
            "ignore": list(job.ignore),
            "dtype": str(job.dtype).removeprefix("torch."),
            **({} if job.plan is None else {"plan": summary(job.plan)}),
        },
        "method": {**job.recipe.describe(), "sequential": job.sequential},
        **({} if job.choice is None else {"auto": job.choice}),
        "calibration": job.calibration and job.calibration.description,
        "layers": [{key: value for key, value in layer.items() if key != "distribution"} for layer in layers],
        "tensors": tensors,
        "distributions": distributions,
        "size": {
            "bytes": size,
            "source_bytes": job.source.nbytes,
            "source_bytes_16bit": 2 * parameters,
            "bits_per_weight": bits / quantized,
            "bits_per_weight_model": 8 * size / parameters,
        },
        "experts": experts,
        "fallbacks": fallbacks,
        "evaluations": evaluations,
        "samples": [],
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _count(job: Job, name: str) -> int:
    count = 1
    for size in job.source.info(name).shape:
        count *= size
    return count
