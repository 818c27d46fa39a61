"""Reading compressed-tensors: what its writers of several years left on disk.

The tensors tell most of what the configuration says, and are believed first. Three layouts of packed integers exist:
since May 2026 codes of 3, 5, 6 and 7 bits cross word borders, ceil(in*b/32) words a row; before, each word held
32 // b codes whole, ceil(in / (32 // b)) words. The file's version did not change, the shape did. Where both give the
same number of words the newer layout is meant. `weight_g_idx`, in files of the versions that had it, is read as an
order of the input channels.

Activations with one scale per tensor from calibration are read with it, where the file holds it. Where it does not,
and for the global scales of NVFP4, activations are rounded per token, with scales of their own.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints import compressed_blocks as blocks
from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import FLOATS, Entry, Stored, reorder_columns, tensor_named
from fewbits.checkpoints.words import from_e2m1, from_e4m3, from_words
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, parse_format
from fewbits.formats import bits as packing
from fewbits.formats.rows import check_inputs, input_layout
from fewbits.formats.scales import State

_SUFFIXES = (
    *("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    *("weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale"),
)
_ELEMENTS = {("int", width): f"int{width}" for width in range(2, 9)} | {
    ("float", 8): "fp8_e4m3",
    ("float", 4): "fp4_e2m1",
}
MAX_PATTERN = 400
_REPEATED_GROUP = re.compile(r"\([^()]*[+*}][^()]*\)[+*{]")


def entries(source: Source) -> dict[str, Entry]:
    """Module name -> its config group and tensors, for every module of `source` that holds quantized tensors."""
    config = source.config().get("quantization_config", {})
    groups = [group for group in config.get("config_groups", {}).values() if isinstance(group, dict)]
    present = set(source.names())
    packed = [name.removesuffix(".weight_packed") for name in present if name.endswith(".weight_packed")]
    plain = [name.removesuffix(".weight_scale") for name in present if name.endswith(".weight_scale")]
    modules = sorted({*packed, *(module for module in plain if f"{module}.weight" in present)})
    found = {}
    for module in modules:
        group = next((group for group in groups if _targets(group, module)), None)
        if group is None:
            raise BadInput(f"{module}: quantized in the file, but no group of quantization_config names it")
        parts = tuple(name for suffix in _SUFFIXES if (name := f"{module}.{suffix}") in present)
        found[module] = Entry(tensor=f"{module}.weight", parts=parts, about=group)
    return found


def _targets(group: dict[str, Any], module: str) -> bool:
    for target in group.get("targets", []):
        if not isinstance(target, str):
            raise BadInput(f"quantization_config: target {target!r} is no name")
        if target == "Linear" or target == module:
            return True
        if target.startswith("re:") and _pattern(target[3:]).match(module):
            return True
    return False


def _pattern(text: str) -> re.Pattern[str]:
    """A pattern from a file: short, and without the nested repetitions that take exponential time."""
    if len(text) > MAX_PATTERN or _REPEATED_GROUP.search(text):
        raise BadInput(f"quantization_config: the pattern {text[:80]!r} is too long or repeats a repetition")
    try:
        return re.compile(text)
    except re.error as error:
        raise BadInput(f"quantization_config: {text!r} is no pattern: {error}") from error


def _format_of(arguments: dict[str, Any], *, where: str, inputs: bool = False) -> Format:
    """The format that quantization arguments describe; Unsupported for what is not read here."""
    bits, kind, strategy = arguments.get("num_bits"), arguments.get("type"), arguments.get("strategy")
    if arguments.get("dynamic") not in (True, False, None, "local"):
        raise Unsupported(f"{where}: dynamic={arguments['dynamic']!r} is not read by fewbits")
    element = _ELEMENTS.get((str(kind), bits)) if isinstance(bits, int) else None
    if name := blocks.format_name(arguments, inputs=inputs):
        return parse_format(name)
    if inputs and strategy == "channel":
        strategy = "token"
    if element is None or strategy not in ("tensor", "channel", "group", "token"):
        raise Unsupported(
            f"{where}: {bits}-bit {kind} per {strategy} is not read by fewbits; load it with vLLM or transformers"
        )
    zero = "" if arguments.get("symmetric", True) else "-asym"
    block = f"g{arguments.get('group_size')}" if strategy == "group" else strategy
    return parse_format(f"{element}{zero}-{block}")


def read(source: Source, module: str, entry: Entry) -> Stored:
    """One linear as it is in the file: no rounding."""
    group, present = entry.about, {name.rpartition(".")[2] for name in entry.parts}
    if not isinstance(group.get("weights"), dict):
        raise BadInput(f"{module}: its group of quantization_config says nothing of weights")
    format = _format_of(group["weights"], where=module)
    inputs, notes = group.get("input_activations"), []
    activations = _format_of(inputs, where=f"{module} activations", inputs=True) if isinstance(inputs, dict) else None
    if activations is not None and activations.scaling.block == "tensor" and not inputs.get("dynamic"):
        # A scale of its own per token is never worse than one that is not there.
        scaled = "input_scale" in present
        activations = parse_format(f"{activations.name}-static" if scaled else _per_token(activations))
    elif activations is not None and present & {"input_scale", "input_global_scale"}:
        notes.append("calibrated scales of activations are not used: each token has its own")
    if "weight_packed" in present and format.grid.kind != "float":
        shape, state, order = _integers(source, module, present, format)
    else:
        shape, state = _floats_or_bytes(source, module, present, group)
        order = None
    scale = _tensor(source, f"{module}.weight_scale")
    rows, groups = format.parameter_shape(shape)
    if scale.numel() != rows * groups:
        raise BadInput(f"{module}.weight_scale: shape {tuple(scale.shape)}; {format.name} has {(rows, groups)} here")
    state["scale"] = scale.reshape(rows, groups)
    if scale.dtype in FLOATS:
        format = format.with_scale_dtype(scale.dtype)
    if "scale_divisor" in format.layout(shape):
        state["scale_divisor"] = _tensor(source, f"{module}.weight_global_scale").reshape(-1).float()
    return Stored(
        format=format, shape=shape, state=state, activations=activations, order=order, note="; ".join(notes),
        inputs=_static(source, module, activations, shape[1]),
    )  # fmt: skip


def _per_token(format: Format) -> str:
    return f"{format.name.removesuffix('-tensor')}-token"


def _static(source: Source, module: str, activations: Format | None, columns: int) -> State:
    """The static parameters of the module's activations."""
    layout, state = input_layout(activations, columns), {}
    for name, (shape, dtype) in layout.items():
        stored = source.tensor(f"{module}.{'input_zero_point' if name == 'input_zero' else name}")
        if stored.numel() != 1:
            raise BadInput(f"{module}.{name}: {tuple(stored.shape)} is not one scale: the checkpoint is damaged")
        state[name] = (stored.short() + 128 if name == "input_zero" else stored).reshape(shape).to(dtype)
    try:
        check_inputs(state, layout)
    except BadInput as error:
        raise BadInput(f"{module}.{error}: the checkpoint is damaged") from error
    return state


