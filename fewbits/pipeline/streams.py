"""The streams of hidden states that run through the model together, one block at a time.

- *calibration*: the text the methods learn from, through the blocks quantized so far;
- *reference*: the same text through the original blocks, for the methods that compare the two;
- *original* and *quantized*: held-out text through the original blocks and through the quantized ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fewbits.calibration.collect import Ref
from fewbits.calibration.data import TokenSet
from fewbits.pipeline.block import Layer, solve_block
from fewbits.pipeline.job import Job
from fewbits.pipeline.journal import Streams
from fewbits.pipeline.rounding import quantized_activations
from fewbits.pipeline.shell import ModelShell, round_parameters

_BATCH_TOKENS = 2048


def batches(tokens: TokenSet | None) -> list[Tensor]:
    """Ids [B, T] of the windows of `tokens`, some thousand tokens at a time."""
    if tokens is None:
        return []
    size = max(1, _BATCH_TOKENS // tokens.ids.shape[1])
    return list(tokens.ids.split(size))


def embed(job: Job, shell: ModelShell) -> Streams:
    """What enters the first block."""
    streams: Streams = {}
    with shell.resident_outside(head=False):
        streams["original"] = shell.embed(batches(job.probe))
    # What will be stored rounded is rounded before the quantized model is run on it.
    with shell.resident_outside(head=False, round_to=job.dtype):
        streams["quantized"] = shell.embed(batches(job.probe))
        streams["calibration"] = shell.embed(batches(job.calibration))
        if job.probe is not None and job.scheme.activations is not None:
            shell.embed([job.probe.ids[:1]])  # blocks are run on one window too, to look at what rounding costs
    if job.recipe.statistics & {"cross", "reference"}:
        with shell.resident_outside(head=False):
            streams["reference"] = shell.embed(batches(job.calibration))
            for learner in job.recipe.learners:  # it takes as many sequences at a time as it likes
                assert job.calibration is not None
                ids = job.calibration.ids
                shell.embed([ids[: learner.sequences(*ids.shape)]])
    return streams


def solve_and_advance(
    job: Job, shell: ModelShell, index: int, refs: Sequence[Ref], streams: Streams
) -> tuple[list[Layer], dict[str, Tensor]]:
    """Quantizes block `index` and moves all streams past it, in place; its layers, and other tensors that changed."""
    prefix, block = shell.blocks[index]
    last = index + 1 == len(shell.blocks)

    def advanced(name: str) -> list[Tensor]:
        return [shell.forward(index, hidden).to(hidden.device) for hidden in streams[name]]

    with shell.resident(prefix, block):
        streams["original"] = advanced("original")
        reference = streams.get("reference", [])
        targets = advanced("reference") if reference else []
        weights = {id(ref.holder) for ref in refs}
        round_parameters((p for p in block.parameters() if id(p) not in weights), job.dtype)
        formats = {ref.name: job.weights(f"{prefix}.{ref.name}", ref.shape[1]) for ref in refs}
        layers, changed = solve_block(
            shell, index, refs, formats, job.recipe,
            streams["calibration"], reference, targets, sequential=job.sequential, experts=job.experts,
            activations=job.scheme.activations, act_range=job.act_range or "absmax", scale_dtype=job.dtype,
            sample=streams["quantized"][0][:1] if streams["quantized"] else None,
        )  # fmt: skip
        round_parameters((block.get_parameter(name) for name in changed), job.dtype)
        apart = None
        if job.recipe.keeps_outliers:
            apart = {layer.name: layer.outliers for layer in layers}
        inputs = {layer.name: layer.inputs for layer in layers}
        with quantized_activations(refs, job.scheme.activations, inputs, apart):
            if not last:
                streams["calibration"] = advanced("calibration")
                if targets:
                    streams["reference"] = targets
            streams["quantized"] = advanced("quantized")
    disk = shell.topology.disk_name if shell.topology else (lambda name: name)
    return layers, {f"{prefix}.{disk(f'.{name}.').strip('.')}": t.to(job.dtype) for name, t in changed.items()}
