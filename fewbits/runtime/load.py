"""`load`: whatever the user calls a model, as an ordinary transformers model and its tokenizer.

Dense models (a directory, a GGUF file, the embedded "demo", a hub id) are built without weights and given
them tensor by tensor. In a quantized checkpoint (any of `fewbits list checkpoints`) every quantized linear becomes
a `QLinear` holding the very codes of the file, and is handed to the fastest kernel that takes it; nothing is
rounded again. Experts that transformers keeps in fused 3-D parameters have no linear to stand in for, nor have
quantized embeddings, and some files hold what none of our formats can say: those are decoded, and
`Loaded.decoded` names them.

Dtypes. On a CPU the default is float32: without bfloat16 instructions (AVX-512 BF16, AMX) torch multiplies
bfloat16 matrices with many rows tens of times slower than float32 ones, and the 4-bit and 8-bit kernels cast
x themselves. Elsewhere the default is the dtype the checkpoint states.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewbits.checkpoints import native
from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import Dense, QuantizedModules, StoredMix, quantized_modules
from fewbits.checkpoints.decoded import DecodedSource
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput
from fewbits.models.skeleton import load_block, skeleton
from fewbits.models.topology import Topology, find_topology
from fewbits.models.walk import ExpertRef, blocks, linears
from fewbits.nn.mixed_linear import MixedLinear
from fewbits.nn.qlinear import QLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in memory, and what was done to get it there."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    quantized: tuple[str, ...] = field(default=())  # modules that are QLinear, or several of them, now
    decoded: tuple[str, ...] = field(default=())  # quantized in the file, dense in memory
    notes: tuple[str, ...] = field(default=())  # what of the file is not in memory, or not as it was


def load(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer), ready to run: eval mode, kernels chosen.

    path: "demo", a directory, a .gguf file or a hub id. device: default "cpu". dtype: of what is not
    quantized and of the hidden states; default as the module's docstring says. Raises BadInput or Unsupported
    with the way out.
    """
    loaded = load_all(path, device, dtype)
    return loaded.model, loaded.tokenizer


def load_all(
    path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Loaded:
    """As `load`, with the account of what was loaded how."""
    source = open_source(path, allow_quantized=True)
    target = _device(device)
    dtype = dtype or default_dtype(source, target)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise BadInput(f"dtype {dtype}: hidden states are float32, bfloat16 or float16")
    tokenizer = source.load_tokenizer()
    model, quantized, decoded, notes = load_model(source, target, dtype)
    return Loaded(
        model=model, tokenizer=tokenizer, source=source, quantized=quantized, decoded=decoded, notes=notes
    )  # fmt: skip


def default_dtype(source: Source, device: torch.device) -> torch.dtype:
    """float32 on a CPU without bfloat16 instructions, else the source's own."""
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return source.dtype


def load_model(
    source: Source, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """(model, names of its QLinears, names decoded to dense, notes) of an opened source."""
    config = source.config()
    packed = quantized_modules(source)
    model: Any = skeleton(config)
    topology = find_topology(config)
    disk = _disk_names(model, topology)
    _check_modules(packed, model, disk, topology)
    linears = {name: module for name, module in _linears(model) if disk[name] in packed.entries}
    for name in linears:
        model.set_submodule(name, nn.Identity())
    decoded = sorted(set(packed.entries) - {disk[name] for name in linears})
    load_block(model, "", DecodedSource(packed, decoded), dtype=dtype, device=device, topology=topology)
    replaced, notes = {}, dict.fromkeys(packed.notes)
    for name, dense in linears.items():
        module = _module(packed, disk[name], dense, dtype)
        model.set_submodule(name, module.to(device))
        if isinstance(module, QLinear | MixedLinear):
            replaced[name] = module.prepack()
        else:
            decoded.append(disk[name])
        notes |= dict.fromkeys(packed.notes)
    _finish(model, source, dtype, replaced)
    return model, tuple(replaced), tuple(sorted(decoded)), tuple(notes)


def _check_modules(packed: QuantizedModules, model: Any, disk: dict[str, str], topology: Topology | None) -> None:
    to_disk = topology.disk_name if topology else (lambda name: name)
    parameters = {to_disk(name) for name, _ in model.named_parameters()}
    known = set(disk.values())
    stray = sorted(
        name for name, entry in packed.entries.items() if name not in known and entry.tensor not in parameters
    )
    if stray:
        kind = packed.source.config().get("model_type")
        raise BadInput(
            f"{packed.source.path}: quantized module {stray[0]!r} is not in the {kind} model that config.json "
            f"describes; {len(stray)} such modules"
        )


def _module(packed: QuantizedModules, name: str, dense: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """The linear that stands where `dense` (without its values) was."""
    found, bias = packed.read(name), _bias(packed.source, name, dense, dtype)
    shape = tuple(found.value.shape) if isinstance(found, Dense) else found.shape
    if shape != (dense.out_features, dense.in_features):
        raise BadInput(
            f"{packed.source.path}: {name} holds {'x'.join(map(str, shape))} weights; "
            f"config.json asks for {dense.out_features}x{dense.in_features}"
        )
    if isinstance(found, StoredMix):
        return MixedLinear.from_mixed(found.quantized(), bias)
    if not isinstance(found, Dense):
        return QLinear.from_quantized(
            found.quantized(), bias, found.activations, found.input_hadamard, found.residual, found.outliers,
            found.order, found.inputs,
        )  # fmt: skip
    dense.weight = nn.Parameter(found.dense(dtype), requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    return dense


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _disk_names(model: nn.Module, topology: Topology | None) -> dict[str, str]:
    """Matrix of the model -> module in the checkpoint, for linears and for experts in fused parameters."""
    to_disk = topology.disk_name if topology else (lambda name: name)
    names = {name: to_disk(name) for name, _ in _linears(model)}
    for prefix, block in blocks(model, topology):
        for ref in linears(block, topology):
            if isinstance(ref, ExpertRef):
                names[f"{prefix}.{ref.name}"] = f"{prefix}.{ref.disk_name}"
    return names


def _bias(source: Source, name: str, dense: nn.Linear, dtype: torch.dtype) -> Tensor | None:
    return None if dense.bias is None else source.tensor(f"{name}.bias").to(dtype)


def _finish(model: Any, source: Source, dtype: torch.dtype, modules: dict[str, Any]) -> None:
    """Configuration as `from_pretrained` leaves it; `save_pretrained` then writes a native checkpoint."""
    from transformers import GenerationConfig

    model.config.dtype = dtype
    model.config.name_or_path = source.path
    if modules:
        entries = {name: _entry(module) for name, module in modules.items()}
        model.config.quantization_config = native.quantization_config(entries)
    generation = source.generation_config()
    if generation is not None and model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_dict(generation)
        except (TypeError, ValueError) as error:
            raise BadInput(f"{source.path}: generation_config.json is damaged: {error}") from error
    model.eval()


def _entry(module: QLinear | MixedLinear) -> dict[str, Any]:
    """What a native checkpoint says of the module."""
    shape = (module.out_features, module.in_features)
    if isinstance(module, MixedLinear):
        return native.module_entry(module.format, None, shape)
    return native.module_entry(
        module.format, module.activations, shape, module.input_hadamard, module.residual_spec, module.outlier_spec,
        module.input_order is not None,
    )  # fmt: skip


def _device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device(device or "cpu")
    except RuntimeError as error:
        raise BadInput(f"device {device!r}: {error}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device {device!r}: torch sees no CUDA device here; use cpu")
    return found
