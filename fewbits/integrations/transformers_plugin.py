"""quant_method "fewbits" for transformers: native checkpoints through `from_pretrained`.

    import fewbits
    model = AutoModelForCausalLM.from_pretrained("dir")      # config.json says quant_method "fewbits"

transformers builds the model on the meta device and asks the quantizer, before it reads weights, to change
what is to be different: every linear that config.json lists becomes a `QLinear` with empty canonical buffers,
whose names are those of the checkpoint, so transformers' own loader fills them. After loading the layers are
prepacked.

Limit: experts in fused 3-D parameters have no linear to replace. `fewbits.load` decodes those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbits.checkpoints import native
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats.mix import Mix
from fewbits.nn.mixed_linear import MixedLinear
from fewbits.nn.qlinear import QLinear, qlinears

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FewbitsConfig(QuantizationConfigMixin):
    """The `quantization_config` of a native checkpoint (fields: see fewbits.checkpoints.native)."""

    def __init__(self, version: int = native.VERSION, modules: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.quant_method = native.QUANT_METHOD
        self.version = version
        self.modules = dict(modules or {})
        native.read_modules({"version": version, "modules": self.modules})


class FewbitsQuantizer(HfQuantizer):
    """Puts `QLinear` modules in place before transformers loads the weights, and prepacks them after."""

    # Quantizing needs data and a pipeline of its own: `fewbits quantize` writes what this loads.
    requires_calibration = True
    quantization_config: FewbitsConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        modules = native.read_modules(self.quantization_config.to_dict())
        for name, entry in modules.items():
            linear = linears.get(name)
            if linear is None:
                raise Unsupported(
                    f"{name}: quantized in the checkpoint, but {type(model).__name__} has no linear of "
                    f"that name to replace (fused experts, for example); use fewbits.load, which decodes such tensors"
                )
            if entry.shape != (linear.out_features, linear.in_features):
                raise BadInput(f"{name}: quantized as {entry.shape}; the model has {tuple(linear.weight.shape)}")
            bias = linear.bias is not None
            if isinstance(entry.format, Mix):
                mixed = MixedLinear(
                    entry.shape[1], entry.shape[0], entry.format, bias, dtype=linear.weight.dtype, device="meta"
                )
                model.set_submodule(name, mixed)
                continue
            replacement = QLinear(
                entry.shape[1], entry.shape[0], entry.format, bias, entry.activations,
                dtype=linear.weight.dtype, device="meta", input_hadamard=entry.input_hadamard,
                residual=entry.residual, outliers=entry.outliers, input_order=entry.input_order,
            )  # fmt: skip
            model.set_submodule(name, replacement)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for _, module in qlinears(model):
            module.prepack()
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Enters config and quantizer into transformers' tables; once."""
    if native.QUANT_METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    register_quantization_config(native.QUANT_METHOD)(FewbitsConfig)
    register_quantizer(native.QUANT_METHOD)(FewbitsQuantizer)
