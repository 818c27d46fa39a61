"""A linear layer whose input channels are of several formats: `y = sum_k x[..., columns of k] @ Q_k.T + b`.

Each part is a `QLinear` of its columns, named by its number, and has its own kernel; `part` says which channel is in
which (formats/mix.py). Buffers have the names and shapes of the native checkpoint, `0.codes`, `0.scale`, ..., so the
module can be built on the meta device, loaded, saved and moved as a QLinear can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.formats.mix import PLACES, Mix, Mixed, columns_of, unpacked_places
from fewbits.nn.qlinear import QLinear


class MixedLinear(nn.Module):
    """`x [..., in] -> [..., out]` in x's dtype, with a weight stored in the formats of `mix`.

    Tensors are allocated empty; fill them by `load_state_dict`, or use `from_mixed`.
    """

    part: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mix: Mix,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, mix
        length, stored_as = mix.layout((out_features, in_features))[PLACES]
        self.register_buffer(PLACES, torch.empty(length, dtype=stored_as, device=device))
        for index, (format, columns) in enumerate(zip(mix.formats, mix.columns(in_features), strict=True)):
            self.add_module(str(index), QLinear(columns, out_features, format, device=device))
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self._columns: list[Tensor] | None = None

    @classmethod
    def from_mixed(cls, weight: Mixed, bias: Tensor | None = None) -> MixedLinear:
        """A module holding `weight`, its parts not yet prepacked; the tensors are shared, not copied."""
        out_features, in_features = weight.shape
        module = cls(in_features, out_features, weight.format, bias is not None, device="meta")
        module.part = weight.to_state()[PLACES]
        for index, part in enumerate(weight.parts):
            module.set_submodule(str(index), QLinear.from_quantized(part))
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    @property
    def parts(self) -> list[QLinear]:
        """The products, in the order of `format.formats`."""
        return [part for part in self.children() if isinstance(part, QLinear)]

    def columns(self) -> list[Tensor]:
        """The input channels of each part, int64, on the device of the weight."""
        if self._columns is None:
            with torch.inference_mode(False):  # the first forward may come in it
                places = unpacked_places(self.format, self.in_features, self.part)
                self._columns = columns_of(places, len(self.format.formats))
        return self._columns

    def prepack(self) -> MixedLinear:
        """Gives every part to its kernel; returns self."""
        for part in self.parts:
            part.prepack()
        return self

    def quantized(self) -> Mixed:
        """The weight as codes, scales and zeros."""
        parts = tuple(part.quantized() for part in self.parts)
        places = unpacked_places(self.format, self.in_features, self.part)
        return Mixed(format=self.format.of(parts), places=places, parts=parts)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out, in]."""
        return self.quantized().dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        products = [part(x.index_select(-1, columns)) for part, columns in zip(self.parts, self.columns(), strict=True)]
        y = sum(products[1:], start=products[0])
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._columns = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixedLinear:
        self._columns = None
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, format={self.format.name}"
