"""A model without its weights, and blocks that come and go.

`skeleton` builds the transformers model on torch's meta device: every module is there, no parameter takes
memory. `load_block` gives one module its parameters from a source, tensor by tensor; `release_block` takes
them away again. So a model of any size can be walked with one block in memory.

Some buffers are not in any checkpoint: rotary frequencies, computed when the model is built. They are made
real by transformers' own initialisation, and checked to have been.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbits.core.errors import BadInput, Unsupported, nearest_first
from fewbits.models.topology import Topology, find_topology
from fewbits.models.walk import ExpertRef, expert_refs

MAX_BUFFER = 1 << 27  # rotary frequencies take kilobytes, masks of old models megabytes


class TensorSource(Protocol):
    """What loading needs of a source: names, and tensors by name (tied names included)."""

    path: str

    def names(self) -> list[str]: ...

    def tied(self) -> dict[str, str]: ...

    def tensor(self, name: str) -> Tensor: ...


def skeleton(config: dict[str, Any], *, attention: str | None = None) -> nn.Module:
    """The causal language model of this ``config.json`` on the meta device, in eval mode.

    `attention` picks transformers' attention implementation ("sdpa", "eager", ...). Raises Unsupported for a
    model type transformers does not know, BadInput for a configuration it refuses.
    """
    from huggingface_hub.errors import StrictDataclassError  # what transformers' configurations check with
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise BadInput("config.json has no model_type: take the config.json that belongs to the model")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise Unsupported(
            f"model_type {str(model_type)[:80]!r} is not one transformers knows; upgrade transformers, or convert the "
            f"model to a type it has (code that comes with a model is never run)"
        )
    try:
        parsed = AutoConfig.for_model(model_type, **fields)
        options = {} if attention is None else {"attn_implementation": attention}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32, **options)
    except (
        StrictDataclassError,
        ArithmeticError,
        AssertionError,  # what torch's own modules check with
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:500]
        raise BadInput(f"config.json describes no {model_type} model that transformers can build: {reason}") from error
    model.requires_grad_(False)
    _make_computed_buffers_real(model)
    model.eval()
    assert isinstance(model, nn.Module)
    return model


def _make_computed_buffers_real(model: Any) -> None:
    owners: dict[str, nn.Module] = dict(model.named_modules())
    computed = list(model.named_non_persistent_buffers())
    largest = max((buffer.nbytes for _, buffer in computed), default=0)
    if largest > MAX_BUFFER:
        raise BadInput(f"config.json asks for a computed buffer of {largest} bytes; {MAX_BUFFER} are allowed")
    for name, buffer in computed:
        module, _, leaf = name.rpartition(".")
        fill = float("nan") if buffer.is_floating_point() else 0
        owners[module].register_buffer(leaf, torch.full_like(buffer, fill, device="cpu"), persistent=False)
    for module in {name.rpartition(".")[0] for name, _ in computed}:
        model._init_weights(owners[module])  # its parameters, if any, are on the meta device: nothing is drawn
    for name, buffer in model.named_non_persistent_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise Unsupported(f"{type(model).__name__}: transformers does not compute the buffer {name} on request")


@torch.no_grad()
def load_block(
    module: nn.Module,
    prefix: str,
    source: TensorSource,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    topology: Topology | None = None,
) -> None:
    """Gives every parameter and stored buffer of `module` its value from `source`.

    `prefix` is the module's name in the model ("" for the whole model). Floating-point tensors are cast to
    `dtype`. Experts that the checkpoint keeps apart are put together into the module's fused parameters.
    Parameters shared between submodules stay shared. Raises BadInput for a missing tensor or a wrong shape,
    by name.
    """
    stored = {*source.names(), *source.tied()}
    start = f"{prefix}." if prefix else ""
    made: dict[int, nn.Parameter] = {}
    for path, owner in module.named_modules():
        relative = f"{path}." if path else ""
        experts = list(expert_refs(f"{start}{path}", owner, topology))
        for name, parameter in owner.named_parameters(recurse=False):
            full = _disk_name(f"{start}{relative}{name}", topology)
            if id(parameter) not in made:
                refs = [ref for ref in experts if ref.parameter == name]
                if refs and full not in stored:
                    value = _assemble(refs, parameter, stored, source, _target(parameter, dtype), device)
                else:
                    value = _read(full, parameter, stored, source).to(device=device, dtype=_target(parameter, dtype))
                made[id(parameter)] = nn.Parameter(value, requires_grad=False)
            owner.register_parameter(name, made[id(parameter)])
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                value = _read(_disk_name(f"{start}{relative}{name}", topology), buffer, stored, source)
                owner.register_buffer(name, value.to(device=device, dtype=_target(buffer, dtype)))
            else:
                owner.register_buffer(name, buffer.to(device), persistent=False)


def release_block(module: nn.Module) -> None:
    """Takes the parameters and stored buffers of `module` back to the meta device, freeing their memory."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            owner.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        for name, buffer in owner.named_buffers(recurse=False):
            if name not in owner._non_persistent_buffers_set:
                owner.register_buffer(name, buffer.to("meta"))


def load_model(
    source: Any,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    attention: str | None = None,
) -> nn.Module:
    """The whole dense model of a `Source`, in `dtype` (default: the source's own), ready to run."""
    config = source.config()
    model = skeleton(config, attention=attention)
    load_block(model, "", source, dtype=dtype or source.dtype, device=device, topology=find_topology(config))
    return model


def _disk_name(name: str, topology: Topology | None) -> str:
    return topology.disk_name(name) if topology else name


def _target(like: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if like.is_floating_point() else like.dtype


def _missing(name: str, stored: set[str], source: TensorSource) -> BadInput:
    near = ", ".join(nearest_first(name, stored)[:3])
    return BadInput(f"{source.path}: the model needs tensor {name!r}, which is not there; nearest: {near}")


def _read(name: str, like: Tensor, stored: set[str], source: TensorSource) -> Tensor:
    if name not in stored:
        raise _missing(name, stored, source)
    value = source.tensor(name)
    if value.shape != like.shape:
        raise BadInput(
            f"{source.path}: tensor {name!r} has shape {list(value.shape)}; config.json asks for {list(like.shape)}"
        )
    return value


def _assemble(
    refs: list[ExpertRef],
    parameter: nn.Parameter,
    stored: set[str],
    source: TensorSource,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """The fused parameter, filled slice by slice from the experts' own tensors."""
    for ref in refs:  # before anything is allocated: the number of experts is only a claim
        if f"{ref.disk_name}.weight" not in stored:
            raise _missing(f"{ref.disk_name}.weight", stored, source)
    _read(f"{refs[0].disk_name}.weight", refs[0].slice_of(parameter), stored, source)
    fused = torch.empty(parameter.shape, dtype=dtype, device=device)
    for ref in refs:
        target = ref.slice_of(fused)
        target.copy_(_read(f"{ref.disk_name}.weight", target, stored, source))
    return fused
