"""`load`: whatever the user calls a model, as an ordinary transformers model and its tokenizer.

Dense models (a directory, a GGUF file, the embedded "demo", a hub id) are built without weights and given
them tensor by tensor. In a quantized checkpoint (native or compressed-tensors) every quantized linear becomes
a `QLinear` holding the very codes of the file, and is handed to the fastest kernel that takes it; nothing is
rounded again. Experts that transformers keeps in fused 3-D parameters have no linear to stand in for: they
are decoded into those parameters, and `Loaded.decoded` names them.

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

from fewbits.checkpoints import compressed_tensors, native
from fewbits.checkpoints.base import Source
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format, Quantized, hadamard
from fewbits.formats.low_rank import LowRank
from fewbits.formats.outliers import Outliers
from fewbits.models.skeleton import load_block, skeleton
from fewbits.models.topology import Topology, find_topology
from fewbits.models.walk import ExpertRef, blocks, linears
from fewbits.nn.qlinear import QLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in memory, and what was done to get it there."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source
    quantized: tuple[str, ...] = field(default=())  # modules that are QLinear now
    decoded: tuple[str, ...] = field(default=())  # quantized in the file, dense in memory


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
    model, quantized, decoded = load_model(source, target, dtype)
    return Loaded(model=model, tokenizer=tokenizer, source=source, quantized=quantized, decoded=decoded)


def default_dtype(source: Source, device: torch.device) -> torch.dtype:
    """float32 on a CPU without bfloat16 instructions, else the source's own."""
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    return source.dtype


def load_model(
    source: Source, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, tuple[str, ...], tuple[str, ...]]:
    """(model, names of its QLinears, names decoded to dense) of an opened source."""
    config = source.config()
    packed = quantized_modules(source)
    model: Any = skeleton(config)
    topology = find_topology(config)
    disk = _disk_names(model, topology)
    stray = sorted(set(packed.entries) - set(disk.values()))
    if stray:
        raise BadInput(
            f"{source.path}: quantized module {stray[0]!r} is not in the {config.get('model_type')} model "
            f"that config.json describes; {len(stray)} such modules"
        )
    replaced = {name: module for name, module in _linears(model) if disk[name] in packed.entries}
    for name in replaced:
        model.set_submodule(name, nn.Identity())
    decoded = tuple(sorted(set(packed.entries) - {disk[name] for name in replaced}))
    load_block(model, "", _Decoding(source, packed, decoded), dtype=dtype, device=device, topology=topology)
    for name, dense in replaced.items():
        module = packed.qlinear(disk[name], _bias(source, disk[name], dense, dtype))
        if (module.out_features, module.in_features) != (dense.out_features, dense.in_features):
            raise BadInput(
                f"{source.path}: {disk[name]} holds {module.out_features}x{module.in_features} weights; "
                f"config.json asks for {dense.out_features}x{dense.in_features}"
            )
        model.set_submodule(name, module.to(device).prepack())
    _finish(model, source, dtype, {name: model.get_submodule(name) for name in replaced})
    return model, tuple(replaced), decoded


class QuantizedModules:
    """The quantized linears of a checkpoint, whichever format they are stored in, decoded one at a time."""

    def __init__(self, source: Source, method: str | None, entries: dict[str, Any]) -> None:
        self.source, self.method, self.entries = source, method, entries

    def read(self, name: str) -> tuple[Quantized, Format | None]:
        """(weight, activation format or None) of module `name`."""
        try:
            if self.method == native.QUANT_METHOD:
                entry = self.entries[name]
                return native.decode(self.source, name, entry.format, entry.shape), entry.activations
            found = compressed_tensors.decode(self.source, name, self.entries[name])
        except BadInput as error:
            if name in str(error):
                raise
            raise BadInput(f"{self.source.path}: {name}: {error}") from error
        return found.weight, found.activations

    def input_hadamard(self, name: str) -> tuple[int, ...]:
        """Orders of the Hadamard transform that the module's input goes through; none: it goes through none."""
        orders: tuple[int, ...] = getattr(self.entries[name], "input_hadamard", ())
        return orders

    def residual(self, name: str) -> LowRank | None:
        """What is added to what the codes stand for."""
        return native.residual(self.source, name, self.entries[name]) if self.method == native.QUANT_METHOD else None

    def outliers(self, name: str) -> Outliers | None:
        """Which columns stay in 16 bits."""
        return native.outliers(self.source, name, self.entries[name]) if self.method == native.QUANT_METHOD else None

    def dense(self, name: str) -> Tensor:
        """The weight of module `name`, residual included, for its input as it is, untransformed."""
        weight, orders = self.read(name)[0].dequantize(), self.input_hadamard(name)
        residual = self.residual(name)
        weight = weight if residual is None else weight + residual.dense()
        outliers = self.outliers(name)
        weight = weight if outliers is None else outliers.dense(weight)
        return hadamard.transform(weight, orders, inverse=True) if orders else weight

    def qlinear(self, name: str, bias: Tensor | None) -> QLinear:
        weight, activations = self.read(name)
        return QLinear.from_quantized(
            weight, bias, activations, self.input_hadamard(name), self.residual(name), self.outliers(name)
        )


def quantized_modules(source: Source) -> QuantizedModules:
    """What `source` has quantized; empty for a dense one. Unsupported for a method fewbits does not read."""
    quantization = source.config().get("quantization_config")
    if not quantization:
        return QuantizedModules(source, None, {})
    method = quantization.get("quant_method")
    if method == native.QUANT_METHOD:
        return QuantizedModules(source, method, dict(native.read_modules(quantization)))
    if method == compressed_tensors.QUANT_METHOD:
        return QuantizedModules(source, method, compressed_tensors.quantized_modules(source))
    raise Unsupported(
        f"{source.path}: quant_method {method!r} is not read by fewbits (it reads {native.QUANT_METHOD} and "
        f"{compressed_tensors.QUANT_METHOD}); load it with transformers, or pass the original model"
    )


class _Decoding:
    """A source in which the weights of `modules` are dense: decoded when asked for."""

    def __init__(self, source: Source, packed: QuantizedModules, modules: tuple[str, ...]) -> None:
        self.path = source.path
        self._source, self._packed = source, packed
        self._weights = {f"{module}.weight": module for module in modules}

    def names(self) -> list[str]:
        return sorted({*self._source.names(), *self._weights})

    def tied(self) -> dict[str, str]:
        return self._source.tied()

    def tensor(self, name: str) -> Tensor:
        if name in self._weights:
            return self._packed.dense(self._weights[name])
        return self._source.tensor(name)


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
        entries = {
            name: native.module_entry(
                module.format,
                module.activations,
                (module.out_features, module.in_features),
                module.input_hadamard,
                module.residual_spec,
                module.outlier_spec,
            )
            for name, module in modules.items()
        }
        model.config.quantization_config = native.quantization_config(entries)
    generation = source.generation_config()
    if generation is not None and model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_dict(generation)
        except (TypeError, ValueError) as error:
            raise BadInput(f"{source.path}: generation_config.json is damaged: {error}") from error
    model.eval()


def _device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device(device or "cpu")
    except RuntimeError as error:
        raise BadInput(f"device {device!r}: {error}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device {device!r}: torch sees no CUDA device here; use cpu")
    return found
