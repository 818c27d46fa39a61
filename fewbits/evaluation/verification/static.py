"""Checks that read names, shapes and settings, and no weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from fewbits.checkpoints.gguf_source import GGUFSource
from fewbits.evaluation.verification.admission import Refusal
from fewbits.evaluation.verification.checks import Check, failed, not_checked, ok, some, warning
from fewbits.evaluation.verification.model import Subject
from fewbits.evaluation.verification.runtimes import DENSE, GGUF, Runtime

PARALLEL = (1, 2, 4, 8)
_IGNORES = ("ignore", "modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules", "exclude_modules")


def check_format(subject: Subject, runtime: Runtime) -> Check:
    """Whether the runtime reads this checkpoint format at all, at these widths."""
    name, kind = "format", subject.format
    if kind not in runtime.formats:
        readable = ", ".join(runtime.formats)
        return failed(
            name, f"{runtime.name} reads no {kind}; it reads {readable}", f"fewbits convert --to {_other(runtime)}"
        )
    package = runtime.formats[kind]
    widths = runtime.bits.get(kind)
    if widths:
        bits = _widths(subject)
        wrong = {module: width for module, width in bits.items() if width not in widths}
        if wrong:
            return failed(
                name, f"{runtime.name} reads {kind} at {', '.join(map(str, widths))} bits; {some(wrong)} have others",
                "quantize those layers to a width it reads",
            )  # fmt: skip
    if package and package != kind:
        return warning(name, f"{runtime.name} reads {kind} with the package {package}", f"pip install {package}")
    return ok(name, f"{runtime.name} reads {kind}" + (f" with the package {package}" if package else ""))


def _other(runtime: Runtime) -> str:
    return next((kind for kind in ("compressed-tensors", "mlx", GGUF) if kind in runtime.formats), DENSE)


def check_kernels(subject: Subject, runtime: Runtime) -> Check:
    """Whether the runtime has a kernel for each quantized layer."""
    name = "kernels"
    if runtime.admits is None or subject.format not in runtime.formats or not subject.modules.entries:
        quantized = "nothing is quantized" if not subject.modules.entries else f"no rules of {runtime.name} are known"
        return not_checked(name, quantized)
    found: dict[Refusal, list[str]] = {}
    for module in subject.modules.entries:
        layer = subject.layer(module)
        refusal = None if layer is None else runtime.admits(subject.format, subject.quantization, layer)
        if refusal is not None:
            found.setdefault(refusal, []).append(module)
    never = {refusal: modules for refusal, modules in found.items() if not refusal.unless}
    told = "; ".join(f"{refusal.what}: {some(modules)}" for refusal, modules in (never or found).items())
    if never:
        return failed(
            name, f"{runtime.name} computes no {told}", "fewbits convert to another format, or quantize again"
        )
    if found:
        where = " and ".join(sorted({refusal.unless for refusal in found}))
        return warning(name, f"{runtime.name} computes {told} only {where}", "other widths and groups run everywhere")
    return ok(name, f"{runtime.name} has one for each of {len(subject.modules.entries)} modules")


def _widths(subject: Subject) -> dict[str, int]:
    """Bits of each integer module, from what its settings or tensors say without decoding all of them."""
    found = {}
    seen: dict[str, int] = {}
    for module in subject.modules.entries:
        kind = module.rpartition(".")[2]
        if kind not in seen or len(subject.modules.entries) < 64:
            stored = subject.stored(module)
            seen[kind] = stored.format.bits if stored is not None and stored.format.grid.kind == "integer" else 4
        found[module] = seen[kind]
    return found


def check_dtype(subject: Subject, runtime: Runtime) -> Check:
    stated = str(subject.config.get("dtype") or subject.config.get("torch_dtype") or subject.source.dtype)
    stated = stated.removeprefix("torch.")
    if stated not in runtime.dtypes:
        return failed("dtype", f"config.json says {stated}", f"use one of {', '.join(runtime.dtypes)}")
    odd = sorted(
        name for name in subject.source.names()
        if name.endswith("norm.weight") and "float" not in str(subject.source.info(name).dtype)
    )  # fmt: skip
    if odd:
        return failed("dtype", f"norms are stored as integers: {some(odd)}", "write the checkpoint again")
    return ok("dtype", stated)


def check_rope(subject: Subject, runtime: Runtime) -> Check:
    """The base of rotary embeddings is where the runtime looks for it."""
    rope = subject.config.get("rope_parameters")
    nested = isinstance(rope, dict) and "rope_theta" in rope
    if not runtime.flat_rope or not nested or "rope_theta" in subject.config:
        return ok("rope", "rope_theta is where it is looked for")
    return warning(
        "rope", f"{rope['rope_theta']} is said in rope_parameters alone, where {runtime.name} looks in few families",
        "say rope_theta (and rope_scaling) at the top of config.json too; fewbits convert --to mlx does",
    )  # fmt: skip


def check_tokenizer(subject: Subject) -> Check:
    tokenizer = subject.source.load_tokenizer()  # BadInput where there is none, or it names too many ids
    size = len(tokenizer)
    if getattr(tokenizer, "chat_template", None) is None:
        return warning("tokenizer", f"{size} tokens, no chat template", "add chat_template.jinja if the model chats")
    return ok("tokenizer", f"{size} tokens and a chat template")


def check_tensors(subject: Subject) -> Check:
    """Every parameter of the model has a tensor of its shape, or a quantized module; nothing is left over."""
    source, topology = subject.source, subject.topology
    stored, entries = set(source.names()), subject.modules.entries
    parts = {part for entry in entries.values() for part in entry.parts}
    dense = {entry.tensor for entry in entries.values()}
    experts = {f"{name}.weight" for name in subject.experts}
    to_disk = topology.disk_name if topology else (lambda name: name)
    fused = set() if not subject.experts else {"gate_up_proj", "down_proj", "up_proj"}
    absent, wrong, wanted = [], [], set()
    for name, parameter in subject.skeleton.named_parameters():
        disk = to_disk(name)
        wanted.add(disk)
        if disk in dense or disk in source.tied() or (name.rpartition(".")[2] in fused and disk not in stored):
            continue
        if disk not in stored:
            absent.append(disk)
        elif tuple(source.info(disk).shape) != tuple(parameter.shape):
            wrong.append(f"{disk} {list(source.info(disk).shape)} for {list(parameter.shape)}")
    absent += sorted(name for name in experts if name not in stored and name not in dense and not _is_fused(subject))
    if absent:
        return failed("tensors", f"{len(absent)} are missing: {some(absent)}", "write the checkpoint again, all shards")
    if wrong:
        return failed("tensors", f"other shapes than config.json asks for: {some(wrong)}", "check config.json")
    stray = sorted(stored - wanted - parts - experts - dense - set(source.tied()))
    stray = [name for name in stray if not name.endswith(("inv_freq", "k_scale", "v_scale", "q_scale"))]
    if stray:
        return warning(
            "tensors", f"{len(stray)} belong to nothing in the model: {some(stray)}",
            "a draft head or a vision tower is ignored by most runtimes; remove what is not meant to be there",
        )  # fmt: skip
    return ok("tensors", f"{len(wanted)} parameters, all there")


def _is_fused(subject: Subject) -> bool:
    """Whether the checkpoint keeps experts in 3-D tensors."""
    return any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in subject.source.names())


def check_ignore(subject: Subject) -> Check:
    """What is said to stay dense is dense, and every other matrix is quantized."""
    name, entries = "ignore names", subject.modules.entries
    if not entries:
        return not_checked(name, "nothing is quantized")
    patterns = [pattern for key in _IGNORES for pattern in subject.quantization.get(key) or []]
    patterns += [f"re:{key[2:]}" for key in subject.quantization.get("dynamic") or {} if str(key).startswith("-:")]
    both = sorted(module for module in entries if any(_matches(str(pattern), module) for pattern in patterns))
    if both:
        return failed(name, f"quantized, and said not to be: {some(both)}", "take them off the list in config.json")
    known = {*subject.matrices, *(module for module, _ in subject.skeleton.named_modules())}
    strangers = sorted(module for module in entries if module not in known)
    if strangers:
        return failed(
            name, f"quantized, and no module of the model: {some(strangers)}", "check names against the model"
        )
    if subject.format in ("native", "gptq", "gptq_v2", "exl2", "exl3", "mlx", "hqq") and not patterns:
        return ok(name, f"{len(entries)} modules named one by one")
    left = sorted(
        module for module in subject.matrices
        if module not in entries and not any(_matches(str(pattern), module) for pattern in patterns)
    )  # fmt: skip
    if left and subject.modules.name != "bitsandbytes":
        return failed(
            name, f"neither quantized nor said to stay dense: {some(left)}", "add them to the list in config.json"
        )
    idle = [
        str(pattern) for pattern in patterns
        if not any(_matches(str(pattern), module) for module in known)
    ]  # fmt: skip
    if idle:
        return warning(
            name, f"match no module: {some(idle)}", "a misspelt name protects nothing: compare with the model"
        )
    said = "1 pattern" if len(patterns) == 1 else f"{len(patterns)} patterns"
    return ok(name, f"{len(entries)} modules quantized, {said} of what is not")


def _matches(pattern: str, module: str) -> bool:
    """As compressed-tensors, transformers and vLLM match: a regular expression, a name, or the end or part of one."""
    if pattern.startswith("re:") or "*" in pattern:
        # A star outside re: is transformers' way: a regular expression again, but up to the end of a module's name.
        expression = pattern[3:] if pattern.startswith("re:") else rf"(?:{pattern})(?:\.|$)"
        try:
            return re.match(expression, module) is not None
        except re.error:
            return False
    return module == pattern or module.endswith(f".{pattern}") or f".{pattern}." in f".{module}."


def check_parallel(subject: Subject, runtime: Runtime) -> Check:
    """Heads, rows, columns and groups that 1, 2, 4 and 8 devices can share."""
    name = "tensor parallel"
    if not runtime.splits:
        return not_checked(name, f"{runtime.name} is not checked for splitting linears")
    bad = {size: reason for size in PARALLEL if (reason := next(_uneven(subject, size), None)) is not None}
    if 1 in bad:
        return failed(name, f"on one device already: {bad[1]}", "choose a group size that divides the rows")
    if bad:
        reasons = "; ".join(f"{size}: {reason}" for size, reason in bad.items())
        good = [str(size) for size in PARALLEL if size not in bad]
        return warning(name, reasons, f"serve on {', '.join(good)} device{'s' * (len(good) > 1)}")
    return ok(name, "1, 2, 4 and 8 devices")


def _uneven(subject: Subject, size: int) -> Iterator[str]:
    heads = subject.config.get("num_attention_heads") or 1
    groups = subject.config.get("num_key_value_heads") or heads
    if heads % size:
        yield f"{heads} heads"
    if groups % size and size % groups:
        yield f"{groups} key-value heads"
    writers = subject.topology.writers if subject.topology else ("*o_proj", "*down_proj")
    kinds = {pattern.rpartition(".")[2].lstrip("*") for pattern in writers}
    seen: set[tuple[str, tuple[int, int]]] = set()
    for module, shape in subject.matrices.items():
        kind = module.rpartition(".")[2]
        if (kind, shape) in seen:
            continue
        seen.add((kind, shape))
        by_columns = kind in kinds
        if shape[1 if by_columns else 0] % size:
            yield f"{module}: {shape[1 if by_columns else 0]} {'columns' if by_columns else 'rows'}"
        stored = subject.stored(module)
        width = stored.format.scaling.group_size if stored is not None else None
        if stored is None or width is None or stored.format.scaling.block == "channel":
            continue
        part = shape[1] // size if by_columns else shape[1]
        if part % width:
            yield f"{module}: groups of {width} in {part} columns"


def check_tied(subject: Subject) -> Check:
    """A head that shares the embeddings' tensor is not quantized apart from it, nor stored as another."""
    name, topology = "tied head", subject.topology
    head = topology.head if topology else "lm_head"
    tied = bool(subject.config.get("tie_word_embeddings"))
    present = f"{head}.weight" in subject.source.names() or head in subject.modules.entries
    if tied and head in subject.modules.entries and subject.format != "mlx":
        return failed(
            name, f"{head} is quantized, and config.json ties it to the embeddings", "set tie_word_embeddings to false"
        )
    if tied and present:
        return warning(name, f"{head} is stored although it is tied: runtimes differ in which one they take", "drop it")
    if not tied and not present:
        return failed(name, f"there is no {head}, and config.json does not tie it", "set tie_word_embeddings to true")
    return ok(name, "shares the embeddings" if tied else "stored on its own")