def _tensor(source: Source, name: str) -> Tensor:
    """Tensor `name`, an E8M0 one as the bytes it is made of."""
    tensor = source.tensor(name)
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e8m0fnu else tensor


def _floats_or_bytes(
    source: Source, module: str, present: set[str], group: dict[str, Any]
) -> tuple[tuple[int, int], dict[str, Tensor]]:
    """(shape, codes) of FP4 in bytes, FP8 or int8."""
    if "weight_packed" in present:
        stored = tensor_named(source, f"{module}.weight_packed", 2, torch.uint8)
        return (stored.shape[0], 2 * stored.shape[1]), {"codes": from_e2m1(stored)}
    stored = source.tensor(f"{module}.weight")
    if stored.dim() != 2 or stored.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise BadInput(f"{module}.weight: {stored.dtype}; int8 or float8_e4m3fn belongs to {group.get('format')}")
    codes = stored.view(torch.uint8) ^ 128 if stored.dtype == torch.int8 else from_e4m3(stored)
    return (stored.shape[0], stored.shape[1]), {"codes": codes}


def _integers(
    source: Source, module: str, present: set[str], format: Format
) -> tuple[tuple[int, int], dict[str, Tensor], Tensor | None]:
    """(shape, codes and zero points, order of input channels) of packed integers."""
    sizes = source.tensor(f"{module}.weight_shape")
    if sizes.numel() != 2 or sizes.dtype not in (torch.int64, torch.int32) or int(sizes.min()) < 1:
        raise BadInput(f"{module}.weight_shape: {sizes.tolist()[:4]} is no shape [out, in]")
    rows, columns = (int(size) for size in sizes)
    words = source.tensor(f"{module}.weight_packed")
    if words.dim() != 2 or words.shape[0] != rows or words.dtype != torch.int32:
        raise BadInput(f"{module}.weight_packed: {words.dtype} {tuple(words.shape)} does not hold {rows} rows")
    state, bits = {"codes": _codes(words, format.bits, columns)}, format.bits
    order = None
    if "weight_g_idx" in present:
        from fewbits.checkpoints.gptq import input_order

        index = tensor_named(source, f"{module}.weight_g_idx", 1, torch.int32, torch.int64)
        order = input_order(index, format.scaling.width(columns), columns)
        if order is not None:
            state["codes"] = reorder_columns(state["codes"], bits, order)
    if format.scaling.zero_point:
        packed = tensor_named(source, f"{module}.weight_zero_point", 2, torch.int32)
        zero = packing.unpack(_codes(packed.t().contiguous(), bits, rows), bits, rows)
        state["zero"] = packing.pack(zero.t().contiguous(), bits)
    return (rows, columns), state, order


def _codes(words: Tensor, bits: int, count: int) -> Tensor:
    """Canonical rows from words of either layout."""
    each = 32 // bits
    newer, older = -(-count * bits // 32), -(-count // each)
    if words.shape[1] == newer or words.shape[1] != older:
        return from_words(words, bits, count)
    fields = torch.stack([(words >> (bits * index)) & ((1 << bits) - 1) for index in range(each)], dim=-1)
    return packing.pack(fields.to(torch.uint8).flatten(1)[:, :count], bits)
