"""MLX checkpoints: affine integers, MXFP4, MXFP8 (config.json has `quantization`, without a method's name).

    weight  uint32 [out, in*b/32]    one stream of b-bit codes a row, least significant first
    scales, biases  [out, in/g]      in the model's float

    value = code * scale + bias

A bias is any number, so this is our minimum with the other sign (`int4-min-g64`); scales may be negative. Where every
bias is a whole multiple of its scale the layer is one of symmetric integers or of integers with zero points, and is
read as that: so what came from GPTQ goes back to GPTQ. Written the other way, a bias z * scale that float16 cannot say
exactly makes the scales and biases of that layer float32. One scale a row is repeated for groups of 64.

The experts of a block are stacked (fused_experts.py): switch_mlp.gate_proj.weight is uint32 [E, out, in*b/32].

"mxfp4" and "mxfp8" have E8M0 scales in uint8 and no biases; "nvfp4" E4M3 scales without an outer one. MLX quantizes
embeddings too. Values here are float32; MLX computes them in the dtype of the scales.

Source: mlx 0.32 (mlx.core.quantize), mlx-lm (utils.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import (
    FLOATS,
    Codec,
    Entry,
    Layer,
    Stored,
    group_name,
    modules_with,
    tensor_named,
)
from fewbits.checkpoints.fused_experts import GPT_OSS, Fused, is_stack, mlx_stack, mlx_stacks
from fewbits.checkpoints.minima import minimum_of, with_zeros
from fewbits.checkpoints.words import from_e2m1, from_e4m3, from_words, to_e2m1, to_e4m3, to_words
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, parse_format
from fewbits.formats.scales import PlainScale
from fewbits.models.topology import ExpertLayout, find_topology
from fewbits.models.walk import MAX_EXPERTS

SIZES = (32, 64, 128)
WIDTHS = (2, 3, 4, 5, 6, 8)
_OF_A_BLOCK = 9  # stacks: three of each of three parts
_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


class _About(NamedTuple):
    """settings: of the module.  part: reads its "weight", "scales" or "biases", of so many types."""

    settings: dict[str, Any]
    part: Callable[..., Tensor]


class MLX(Codec):
    holds = "integers of 2 to 8 bits with real minima, MXFP4, MXFP8; embeddings too; loads in mlx-lm"
    writes = True

    def claims(self, quantization: dict[str, Any]) -> bool:
        return "quant_method" not in quantization and "group_size" in quantization and "bits" in quantization

    def entries(self, source: Source) -> dict[str, Entry]:
        config = source.config()
        about = config.get("quantization") or config.get("quantization_config") or {}
        names = source.names()
        present, found = set(names), {}
        stack = lru_cache(maxsize=_OF_A_BLOCK)(source.tensor)
        for module in modules_with(names, "scales"):
            if f"{module}.weight" in present:
                parts = tuple(
                    name for part in ("weight", "scales", "biases") if (name := f"{module}.{part}") in present
                )
                own = about.get(module)
                stated = {**about, **own} if isinstance(own, dict) else about
                if not is_stack(module):
                    part = partial(_part, source, module)
                    found[module] = Entry(tensor=f"{module}.weight", parts=parts, about=_About(stated, part))
                    continue
                for expert, (linear,) in enumerate(
                    mlx_stack(module, _experts(source, module), _layout(config)).linears
                ):
                    part = partial(_slice, stack, module, expert)
                    found[linear] = Entry(tensor=f"{linear}.weight", parts=parts, about=_About(stated, part))
        return found

    def read(self, source: Source, module: str, entry: Entry) -> Stored:
        about: _About = entry.about
        size, mode = about.settings.get("group_size"), about.settings.get("mode", "affine")
        if type(size) is not int or not 0 < size <= 1 << 20:
            raise BadInput(f"{module}: group_size {size!r} is no size of a group")
        words = about.part("weight", torch.uint32, torch.int32)
        scales = about.part("scales", *FLOATS, torch.uint8)
        if mode != "affine" or not any(part.endswith(".biases") for part in entry.parts):
            return _float(words, scales, str(mode))
        rows, columns = words.shape[0], scales.shape[1] * size
        bits, rest = divmod(words.shape[1] * 32, columns or 1)
        if rest or bits not in WIDTHS or scales.shape[0] != rows or scales.dtype == torch.uint8:
            raise BadInput(f"{module}: weight {tuple(words.shape)}, scales {tuple(scales.shape)} for groups of {size}")
        biases = about.part("biases", scales.dtype)
        if biases.shape != scales.shape:
            raise BadInput(f"{module}.biases: {tuple(biases.shape)} beside scales {tuple(scales.shape)}")
        state = {"codes": from_words(words, bits, columns), "scale": scales, "minimum": -biases}
        name = f"int{bits}-min-{group_name(size, columns)}"
        format = parse_format(name).with_scale_dtype(scales.dtype)
        return with_zeros(Stored(format=format, shape=(rows, columns), state=state))

    def refuses_model(self, config: Mapping[str, Any]) -> str | None:
        gpt_oss = config.get("model_type") == GPT_OSS
        return "mlx-lm reads gpt-oss's experts in gpt-oss's own layout, mxfp4" if gpt_oss else None

    def refuses(self, stored: Stored) -> str | None:
        format, columns = stored.format, stored.shape[1]
        scaling = format.scaling
        if not stored.plain:
            return "MLX has no quantized, transformed or reordered activations and no residuals"
        if format.name in ("mxfp4", "mxfp8"):
            return None if columns % 32 == 0 else f"blocks of 32 do not divide {columns}"
        if format.grid.kind != "integer" or not isinstance(scaling.store, PlainScale) or "narrow" in format.name:
            return f"MLX has no {format.name}"
        if format.bits not in WIDTHS or scaling.block not in ("group", "channel"):
            return f"MLX holds integers of {WIDTHS} bits in groups; this is {format.name}"
        size = scaling.width(columns) if scaling.width(columns) in SIZES else _divisor(scaling.width(columns))
        if size is None or columns % scaling.width(columns) or columns % 32:
            return f"MLX has groups of {SIZES}; {scaling.width(columns)} of {columns} columns are none"
        return None

    def nearest(self, layer: Layer) -> Format:
        size = next((size for size in (64, 32, 128) if layer.shape[1] % size == 0), None)
        if size is None:
            raise Unsupported(f"MLX has groups of {SIZES}; none divides the input dimension {layer.shape[1]}")
        bits = next(width for width in WIDTHS if width >= min(layer.format.bits, 8))
        return parse_format(f"int{bits}-min-g{size}").with_scale_dtype(torch.float16)

    def encode(self, stored: Stored) -> dict[str, Tensor]:
        codes, scale = stored.state["codes"], stored.state["scale"]
        if stored.format.name in ("mxfp4", "mxfp8"):
            packed = to_e2m1(codes) if stored.format.bits == 4 else to_e4m3(codes).view(torch.uint8)
            return {"weight": to_words(packed).view(torch.uint32), "scales": scale}
        minimum = minimum_of(stored)
        if not torch.equal(minimum.to(scale.dtype).float(), minimum):
            scale = scale.float()
        columns = stored.shape[1]
        width = stored.format.scaling.width(columns)
        times = 1 if width in SIZES else width // (_divisor(width) or width)
        biases = -minimum.to(scale.dtype)
        return {
            "weight": to_words(codes).view(torch.uint32),
            "scales": scale.repeat_interleave(times, dim=1),
            "biases": biases.repeat_interleave(times, dim=1),
        }

    def fused(self, config: Mapping[str, Any], modules: Collection[str]) -> list[Fused]:
        return mlx_stacks(modules, _layout(config))

    def fuse(self, fused: Fused, encoded: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        tensors = {}
        for part in encoded[fused.modules[0]]:
            linears = {name: parts[part] for name, parts in encoded.items()}
            if any(tensor.dtype == torch.float32 for tensor in linears.values()):  # see `encode`
                linears = {name: tensor.float() for name, tensor in linears.items()}
            tensors[f"{fused.name}.{part}"] = fused.join(linears.__getitem__)
        return tensors

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found = {}
        rope = config.get("rope_parameters") or {}
        if "rope_theta" in rope and "rope_theta" not in config:
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            usual = scaling.get("rope_type", "default") == "default"
            found = {"rope_theta": rope["rope_theta"], **({} if usual else {"rope_scaling": scaling})}
        if "num_local_experts" in config:
            found["num_experts"] = config["num_local_experts"]
        return found

    def quantization(self, layers: Mapping[str, Layer], dense: Iterable[str]) -> dict[str, Any]:
        said = {name: _said(layer) for name, layer in layers.items()}
        kinds = list(said.values())
        usual = max(kinds, key=kinds.count)
        config = {**usual, **{name: own for name, own in said.items() if own != usual}}
        return {"quantization": config, "quantization_config": dict(config)}


def _layout(config: Mapping[str, Any]) -> ExpertLayout:
    topology = find_topology(dict(config))
    return (topology and topology.experts) or ExpertLayout()


def _experts(source: Source, module: str) -> int:
    shape = source.info(f"{module}.scales").shape
    if len(shape) != 3 or not 0 < shape[0] <= MAX_EXPERTS:
        raise BadInput(f"{module}.scales: {shape}; [experts, rows, groups] with 1 to {MAX_EXPERTS} experts is expected")
    return shape[0]


def _part(source: Source, module: str, part: str, *dtypes: torch.dtype) -> Tensor:
    return tensor_named(source, f"{module}.{part}", 2, *dtypes)


def _slice(stack: Callable[[str], Tensor], module: str, expert: int, part: str, *dtypes: torch.dtype) -> Tensor:
    """One expert's of a stack."""
    tensor = stack(f"{module}.{part}")
    if tensor.dim() != 3 or tensor.dtype not in dtypes or expert >= len(tensor):
        raise BadInput(f"{module}.{part}: {tensor.dtype} {tuple(tensor.shape)}, which is no stack of experts")
    return tensor[expert].clone()


