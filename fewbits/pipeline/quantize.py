"""`fewbits quantize`: plan, calibrate, quantize, measure, write; one block in memory at a time.

Calibration text and held-out text run through the blocks together (streams.py). After the last block, held-out text
through the original blocks and through the quantized ones gives logits, so perplexity, KL and top-1 agreement of the
very model being written are known without ever holding a whole model. They go into the certificate.

A killed run continues where it was (journal.py). The output directory appears by one rename at the end.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.algorithms.base import Residual
from fewbits.algorithms.compose import compose
from fewbits.calibration.collect import Ref
from fewbits.calibration.data import TextSpec, TokenSet
from fewbits.checkpoints import compressed_tensors, mxfp4, native
from fewbits.core.errors import BadInput, FewbitsError, Unsupported
from fewbits.core.progress import OnProgress, Progress
from fewbits.core.units import bytes_text
from fewbits.formats.mix import Mix, Weights
from fewbits.formats.outliers import OutlierSpec
from fewbits.models.walk import linears
from fewbits.pipeline import certificate, experts_output, gguf_output, output
from fewbits.pipeline.auto import choose
from fewbits.pipeline.block import Layer
from fewbits.pipeline.job import Job, check_ignored, ignored, prepare
from fewbits.pipeline.journal import Journal, check_output
from fewbits.pipeline.measure import measure
from fewbits.pipeline.planning import plan as make_plan
from fewbits.pipeline.shell import ModelShell, check_vocabulary
from fewbits.pipeline.streams import batches, embed, solve_and_advance
from fewbits.planner import auto
from fewbits.planner.plan import Plan, read_plan


def quantize(
    model: str | Path,
    scheme: str | None = None,
    *,
    out: str | Path,
    bits: float | None = None,
    within: bool = False,
    plan: Plan | str | Path | None = None,
    measurements: str | Path | None = None,
    group_size: int | None = None,
    method: str | None = "gptq",
    minutes: float | None = None,
    method_options: dict[str, Any] | None = None,
    act_range: str | None = None,
    calibration: TextSpec | TokenSet = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    ignore: Sequence[str] = ("lm_head",),
    dtype: str | None = None,
    device: str | None = None,
    checkpoint_format: str = "auto",
    eval_samples: int | TokenSet = 8,
    sequential: bool = False,
    experts: str = "borrow",
    restart: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """Quantizes `model` (directory, .gguf, hub id or "demo") to `scheme` and writes a checkpoint to `out`.

    scheme: an ecosystem name (W4A16, the default, FP8_DYNAMIC) or a format name (nf4-g64); `group_size` resizes its
    groups. In its place bits: an average that a plan is made for first (planning.py), its measurements kept in the file
    `measurements` (OUT.measurements.json) for other budgets; `within`: bits vary inside linears too. Or plan: one made
    before (file, or `planning.plan`'s).
    method: see ``fewbits list methods``; `method_options` are its fields (damping, act_order, ...). "auto" tries some
    compositions and takes the best that is done in `minutes` (6), trials included (planner/auto.py).
    act_range: how the ranges of static activations are estimated (algorithms/input_ranges.py); absmax if None.
    calibration: text file(s) or a list of strings, default the built-in text; cut into `samples` windows of
    `sequence_length` tokens, chosen by `seed`. Or the windows themselves, which settles those three.
    ignore: module names to leave as they are; "re:" starts a regular expression, * ? are wildcards.
    dtype: what is not quantized is stored as this (default: the model's own).
    experts: for experts that saw fewer calibration tokens than they have inputs: "borrow" the statistics of all
    experts of the block, or round them "data-free".
    eval_samples: windows of held-out built-in text to measure the loss on, or the windows themselves; 0 to leave it
    unmeasured.
    restart: discards what an unfinished run for `out` has done; a finished `out` is never replaced.
    Raises BadInput before any work for arguments that make no sense, FewbitsError for a run that fails; an
    interrupted or failed run leaves `out` untouched and continues when repeated.
    """
    started = time.time()
    report = on_progress or (lambda _: None)
    if sum(given is not None for given in (scheme, bits, plan)) > 1:
        raise BadInput("of scheme, bits and plan give one: each of them decides the formats of the layers")
    if measurements is not None and bits is None:
        raise BadInput(f"measurements '{measurements}' are used where a plan is made: give bits too, or leave them out")
    if within and bits is None:
        raise BadInput("within: bits vary within a linear where a plan is made: give bits too, or plan --within first")
    if plan is not None and group_size is not None:
        raise BadInput(f"group size {group_size} given, but the plan decides the formats: leave it out")
    if bits is not None:
        plan = make_plan(
            model, bits, measurements=measurements or Path(f"{out}.measurements.json"), group_size=group_size,
            calibration=calibration, samples=samples, sequence_length=sequence_length, seed=seed, ignore=ignore,
            dtype=dtype, device=device, on_progress=report, residual=_residual(method, method_options),
            within=within,
        )  # fmt: skip
    elif plan is not None and not isinstance(plan, Plan):
        plan = read_plan(Path(plan))
    job = prepare(
        Path(out), model, "W4A16" if scheme is None else scheme, group_size, "rtn" if method is None else method,
        method_options or {}, calibration, samples, sequence_length, seed, tuple(ignore), dtype, device,
        checkpoint_format, eval_samples, sequential, experts, plan, minutes, act_range,
    )  # fmt: skip
    journal = Journal(job.out, job.fingerprint())
    before = certificate.fingerprint_of(job.out)
    if before == journal.fingerprint:
        journal.discard()  # what a run that was killed after its last rename left
        report(Progress("done", 1, 1, f"{job.out} is already complete"))
        return job.out
    check_output(job.out, before, journal.fingerprint)
    with journal.open(restart=restart):
        try:
            _run(job, journal, report, started)
        except BadInput:
            # The input itself is at fault: nothing here could be continued.
            journal.discard()
            raise
        except OSError as error:
            raise FewbitsError(
                f"{job.out}: {error.strerror or error}; finished blocks are kept, repeat the command to continue"
            ) from error
    return job.out


def _residual(method: str | None, options: dict[str, Any] | None) -> Residual | None:
    """What the method adds to the bits of a plan's formats; `auto` adds nothing."""
    return None if method in (None, auto.NAME) else compose(method, options).residual


def _run(job: Job, journal: Journal, report: OnProgress, started: float) -> None:
    # What is computed: float32 on a CPU and for sources that hold float32; else the model's own dtype.
    first = job.source.info(next(name for name in job.source.names() if name.endswith(".weight")))
    # A rewritten weight is no number of that dtype: the original must be computed more finely.
    compute = torch.float32 if job.device.type == "cpu" or job.recipe.rewrites else first.dtype
    shell = ModelShell(job.source, job.device, compute)
    check_ignored(job.ignore, shell.layers())
    shell.transform_inputs(job.input_hadamard)
    chosen = [_chosen(shell, index, job) for index in range(len(shell.blocks))]
    if not any(chosen):
        raise _nothing(shell, job)
    if job.plan is not None:
        names = [f"{prefix}.{ref.name}" for (prefix, _), refs in zip(shell.blocks, chosen, strict=True) for ref in refs]
        job.plan.check(job.source.identity, names)
    modules = _modules(job, shell, chosen)
    quantized = experts_output.sources(job, modules)
    kind = _checkpoint_kind(job, modules, quantized)
    for tokens in (job.calibration, job.probe):
        if tokens is not None:
            check_vocabulary(tokens.ids, shell.model.config)
    _check_space(job)

    if job.question is not None:
        choice = journal.choice()
        if choice is None:
            choice = choose(job, shell, chosen, journal, time.time() - started, report)
            journal.choose(choice)
        job = job.answered(choice)
        report(Progress("choose", 1, 1, choice["why"]))
    total = len(shell.blocks)
    done = journal.finished()
    report(Progress("quantize", done, total, f"resumed after block {done}" if done else "embedding the text"))
    streams = embed(job, shell)
    if done:
        streams |= journal.streams(done - 1)  # a journal does not say that a stream is empty
    for index in range(done, total):
        layers, changed = solve_and_advance(job, shell, index, chosen[index], streams)
        tensors = {name: tensor for layer in layers for name, tensor in _encoded(layer, job, kind).items()}
        tensors.update(changed)
        records = [layer.record for layer in layers]
        journal.write(index, tensors, records, streams)
        report(Progress("quantize", index + 1, total, _note(records)))

    evaluations = []
    if job.probe is not None:
        report(Progress("measure", 0, 1, "held-out text"))
        pairs = shell.logit_pairs(batches(job.probe), streams["original"], streams["quantized"], job.dtype)
        evaluations.append(
            measure(job.recipe.name, job.out.name, job.source.path, job.probe, pairs, compute, job.device)
        )
    report(Progress("write", 0, 1, str(job.out)))
    _assemble(job, journal, shell, kind, modules, quantized, evaluations, started)
    journal.publish()
    report(Progress("done", 1, 1, str(job.out)))


def _chosen(shell: ModelShell, index: int, job: Job) -> list[Ref]:
    prefix, block = shell.blocks[index]
    return [
        ref
        for ref in linears(block, shell.topology)
        if not ignored(f"{prefix}.{ref.name}", job.ignore) and experts_output.chosen(job, f"{prefix}.{ref.disk_name}")
    ]


def _nothing(shell: ModelShell, job: Job) -> BadInput:
    """Why no linear was found to quantize."""
    for prefix, block in shell.blocks:
        for name, module in block.named_modules():
            if type(module).__name__ == "Conv1D":
                return Unsupported(
                    f"{prefix}.{name} is a Conv1D, whose weight is stored [in, out]; fewbits quantizes nn.Linear and "
                    "fused experts: choose a model of a family that is made of those"
                )
    return BadInput(f"nothing to quantize: every linear matches an ignore pattern ({', '.join(job.ignore)})")


def _modules(job: Job, shell: ModelShell, chosen: list[list[Ref]]) -> dict[str, tuple[tuple[int, int], Weights]]:
    """Name in the checkpoint -> (shape, format) of every linear that is quantized."""
    modules = {}
    for (prefix, _), refs in zip(shell.blocks, chosen, strict=True):
        for ref in refs:
            format = job.weights(f"{prefix}.{ref.name}", ref.shape[1])
            if reason := _too_narrow(format, ref.shape[1]):
                raise BadInput(
                    f"{prefix}.{ref.name}: {reason}; choose a smaller --group-size, another format, or ignore the layer"
                )
            modules[f"{prefix}.{ref.disk_name}"] = ref.shape, format
    return modules


def _too_narrow(format: Weights, columns: int) -> str | None:
    """Why a linear of so many inputs is too narrow for `format`, or None."""
    if isinstance(format, Mix):
        return format.why_not(columns)
    size = format.scaling.group_size if format.scaling.block == "group" else None
    return f"group size {size} is larger than its input dimension {columns}" if size and size > columns else None


def _checkpoint_kind(job: Job, modules: dict[str, tuple[tuple[int, int], Weights]], quantized: set[str]) -> str:
    said = {reason: format.name for shape, format in modules.values() if (reason := _refused(format, job, shape))}
    coded = len(said)  # the reasons so far are of formats, the ones to come of what goes beside them
    if job.input_hadamard:
        said["it has no entry for inputs that are transformed as the model runs"] = job.recipe.name
    if any(job.residual(shape) for shape, _ in modules.values()):
        said["it has no entry for a residual beside the codes"] = job.recipe.name
    if job.recipe.keeps_outliers:
        said["it has no entry for columns in 16 bits"] = job.recipe.name
    if job.checkpoint_format == gguf_output.KIND:
        gguf_output.check(job, modules, list(said)[coded:])
        return gguf_output.KIND
    if job.checkpoint_format == mxfp4.FORMAT:
        experts_output.check(job, modules, quantized, list(said)[coded:])
        return mxfp4.FORMAT
    if any(map(experts_output.is_parameter, quantized)):
        said["it names linears, and these are none"] = "experts that share a tensor"
    plain = [format for _, format in modules.values() if not isinstance(format, Mix)]
    mixed = compressed_tensors.refuses_mix(plain)
    if job.checkpoint_format == "native" or ((said or mixed) and job.checkpoint_format == "auto"):
        return native.QUANT_METHOD
    if said:
        reason = sorted(said)[0]
        raise Unsupported(
            f"compressed-tensors cannot say {said[reason]} for this model: {reason}; "
            "use the native checkpoint format, or another group size or method"
        )
    return compressed_tensors.QUANT_METHOD


def _refused(format: Weights, job: Job, shape: tuple[int, int]) -> str | None:
    """Why compressed-tensors cannot say `format` on `shape`, or None."""
    if isinstance(format, Mix):
        return "it has one format for all input channels of a linear"
    return compressed_tensors.refuses(format, job.scheme.activations, shape)


def _check_space(job: Job) -> None:
    """Refuses early what would run out of disk: codes twice (journal and output) and two states."""
    config = job.source.config()
    width = int(config.get("hidden_size") or 0)
    tokens = sum(t.tokens * n for t, n in ((job.calibration, 1), (job.probe, 2)) if t is not None)
    needed = 2 * job.source.nbytes + 2 * 4 * tokens * width
    parent = next(folder for folder in [job.out.parent, *job.out.parents] if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise FewbitsError(
            f"{parent}: {bytes_text(free)} free, up to {bytes_text(needed)} needed; free space or choose another disk"
        )


def _encoded(layer: Layer, job: Job, kind: str) -> dict[str, Tensor]:
    if kind == compressed_tensors.QUANT_METHOD:
        tensors = compressed_tensors.encode(layer.weight, job.scheme.activations, layer.inputs)
    else:
        beside = layer.residual or layer.outliers
        tensors = layer.weight.to_state() | (beside.to_state() if beside else {}) | layer.inputs
    return {f"{layer.disk_name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def _note(records: Sequence[dict[str, Any]]) -> str:
    if not records:
        return "kept"
    worst = max(records, key=lambda record: record["relative_error"])
    return f"worst {worst['kind']} error {100 * worst['relative_error']:.2g} %"


def _assemble(
    job: Job,
    journal: Journal,
    shell: ModelShell,
    kind: str,
    modules: dict[str, tuple[tuple[int, int], Weights]],
    quantized: set[str],
    evaluations: list[dict[str, Any]],
    started: float,
) -> None:
    directory = journal.final
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir()
    present = set(job.source.names())
    tied = {name for name in present if name == "lm_head.weight" and job.source.config().get("tie_word_embeddings")}
    dropped = {name: "computed from config.json" for name in present if name.endswith("rotary_emb.inv_freq")}
    blocks = [journal.block_path(index) for index in range(len(shell.blocks))]
    solved = output.block_items(blocks)
    kept, account = output.kept_items(
        job.source,
        quantized,
        tied - {"model.embed_tokens.weight"},
        dropped,
        {item.name for item in solved},
        job.dtype,
    )
    if kind == mxfp4.FORMAT:
        solved = experts_output.items(solved, modules)
    items = [*kept, *solved]
    if kind == gguf_output.KIND:
        size = gguf_output.write(directory, job, items, modules)
        _certify(job, journal, kind, account, size, evaluations, started)
        return
    size = output.write_shards(directory, items)
    if kind == compressed_tensors.QUANT_METHOD:
        ignore = _linear_names(shell) - set(modules)
        formats = {name: format for name, (_, format) in modules.items()}
        config = compressed_tensors.quantization_config(formats, job.scheme.activations, ignore)
    elif kind == mxfp4.FORMAT:
        config = mxfp4.CODEC.quantization({}, [])["quantization_config"]
    else:
        outliers = _outliers(shell, [record for index in range(len(blocks)) for record in journal.records(index)])
        config = native.quantization_config(
            {
                name: native.module_entry(
                    format,
                    job.scheme.activations,
                    shape,
                    job.input_hadamard.get(name),
                    job.residual(shape),
                    outliers.get(name),
                )
                for name, (shape, format) in modules.items()
            }
        )
    output.write_config(directory, job.source, job.dtype, config)
    output.write_companions(directory, job.source)
    _certify(job, journal, kind, account, size, evaluations, started)


def _certify(
    job: Job,
    journal: Journal,
    kind: str,
    account: list[dict[str, Any]],
    size: int,
    evaluations: list[dict[str, Any]],
    started: float,
) -> None:
    found = certificate.build(
        job, kind, [record for index in range(journal.finished()) for record in journal.records(index)],
        account, size, evaluations, journal.fingerprint, time.time() - started,
    )  # fmt: skip
    certificate.write(journal.final, found)
    output.write_card(journal.final, found)


def _outliers(shell: ModelShell, records: Sequence[dict[str, Any]]) -> dict[str, OutlierSpec]:
    """Name in the checkpoint -> the columns in 16 bits of every linear that has some."""
    found = {record["name"]: record for record in records if "outliers" in record}
    return {
        f"{prefix}.{ref.disk_name}": OutlierSpec.read_entry(found[name]["outliers"], ref.shape[1])
        for prefix, block in shell.blocks
        for ref in linears(block, shell.topology)
        if (name := f"{prefix}.{ref.name}") in found
    }


def _linear_names(shell: ModelShell) -> set[str]:
    """Every linear of the model by its name, for the ignore list of the config."""
    names = {name for name, module in shell.model.named_modules() if isinstance(module, torch.nn.Linear)}
    experts = {f"{prefix}.{ref.disk_name}" for prefix, block in shell.blocks for ref in linears(block, shell.topology)}
    return names | experts
