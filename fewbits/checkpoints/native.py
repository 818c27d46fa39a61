"""The native format: any fewbits format, in safetensors, with nothing hidden (quant_method "fewbits").

Per quantized linear `M` of shape [out, in] in a format of b bits:

    M.codes   uint8 [out, ceil(in*b/8)]     canonical packing (formats/bits.py), a row starts on a byte
    M.scale   [rows, G]                     as the format's scale store says: a float in the dtype that
                                            config.json names, E8M0 or dynamic codes in uint8, E4M3
    M.scale_outer, M.scale_range, ...       what a nested store needs besides (formats/scales.py)
    M.zero    uint8 [rows, ceil(G*b/8)]     only with a zero point; canonical packing
    M.levels  float32 [2**b]                only with a codebook fitted to the tensor
    M.bias    [out]                         as in the source

    "quantization_config": {"quant_method": "fewbits", "version": 1,
        "modules": {"M": {"format": "nf4-g64", "shape": [out, in], "scale_dtype": "bfloat16", "activations": null}}}

    value = (level[code] - zero) * scale

A module may also have "input_hadamard": [12, 128]: its weight is that of the transformed input, and a reader transforms
the input by those Hadamard factors first (formats/hadamard.py). And "residual": {"rank": 16, "dtype": "bfloat16"}: with
two more tensors its weight is Q + B A, Q the decoded codes (formats/low_rank.py):

    M.residual_out  B [out, rank]
    M.residual_in   A [rank, in]

Or "outliers": {"threshold": 6.0, "columns": 7, "dtype": "float16"}: channels of the input that are not rounded, and
whose weights are beside the codes unless dtype is null (formats/outliers.py). columns null: found as the model runs.

    M.outlier_columns  int32 [columns]
    M.outlier_weight   [out, columns], or [out, in] where they are found as the model runs

With a format such as "int4-asym-g64@25+int3-asym-g64" the input channels are dealt into parts, each stored as a linear
of its own (formats/mix.py):

    M.part                            uint8 [ceil(in*b/8)]   the part of each channel, packed, b = ceil(log2(parts))
    M.0.codes, M.0.scale, M.1.codes   ...                    of the first part, of the second

With "input_order": true there is a tensor M.input_order, int32 [in]: column c of the weight multiplies input channel
input_order[c], whatever follows.

Everything else in the checkpoint is what the source had. A file states the lowest version that can say what is in it: 7
with a linear of several formats, else 6 with static activations, 5 with an input_order, 4 with outliers, 3 with a
residual, 2 with an input_hadamard, else 1. A reader refuses a version above its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import Codec, Entry, Layer, Stored, StoredMix, tensor_named
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, hadamard, parse_format
from fewbits.formats.low_rank import DTYPES, LowRank, LowRankSpec
from fewbits.formats.mix import Mix, Weights, parse_weights
from fewbits.formats.outliers import Outliers, OutlierSpec
from fewbits.formats.rows import check_inputs, check_rows, input_layout
from fewbits.formats.scales import PlainScale, State

QUANT_METHOD = "fewbits"
VERSION = 7
# Names, not eval: a checkpoint may only pick from this table.
SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """What config.json says of one linear, read."""

    format: Weights
    activations: Format | None
    shape: tuple[int, int]
    input_hadamard: tuple[int, ...] = ()
    residual: LowRankSpec | None = None
    outliers: OutlierSpec | None = None
    input_order: bool = False


def module_entry(
    format: Weights,
    activations: Format | None,
    shape: tuple[int, int],
    input_hadamard: Sequence[int] | None = None,
    residual: LowRankSpec | None = None,
    outliers: OutlierSpec | None = None,
    input_order: bool = False,
) -> dict[str, Any]:
    """What config.json says of one linear."""
    more: dict[str, Any] = {"input_hadamard": list(input_hadamard)} if input_hadamard else {}
    if residual is not None:
        more["residual"] = {"rank": residual.rank, "dtype": residual.dtype_name}
    if outliers is not None:
        more["outliers"] = outliers.entry()
    if input_order:
        more["input_order"] = True
    return {
        "format": format.name,
        "shape": list(shape),
        "scale_dtype": str(_scale_dtype(format)).removeprefix("torch."),
        "activations": None if activations is None else activations.name,
        **more,
    }


def layer_entry(layer: Layer) -> dict[str, Any]:
    """`module_entry` of a layer."""
    return module_entry(
        layer.format,
        layer.activations,
        layer.shape,
        layer.input_hadamard,
        layer.residual,
        layer.outliers,
        layer.ordered,
    )


def read_layer(name: str, entry: dict[str, Any]) -> Layer:
    """The layer that `layer_entry` described; BadInput, with its name, if the entry is damaged."""
    found = read_modules({"version": VERSION, "modules": {name: entry}})[name]
    assert isinstance(found.format, Format)
    return Layer(
        format=found.format, shape=found.shape, activations=found.activations, ordered=found.input_order,
        input_hadamard=found.input_hadamard, residual=found.residual, outliers=found.outliers,
    )  # fmt: skip


def quantization_config(modules: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    said = {key for entry in modules.values() for key in entry}
    if any("-static" in (entry["activations"] or "") for entry in modules.values()):
        said.add("static")
    if any("+" in entry["format"] for entry in modules.values()):
        said.add("mix")
    newest = {"mix": 7, "static": 6, "input_order": 5, "outliers": 4, "residual": 3, "input_hadamard": 2}
    version = max([newest[key] for key in said if key in newest], default=1)
    return {"quant_method": QUANT_METHOD, "version": version, "modules": modules}


def read_modules(config: dict[str, Any]) -> dict[str, Module]:
    """What a `quantization_config` says of each module; BadInput if it is damaged."""
    version = config.get("version")
    if type(version) is not int or version < 1:
        raise BadInput(f"native checkpoint version {version!r}; expected {VERSION}")
    if version > VERSION:
        raise Unsupported(f"native checkpoint version {version}; this fewbits reads up to {VERSION}: upgrade fewbits")
    modules, stated = {}, config.get("modules", {})
    if not isinstance(stated, dict) or not all(isinstance(entry, dict) for entry in stated.values()):
        raise BadInput(f"native checkpoint: modules is {str(stated)[:80]}; an object for each module is expected")
    for name, entry in stated.items():
        dtype, shape = entry.get("scale_dtype"), entry.get("shape")
        if not isinstance(dtype, str) or dtype not in SCALE_DTYPES:
            raise BadInput(f"{name}: scale_dtype {dtype!r}; allowed: {', '.join(SCALE_DTYPES)}")
        if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)):
            raise BadInput(f"{name}: shape {str(shape)[:80]}; expected [out, in]")
        activations = entry.get("activations")
        for format in (entry.get("format"), "" if activations is None else activations):
            if not isinstance(format, str):
                raise BadInput(f"{name}: format {str(format)[:80]}; the name of a format is expected")
        modules[name] = Module(
            format=_weights(name, entry, shape[1]).with_scale_dtype(SCALE_DTYPES[dtype]),
            activations=None if activations is None else _activations(name, activations),
            shape=(shape[0], shape[1]),
            input_hadamard=_orders(name, entry.get("input_hadamard", []), shape[1]),
            residual=_residual(name, entry.get("residual"), (shape[0], shape[1])),
            outliers=_outliers(name, entry.get("outliers"), shape[1]),
            input_order=entry.get("input_order") is True,
        )
    return modules


def _scale_dtype(format: Weights) -> torch.dtype:
    """What plain scales are stored as; float32 where there are none."""
    if not isinstance(format, Mix):
        return format.scaling.scale_dtype
    found = [each.scaling.store.dtype for each in format.formats if isinstance(each.scaling.store, PlainScale)]
    return found[0] if found else torch.float32


_BESIDE_ONE_FORMAT = ("activations", "input_hadamard", "residual", "outliers", "input_order")


def _weights(module: str, entry: Mapping[str, Any], columns: int) -> Weights:
    format = parse_weights(entry["format"])
    if isinstance(format, Mix):
        if reason := format.why_not(columns):
            raise BadInput(f"{module}: format {format.name}: {reason}")
        if beside := next((key for key in _BESIDE_ONE_FORMAT if entry.get(key)), None):
            raise BadInput(f"{module}: {beside} beside {format.name}; a linear of several formats has none")
    return format


def _activations(module: str, name: str) -> Format:
    format = parse_format(name)
    try:
        check_rows(format)
    except BadInput as error:
        raise BadInput(f"{module}: {error}") from error
    return format


def _orders(name: str, orders: Any, columns: int) -> tuple[int, ...]:
    whole = isinstance(orders, list) and all(type(n) is int and 1 <= n <= columns for n in orders)
    if not whole or len(orders) > columns.bit_length() or columns % math.prod(orders):
        raise BadInput(f"{name}: input_hadamard {orders!r}; expected orders whose product divides {columns}")
    unknown = [n for n in orders if not hadamard.is_known(n)]
    if unknown:
        raise Unsupported(f"{name}: input_hadamard {unknown[0]}; no Hadamard matrix of that order is known here")
    return tuple(orders)


def _residual(name: str, entry: Any, shape: tuple[int, int]) -> LowRankSpec | None:
    if entry is None:
        return None
    rank, dtype = (entry.get(key) for key in ("rank", "dtype")) if isinstance(entry, dict) else (None, None)
    if type(rank) is not int or not 1 <= rank <= min(shape) or dtype not in DTYPES:
        raise BadInput(
            f"{name}: residual {entry!r}; expected a rank from 1 to {min(shape)} and a dtype of {', '.join(DTYPES)}"
        )
    return LowRankSpec(rank=rank, dtype=DTYPES[dtype])


def _outliers(name: str, entry: Any, columns: int) -> OutlierSpec | None:
    try:
        return None if entry is None else OutlierSpec.read_entry(entry, columns)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error


class Native(Codec):
    holds = "every format; loads where fewbits is"
    writes = True

    def claims(self, quantization: dict[str, Any]) -> bool:
        return bool(quantization.get("quant_method") == QUANT_METHOD)

    def entries(self, source: Source) -> dict[str, Entry]:
        modules = read_modules(source.config().get("quantization_config", {}))
        return {
            name: Entry(tensor=f"{name}.weight", parts=tuple(f"{name}.{part}" for part in _parts(found)), about=found)
            for name, found in modules.items()
        }

    def read(self, source: Source, module: str, entry: Entry) -> Stored | StoredMix:
        about: Module = entry.about
        state = {name: source.tensor(f"{module}.{name}") for name in about.format.layout(about.shape)}
        if isinstance(about.format, Mix):
            return StoredMix(mix=about.format, shape=about.shape, state=state)
        order = tensor_named(source, f"{module}.input_order", 1, torch.int32).long() if about.input_order else None
        return Stored(
            format=about.format, shape=about.shape, state=state, activations=about.activations, order=order,
            input_hadamard=about.input_hadamard, residual=_read_residual(source, module, about),
            outliers=_read_outliers(source, module, about), inputs=_read_inputs(source, module, about),
        )  # fmt: skip

    def refuses(self, stored: Stored) -> str | None:
        return None

    def nearest(self, layer: Layer) -> Format:
        return layer.format

    def encode(self, stored: Stored) -> dict[str, Tensor]:
        ordered = {} if stored.order is None else {"input_order": stored.order.int()}
        residual = {} if stored.residual is None else stored.residual.to_state()
        outliers = {} if stored.outliers is None else stored.outliers.to_state()
        return {**stored.state, **ordered, **residual, **outliers, **stored.inputs}

    def quantization(self, layers: Mapping[str, Layer], dense: Iterable[str]) -> dict[str, Any]:
        modules = {name: layer_entry(layer) for name, layer in layers.items()}
        return {"quantization_config": quantization_config(modules)}


def _parts(module: Module) -> list[str]:
    residual = [] if module.residual is None else list(module.residual.layout(module.shape))
    outliers = [] if module.outliers is None else list(module.outliers.layout(module.shape))
    order = ["input_order"] if module.input_order else []
    inputs = list(input_layout(module.activations, module.shape[1]))
    return [*module.format.layout(module.shape), *residual, *outliers, *order, *inputs]


def _read_inputs(source: Source, module: str, about: Module) -> State:
    """The static parameters that the module's input is rounded with; none for dynamic ones."""
    layout = input_layout(about.activations, about.shape[1])
    state = {name: source.tensor(f"{module}.{name}") for name in layout}
    try:
        check_inputs(state, layout)
    except BadInput as error:
        raise BadInput(f"{module}: {error}: the checkpoint is damaged") from error
    return state


def _read_residual(source: Source, module: str, about: Module) -> LowRank | None:
    if about.residual is None:
        return None
    state = {name: source.tensor(f"{module}.{name}") for name in about.residual.layout(about.shape)}
    try:
        return LowRank.from_state(about.residual, about.shape, state)
    except BadInput as error:
        raise BadInput(f"{module}: {error}: the checkpoint is damaged") from error


def _read_outliers(source: Source, module: str, about: Module) -> Outliers | None:
    if about.outliers is None:
        return None
    state = {name: source.tensor(f"{module}.{name}") for name in about.outliers.layout(about.shape)}
    try:
        return Outliers.from_state(about.outliers, about.shape, state)
    except BadInput as error:
        raise BadInput(f"{module}: {error}: the checkpoint is damaged") from error


CODEC = Native()