def _said(layer: Layer) -> dict[str, Any]:
    mode = layer.format.name if layer.format.name in _MODES else "affine"
    width = layer.format.scaling.width(layer.shape[1])
    return {"group_size": width if width in SIZES else _divisor(width), "bits": layer.format.bits, "mode": mode}


def _divisor(width: int) -> int | None:
    """The size of MLX's that a wider group is cut into."""
    return next((size for size in (64, 128, 32) if width % size == 0), None)


def _float(words: Tensor, scales: Tensor, mode: str) -> Stored:
    if mode not in _MODES or scales.dtype != torch.uint8:
        raise Unsupported(f"MLX mode {mode!r} with scales of {scales.dtype} is not read by fewbits")
    bits = _MODES[mode][0]
    columns = words.shape[1] * 32 // bits
    packed = from_words(words, bits, columns)
    codes = from_e2m1(packed) if bits == 4 else from_e4m3(packed.view(torch.float8_e4m3fn))
    if mode != "nvfp4":
        return Stored(format=parse_format(mode), shape=(len(words), columns), state={"codes": codes, "scale": scales})
    state = {"codes": codes, "scale": scales.view(torch.float8_e4m3fn), "scale_outer": torch.ones(1)}
    return Stored(format=parse_format("nvfp4"), shape=(len(words), columns), state=state)


CODEC = MLX()
