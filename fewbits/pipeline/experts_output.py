"""gpt-oss's experts on their way out: from one tensor of the source, quantized one by one, to MXFP4's tensors or apart.

`--checkpoint-format mxfp4` is the layout of OpenAI's own checkpoints: experts alone are quantized, whatever `ignore`
says of the rest, and all experts of all blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fewbits.checkpoints.fused_experts import GPT_OSS, Fused, gpt_oss_parameters, is_gpt_oss_expert
from fewbits.checkpoints.mxfp4 import FORMAT, blocks
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats.mix import Weights
from fewbits.pipeline.job import Job
from fewbits.pipeline.output import Item

Modules = Mapping[str, tuple[tuple[int, int], Weights]]


def sources(job: Job, modules: Modules) -> set[str]:
    """The tensors of the source that are quantized. BadInput where one holds experts that are not, or unknown ones."""
    stored = set(job.source.names())
    absent = [name for name in modules if f"{name}.weight" not in stored]
    fused = gpt_oss_parameters(absent) if job.source.config().get("model_type") == GPT_OSS else []
    known = {module for each in fused if each.name in stored for module in each.modules}
    lost = sorted(set(absent) - known)
    if lost:
        raise Unsupported(
            f"{lost[0]}.weight is fused in the source file; fewbits writes experts apart: split the source first"
        )
    for each in fused:
        count = job.source.info(each.name).shape[0]
        if count != len(each.linears):
            raise BadInput(
                f"{each.name} holds {count} experts, and {len(each.linears)} are to be quantized: ignore all or none"
            )
    return {f"{name}.weight" for name in modules if name not in known} | {each.name for each in fused}


def check(job: Job, modules: Modules, quantized: set[str], beside: Sequence[str]) -> None:
    """Refuses, before any work, what gpt-oss's layout cannot say.

    beside: what the method adds to codes that other checkpoints, too, have no entry for.
    """
    if job.scheme.activations is not None or beside:
        raise Unsupported(
            f"gpt-oss's MXFP4 has no entry for {job.scheme.name} by {job.recipe.name}: choose --scheme mxfp4 and a "
            "method that adds nothing to the codes"
        )
    for name, (shape, format) in modules.items():
        if format.name != FORMAT or shape[1] % 32:
            raise Unsupported(
                f"{name}: {format.name} on {shape}: gpt-oss's experts are MXFP4 in blocks of 32: --scheme mxfp4"
            )
    dense = [name for name in job.source.names() if name not in quantized and is_parameter(name)]
    if dense:
        raise Unsupported(f"{dense[0]} stays dense: checkpoint format {FORMAT} has all experts quantized; ignore none")


def is_parameter(name: str) -> bool:
    """Whether `name` is a parameter of all experts of a block."""
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def chosen(job: Job, module: str) -> bool:
    """Whether the checkpoint format has a place for the codes of `module`."""
    return job.checkpoint_format != FORMAT or is_gpt_oss_expert(module)


def items(solved: Iterable[Item], modules: Modules) -> list[Item]:
    """MXFP4's tensors of the linears in `solved`, which the journal keeps one by one."""
    found = {item.name: item for item in solved}
    parameters = gpt_oss_parameters(modules)
    taken = {f"{module}.{part}" for module in modules for part in ("codes", "scale")}
    made = [item for name, item in found.items() if name not in taken]
    for each in parameters:
        rows, columns = modules[each.modules[0]][0]
        shape = (len(each.linears), rows * len(each.linears[0]), columns // 32)
        made += [
            Item(
                name=f"{each.name}_blocks",
                dtype=torch.uint8,
                shape=(*shape, 16),
                provider=partial(_blocks, each, found),
            ),
            Item(name=f"{each.name}_scales", dtype=torch.uint8, shape=shape, provider=partial(_scales, each, found)),
        ]
    return made


def _blocks(fused: Fused, found: dict[str, Item]) -> Tensor:
    return fused.join(lambda module: blocks(found[f"{module}.codes"].provider()))


def _scales(fused: Fused, found: dict[str, Item]) -> Tensor:
    return fused.join(lambda module: found[f"{module}.scale"].provider())
