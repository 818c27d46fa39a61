"""gpt-oss's experts in MXFP4 (quant_method "mxfp4"), all of a block in one tensor.

    experts.gate_up_proj_blocks  uint8 [E, rows, in/32, 16]   two E2M1 codes a byte, the even column low
    experts.gate_up_proj_scales  uint8 [E, rows, in/32]       E8M0: 2**(s - 127)

and `down_proj` likewise; rows of gate_proj and up_proj take turns (fused_experts.py). The layout is for experts alone:
attention, routers, embeddings and head stay dense. It says nothing of its parameters in config.json but which modules
it leaves out, and no model but gpt-oss is read with it.

An expert is read as the linears it is made of. A block's two parameters are kept while its experts are read one after
the other: 0.4 GB of gpt-oss-20b, 1.6 GB of gpt-oss-120b.

Source: transformers 5.23 (integrations/mxfp4.py), OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import Codec, Entry, Layer, Stored, tensor_named
from fewbits.checkpoints.fused_experts import (
    GPT_OSS,
    Fused,
    gpt_oss_parameter,
    gpt_oss_parameters,
    is_gpt_oss_expert,
)
from fewbits.checkpoints.words import from_e2m1, to_e2m1
from fewbits.core.errors import BadInput
from fewbits.formats import Format, parse_format
from fewbits.models.walk import MAX_EXPERTS

FORMAT = "mxfp4"
_BLOCK, _BYTES = 32, 16
# As OpenAI's own checkpoints say it, whatever the number of blocks.
_DENSE = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


class _Slice(NamedTuple):
    """Where a linear lies: rows of a parameter that `read` gives as [E, rows, in/32, 17], a block's scale last."""

    read: Callable[[str], Tensor]
    fused: Fused
    expert: int
    place: int


class MXFP4(Codec):
    holds = "gpt-oss's experts, all of a block in one tensor; loads in transformers, vLLM, SGLang, mlx-lm"
    writes = True

    def claims(self, quantization: dict[str, Any]) -> bool:
        return bool(quantization.get("quant_method") == "mxfp4")

    def entries(self, source: Source) -> dict[str, Entry]:
        names, found = set(source.names()), {}
        read = lru_cache(maxsize=2)(lambda name: _encoded(source, name))
        for name in sorted(name.removesuffix("_blocks") for name in names if name.endswith("_blocks")):
            parts = (f"{name}_blocks", f"{name}_scales")
            if parts[1] not in names:
                continue
            fused = gpt_oss_parameter(name, _experts(source, parts[0]))
            for expert, modules in enumerate(fused.linears):
                for place, module in enumerate(modules):
                    about = _Slice(read, fused, expert, place)
                    found[module] = Entry(tensor=f"{module}.weight", parts=parts, about=about)
        return found

    def read(self, source: Source, module: str, entry: Entry) -> Stored:
        about: _Slice = entry.about
        return decode(about.fused.split(about.expert, about.place, about.read(about.fused.name)))

    def refuses_model(self, config: Mapping[str, Any]) -> str | None:
        kind = config.get("model_type")
        return None if kind == GPT_OSS else f"it is the layout of gpt-oss's experts, and this is a {kind} model"

    def takes(self, module: str) -> bool:
        return is_gpt_oss_expert(module)

    def refuses(self, stored: Stored) -> str | None:
        if not stored.plain:
            return "gpt-oss's MXFP4 has no quantized, transformed or reordered activations and no residuals"
        if stored.format.name != FORMAT:
            return f"gpt-oss's experts are MXFP4; this is {stored.format.name}"
        return None if stored.shape[1] % _BLOCK == 0 else f"blocks of {_BLOCK} do not divide {stored.shape[1]}"

    def nearest(self, layer: Layer) -> Format:
        return parse_format(FORMAT)

    def encode(self, stored: Stored) -> dict[str, Tensor]:
        """One linear: blocks uint8 [out, in/32, 16], scales uint8 [out, in/32]; `fuse` puts them together."""
        return {"blocks": blocks(stored.state["codes"]), "scales": stored.state["scale"]}

    def fused(self, config: Mapping[str, Any], modules: Collection[str]) -> list[Fused]:
        return gpt_oss_parameters(modules)

    def fuse(self, fused: Fused, encoded: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        tensors = {}
        for part in ("blocks", "scales"):
            linears = {name: parts[part] for name, parts in encoded.items()}
            tensors[f"{fused.name}_{part}"] = fused.join(linears.__getitem__)
        return tensors

    def quantization(self, layers: Mapping[str, Layer], dense: Iterable[str]) -> dict[str, Any]:
        return {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": list(_DENSE)}}


def blocks(codes: Tensor) -> Tensor:
    """uint8 [out, in/32, 16] from canonical codes [out, in/2]."""
    return to_e2m1(codes).view(len(codes), -1, _BYTES)


def decode(encoded: Tensor) -> Stored:
    """A linear from uint8 [out, in/32, 17]."""
    rows, groups = encoded.shape[:2]
    codes = from_e2m1(encoded[..., :_BYTES].reshape(rows, groups * _BYTES))
    state = {"codes": codes, "scale": encoded[..., _BYTES].contiguous()}
    return Stored(format=parse_format(FORMAT), shape=(rows, _BLOCK * groups), state=state)


def _experts(source: Source, name: str) -> int:
    shape = source.info(name).shape
    if len(shape) != 4 or not 0 < shape[0] <= MAX_EXPERTS:
        raise BadInput(f"{name}: {shape}; [experts, rows, blocks, 16] with 1 to {MAX_EXPERTS} experts is expected")
    return shape[0]


def _encoded(source: Source, name: str) -> Tensor:
    """A parameter as uint8 [E, rows, in/32, 17]; BadInput where its tensors are no MXFP4."""
    codes = tensor_named(source, f"{name}_blocks", 4, torch.uint8)
    scales = tensor_named(source, f"{name}_scales", 3, torch.uint8)
    if scales.shape != codes.shape[:3] or codes.shape[3] != _BYTES:
        raise BadInput(f"{name}: blocks {tuple(codes.shape)} with scales {tuple(scales.shape)} are no MXFP4")
    if bool((scales == 255).any()):
        raise BadInput(f"{name}_scales holds NaN (255): the checkpoint is damaged")
    if codes.shape[1] % len(gpt_oss_parameter(name, 1).modules):
        raise BadInput(f"{name}_blocks: {codes.shape[1]} rows are not as many of gate_proj as of up_proj")
    return torch.cat([codes, scales[..., None]], dim=-1)


CODEC = MXFP4()