def check_experts(subject: Subject) -> Check:
    """Every expert of every block is quantized, or none is."""
    name = "experts"
    if not subject.experts:
        return not_checked(name, "the model has none")
    entries = subject.modules.entries
    count = 1 + max(index for _, index in subject.experts.values())
    if not entries or _is_fused(subject):
        return ok(name, f"{count} a block, not quantized one by one")
    groups: dict[str, list[str]] = {}
    for module, (group, _) in subject.experts.items():
        groups.setdefault(group, []).append(module)
    mixed = {
        group: [module for module in members if module not in entries]
        for group, members in groups.items()
        if 0 < sum(module in entries for module in members) < len(members)
    }
    if mixed:
        lacking = next(iter(mixed.values()))
        return failed(name, f"some experts have codes and scales, others none: {some(lacking)}", "quantize all of them")
    return ok(name, f"{count} a block, all alike")


def check_gguf(subject: Subject) -> Iterator[Check]:
    """What llama.cpp asks of a file."""
    source = subject.source
    assert isinstance(source, GGUFSource)
    metadata, tensors = source.file.metadata, source.file.tensors
    vectors = sorted(name for name, info in tensors.items() if len(info.shape) == 1 and info.stored != "F32")
    if vectors:
        yield failed(
            "vectors", f"not F32: {some(vectors)}", "llama.cpp adds and multiplies vectors in F32: write them so"
        )
    else:
        yield ok("vectors", "norms and biases are F32")
    rows, tokens = tensors["token_embd.weight"].shape[0], len(metadata.get("tokenizer.ggml.tokens") or [])
    if rows != tokens:
        yield failed(
            "vocabulary", f"{rows} embeddings, {tokens} tokens", "fill the list of tokens up to the embeddings"
        )
    else:
        yield ok("vocabulary", f"{tokens} tokens")
    needed = ("tokenizer.ggml.model", "tokenizer.ggml.token_type", "general.file_type")
    lacking = [key for key in needed if key not in metadata]
    if metadata.get("tokenizer.ggml.model") == "gpt2" and "tokenizer.ggml.pre" not in metadata:
        lacking.append("tokenizer.ggml.pre")
    if lacking:
        yield warning(
            "keys", f"missing: {', '.join(lacking)}", "write the file again with fewbits or a newer converter"
        )
    else:
        yield ok("keys", f"{len(metadata)} keys")
    if metadata.get("general.quantization_version", 2) != 2:
        yield failed("version", f"quantization version {metadata['general.quantization_version']}", "convert it again")


Static = Callable[[Subject], Check]
SETTINGS: dict[str, Static] = {
    "tokenizer": check_tokenizer,
    "tensors": check_tensors,
    "ignore names": check_ignore,
    "tied head": check_tied,
    "experts": check_experts,
}
