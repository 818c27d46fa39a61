"""Checks that read weights: scales, values against the source, logits, and what the runtime itself computes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fewbits.checkpoints.base import Source, by_library
from fewbits.checkpoints.codecs import Stored, StoredMix
from fewbits.checkpoints.decoded import DecodedSource
from fewbits.checkpoints.gguf_source import GGUFSource
from fewbits.core.errors import BadInput
from fewbits.evaluation.verification import by_llama_cpp, by_mlx
from fewbits.evaluation.verification.checks import Check, failed, not_checked, ok, some, warning
from fewbits.evaluation.verification.model import Subject
from fewbits.evaluation.verification.runtimes import DENSE, Runtime
from fewbits.metrics.divergence import kl, top1_agreement
from fewbits.metrics.error import relative_error
from fewbits.models.skeleton import load_block, load_model, skeleton

MAX_LOGITS_BYTES = 6 << 30  # of a model held dense, twice, for the logits
TOKENS = 24
# Squared error over squared values. A layout read wrongly (nibbles swapped, zero points off by one) gives 1 or 2.
WRONG, COARSE = 0.7, 0.2
FAR = 3.0  # nats per token: another model
PATIENCE = 600.0  # seconds for a runtime to load a file and run it


def check_scales(subject: Subject) -> Check:
    """Every quantized module decodes, its scales are numbers, and no block is lost to a scale of zero."""
    entries = subject.modules.entries
    zeros, lost = [], []
    for module in entries:
        found = subject.read(module)  # BadInput, by name, where scales are NaN, infinite or overflow
        parts = found.parts() if isinstance(found, StoredMix) else [found] if isinstance(found, Stored) else []
        for part in parts:
            scale, _ = part.format.unsettle(part.shape, part.state)
            empty = int((scale == 0).sum())
            if empty == scale.numel():
                lost.append(module)
            elif empty:
                zeros.append(f"{module} ({empty})")
    of_modules = {part for entry in entries.values() for part in entry.parts}
    for name in subject.source.names():
        if subject.source.info(name).dtype.is_floating_point and name not in of_modules:
            value = subject.source.tensor(name)
            if value.dtype.itemsize > 1 and not bool(torch.isfinite(value).all()):
                return failed("scales", f"{name} holds NaN or infinite values", "repair the source and quantize again")
    if lost:
        return failed("scales", f"all scales are zero in {some(lost)}", "these layers compute nothing: quantize again")
    if zeros:
        return warning("scales", f"blocks with scale 0: {some(zeros)}", "right for pruned weights, and only for them")
    if not entries:
        return not_checked("scales", "nothing is quantized")
    return ok("scales", f"{len(entries)} modules decode to finite values")


def check_fused(subject: Subject, runtime: Runtime) -> Check:
    """Parts of a fused linear have one format, one order of inputs, and one outer scale."""
    name = "fused shards"
    groups = subject.fused()
    if not subject.modules.entries or not groups:
        return not_checked(name, "nothing is quantized" if groups else "no linears of the names that are fused")
    differing, scales = [], []
    for group in groups:
        parts = [subject.stored(module) for module in group]
        if len({_kind(part) for part in parts}) > 1:
            differing.append(
                " | ".join(f"{m.rpartition('.')[2]} {_kind(p)}" for m, p in zip(group, parts, strict=True))
            )
            continue
        whole = [part for part in parts if part is not None]
        if len(whole) == len(parts) and not _same(whole):
            scales.append(group[0].rpartition(".")[0])
    if differing and runtime.fuses:
        return failed(name, f"parts differ: {some(differing)}", "quantize q, k, v alike, and gate, up alike")
    if scales and runtime.fuses:
        return warning(
            name, f"outer scales or orders differ in {some(scales)}: {runtime.name} takes the largest for all parts",
            "give fused parts one global scale",
        )  # fmt: skip
    if differing or scales:
        return ok(name, f"parts differ in {len(differing) + len(scales)} places, which {runtime.name} does not mind")
    return ok(name, f"{len(groups)} groups agree")


def _kind(part: Stored | None) -> str:
    return "dense" if part is None else f"{part.format.name}{'+order' if part.order is not None else ''}"


def _same(parts: list[Stored]) -> bool:
    shared = ("scale_outer", "scale_divisor")
    for name in shared:
        found = [part.state[name] for part in parts if name in part.state]
        if any(not torch.equal(value, found[0]) for value in found):
            return False
    if parts[0].format.scaling.block == "tensor" and any(
        not torch.equal(part.state["scale"], parts[0].state["scale"]) for part in parts
    ):
        return False
    first = parts[0].order
    for part in parts:
        if (part.order is None) != (first is None):
            return False
        if part.order is not None and first is not None and not torch.equal(part.order, first):
            return False
    return True


def check_weights(subject: Subject, reference: Source) -> Check:
    """Decoded weights beside those of the original."""
    name = "decoded weights"
    theirs = {*reference.names(), *reference.tied()}
    modules = list(subject.modules.entries or subject.matrices)
    errors: dict[str, float] = {}
    for module in modules:
        tensor = f"{module}.weight"
        if tensor in theirs:
            original = reference.tensor(tensor).float()
            weight = subject.weight(module)
            if weight.shape != original.shape:
                return failed(
                    name, f"{module} is {list(weight.shape)}, the source's {list(original.shape)}", "another model"
                )
            errors[module] = relative_error(original, weight)
    if not errors:
        return not_checked(name, "the source has no tensor of these names")
    worst = max(errors, key=errors.__getitem__)
    told = f"{len(errors)} layers, worst {worst}: {100 * errors[worst]:.2g} % of its energy"
    wrong = [module for module, error in errors.items() if error > WRONG]
    if len(wrong) * 2 > len(errors):
        return failed(
            name, f"{told}; {len(wrong)} are unlike the source's",
            "another model, a rotated one (compare logits instead), or a layout read wrongly",
        )  # fmt: skip
    if wrong:
        return failed(name, f"{told}: {some(wrong)} are unlike the source's", "quantize those layers again")
    if errors[worst] > COARSE:
        return warning(name, told, "few bits, or a scale that one outlier sets: see `fewbits inspect`")
    return ok(name, told)


def prompt(subject: Subject) -> Tensor:
    """A few tokens that any tokenizer makes."""
    ids = list(
        subject.source.load_tokenizer()("The quick brown fox jumps over the lazy dog, and then it sleeps.").input_ids
    )
    return torch.tensor([ids[:TOKENS]])


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return found


def decoded_model(subject: Subject) -> nn.Module:
    """The model of the decoded weights, float32."""
    model = skeleton(subject.config)
    load_block(model, "", DecodedSource(subject.modules), dtype=torch.float32, topology=subject.topology)
    return model


def too_large(subject: Subject) -> str | None:
    count = sum(parameter.numel() for parameter in subject.skeleton.parameters())
    return f"{4 * count / 2**30:.0f} GiB in float32" if 4 * count > MAX_LOGITS_BYTES else None


def check_logits(subject: Subject, ours: Tensor, ids: Tensor, reference: Source) -> Check:
    theirs = logits(load_model(reference, dtype=torch.float32), ids)
    if theirs.shape != ours.shape:
        return failed("logits", f"{list(ours.shape)} beside the source's {list(theirs.shape)}", "another vocabulary")
    far, same = float(kl(theirs, ours).mean()), float(top1_agreement(theirs, ours).float().mean())
    told = (
        f"KL {far:.4f} nats per token to the source, {100 * same:.0f} % of top tokens the same ({len(ids[0])} tokens)"
    )
    if not far < FAR:
        return failed("logits", told, "another model, or broken: compare layer by layer")
    return ok("logits", told) if same >= 0.5 else warning("logits", told, "few bits: measure with `fewbits eval`")


def check_runtime(subject: Subject, runtime: Runtime, ours: Tensor | None, ids: Tensor) -> Check:
    """The same tokens through the runtime itself, where it is installed."""
    name = f"runs in {runtime.name}"
    packages = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "xllamacpp", "mlx": "mlx_lm"}
    if importlib.util.find_spec(packages[runtime.name]) is None:
        return not_checked(name, f"{packages[runtime.name]} is not installed here")
    if runtime.name == "vllm":
        return not_checked(name, f"fewbits does not run models through {runtime.name}; load it there once")
    needed = runtime.formats[subject.format]
    if needed and importlib.util.find_spec(needed.replace("-", "_")) is None:
        return not_checked(name, f"{runtime.name} needs the package {needed} for {subject.format}")
    if ours is None:
        return not_checked(name, "the model is too large to be held twice")
    theirs = RUN[runtime.name](subject, ids)
    if not bool(theirs.isfinite().all()):
        return failed(name, "logits are NaN or infinite", "see the other checks")
    far = float(kl(ours, theirs).mean())
    told = f"KL {far:.2g} nats per token to what fewbits decodes"
    if far > 0.1 and subject.format != DENSE:
        return failed(name, told, "the two read the file differently: please report it")
    return ok(name, told)


def _by_transformers(subject: Subject, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model: nn.Module = by_library(
        "transformers does not load it",
        lambda: AutoModelForCausalLM.from_pretrained(
            subject.source.path, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ),
    )
    return logits(model.eval(), ids)


def _by_llama_cpp(subject: Subject, ids: Tensor) -> Tensor:
    """Logits of llama.cpp, which rounds inputs to 8 bits."""
    assert isinstance(subject.source, GGUFSource)
    return _by_program("llama.cpp", by_llama_cpp.__file__, subject.source.file.path, ids)


def _by_mlx(subject: Subject, ids: Tensor) -> Tensor:
    return _by_program("mlx-lm", by_mlx.__file__, Path(subject.source.path), ids)


def _by_program(runtime: str, program: str, path: Path, ids: Tensor) -> Tensor:
    """Logits that a program of its own computes, since a broken file may end it."""
    question = {"path": str(path.resolve()), "ids": ids.tolist(), "logits": True}
    try:
        done = subprocess.run(
            [sys.executable, "-P", program], input=json.dumps(question), capture_output=True, text=True,
            timeout=PATIENCE, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"{runtime} has not run it within {PATIENCE:.0f} s") from error
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"it ended with code {done.returncode}"]
        raise BadInput(f"{runtime} does not run it: {reason[0][:500]}")
    return torch.tensor(json.loads(done.stdout)["logits"][0])


RUN: dict[str, Callable[[Subject, Tensor], Tensor]] = {
    "transformers": _by_transformers,
    "llama.cpp": _by_llama_cpp,
    "mlx": _by_mlx,
}
