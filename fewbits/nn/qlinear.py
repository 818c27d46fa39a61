"""A linear layer whose weight is quantized: `y = x @ W.T + b`, and with a residual `y = x @ Q.T + (x @ A.T) @ B.T + b`.

Life of a QLinear:

1. *Canonical.* Buffers as `Format.layout` names them: `codes` (packed at true density), `scale`, with a zero
   point `zero`, and what a nested scale store needs, under exactly the names and shapes of the native
   checkpoint; `input_scale` where x is rounded by a static one. It can be built on the meta device, loaded, saved
   and moved.
2. *Prepacked.* `prepack()` asks the dispatcher for a kernel, gives it the weight, and drops `codes` where the
   kernel's own layout can give them back. `state_dict()` stays canonical: codes are recovered when it is
   asked for. The first `forward` prepacks a module that is not.

Casting a model (`model.half()`, `model.to(torch.bfloat16)`) changes the bias and nothing else here: scales
keep the dtype they were quantized with, because another rounding would move every weight. Moving to another
device goes back to canonical codes and prepacks there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.formats import Format, Quantized, hadamard
from fewbits.formats import bits as packing
from fewbits.formats.low_rank import LowRank, LowRankSpec
from fewbits.formats.outliers import Outliers, OutlierSpec, without
from fewbits.formats.rows import check_rows, fixed_params, input_layout, round_rows
from fewbits.formats.scales import State
from fewbits.kernels import KERNELS, Kernel, LinearSpec, No, Packed, Yes, choose, explain
from fewbits.kernels.base import multiplies_outliers, outliers_within


class QLinear(nn.Module):
    """`x [..., in] -> [..., out]` in x's dtype, with a weight stored in `format`.

    activations: a format that x is rounded to (formats/rows.py) before the product; or None.
    input_hadamard: orders of the Hadamard transform x goes through before that (formats/hadamard.py), or none; the
    weight, and `dequantize`, are those of the transformed x.
    residual: rank and dtype of a low-rank matrix that is added to what the codes stand for (formats/low_rank.py), or
    None; it multiplies the very x that the codes do, rounded where that is rounded.
    outliers: which columns of x are not rounded but multiplied in 16 bits (formats/outliers.py), or None.
    input_order: whether there is a buffer of that name, int32 [in]: before all else, channel c of x is taken from
    channel input_order[c].
    Tensors are allocated empty; fill them by `load_state_dict`, or use `from_quantized`.
    """

    codes: Tensor | None
    scale: Tensor
    bias: nn.Parameter | None
    input_order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: Format,
        bias: bool = False,
        activations: Format | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        input_hadamard: Sequence[int] = (),
        residual: LowRankSpec | None = None,
        outliers: OutlierSpec | None = None,
        input_order: bool = False,
    ) -> None:
        super().__init__()
        if activations is not None:
            check_rows(activations)
        self.in_features, self.out_features = in_features, out_features
        self.format, self.activations = format, activations
        self.input_hadamard = tuple(input_hadamard)
        self.kernel: str | None = None
        self._packed: Packed | None = None
        self._spec: LinearSpec | None = None
        self._stored = format.layout((out_features, in_features))
        self._inputs = input_layout(activations, in_features)
        for name, (shape, stored_as) in {**self._stored, **self._inputs}.items():
            self.register_buffer(name, torch.empty(shape, dtype=stored_as, device=device))
        self.residual_spec = residual
        if residual is not None:
            for name, size in residual.layout((out_features, in_features)).items():
                self.register_buffer(name, torch.empty(size, dtype=residual.dtype, device=device))
        self.outlier_spec = outliers
        if outliers is not None:
            for name, (size, stored_as) in outliers.layout((out_features, in_features)).items():
                self.register_buffer(name, torch.empty(size, dtype=stored_as, device=device))
        ordered = torch.empty(in_features, dtype=torch.int32, device=device) if input_order else None
        self.register_buffer("input_order", ordered)
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)

    @classmethod
    def from_quantized(
        cls,
        weight: Quantized,
        bias: Tensor | None = None,
        activations: Format | None = None,
        input_hadamard: Sequence[int] = (),
        residual: LowRank | None = None,
        outliers: Outliers | None = None,
        input_order: Tensor | None = None,
        inputs: State | None = None,
    ) -> QLinear:
        """A canonical module (not yet prepacked) holding `weight` and, for static activations, what `input_layout`
        names as `inputs`; the tensors are shared, not copied."""
        out_features, in_features = weight.shape
        module = cls(
            in_features, out_features, weight.format, bias is not None, activations,
            device="meta", input_hadamard=input_hadamard, residual=None if residual is None else residual.spec,
            outliers=None if outliers is None else outliers.spec,
            input_order=input_order is not None,
        )  # fmt: skip
        beside = [found.to_state() for found in (residual, outliers) if found is not None]
        for name, tensor in [item for state in (weight.to_state(), *beside, inputs or {}) for item in state.items()]:
            setattr(module, name, tensor)
        if input_order is not None:
            module.input_order = input_order.to(weight.codes.device, torch.int32)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return module

    @property
    def spec(self) -> LinearSpec:
        """What the dispatcher is asked."""
        return LinearSpec(
            format=self.format,
            shape=(self.out_features, self.in_features),
            device=self.scale.device,
            dtype=torch.float32 if self.bias is None else self.bias.dtype,
            activations=self.activations,
        )

    def explain(self) -> list[tuple[str, Yes | No]]:
        """Every kernel's answer to this layer, in order of preference."""
        return explain(self.spec)

    def prepack(self, kernel: Kernel | None = None) -> QLinear:
        """Hands the weight to `kernel` (default: the dispatcher's choice); returns self.

        Without an argument, a module that is prepacked already stays as it is.
        """
        if self._packed is not None:
            if kernel is None or kernel.name == self.kernel:
                return self
            self.unpack()
        # The first forward may come in inference mode; what is kept must be usable outside of it.
        with torch.inference_mode(False), torch.no_grad():
            weight = self.quantized()
            # A fitted codebook is known only now that the weight is here.
            spec = dataclasses.replace(self.spec, format=weight.format)
            kernel = kernel or choose(spec)
            self._packed = {**kernel.prepack(weight), **self.input_state()}
            if self.outliers is not None:
                self._packed |= outliers_within(kernel, self.outliers, spec)
            self._spec, self.kernel = spec, kernel.name
        if kernel.recovers_codes:
            self.codes = None
        return self

    def unpack(self) -> QLinear:
        """Back to canonical buffers; returns self."""
        self.codes = self._canonical_codes()
        self._packed = self._spec = self.kernel = None
        return self

    def quantized(self) -> Quantized:
        """The weight as codes, scale and zero."""
        state = {name: self._canonical_codes() if name == "codes" else getattr(self, name) for name in self._stored}
        return Quantized.from_state(self.format, (self.out_features, self.in_features), state)

    @property
    def residual(self) -> LowRank | None:
        """The low-rank matrix added to what the codes stand for."""
        if self.residual_spec is None:
            return None
        return LowRank(out=self.get_buffer("residual_out"), into=self.get_buffer("residual_in"))

    @property
    def outliers(self) -> Outliers | None:
        """The columns of x that are multiplied in 16 bits."""
        if self.outlier_spec is None:
            return None
        columns, weight = (self._buffers.get(f"outlier_{part}") for part in ("columns", "weight"))
        return Outliers(threshold=self.outlier_spec.threshold, columns=columns, weight=weight)

    def input_state(self) -> State:
        """The static parameters x is rounded with, by the names of `input_layout`."""
        return {name: getattr(self, name) for name in self._inputs}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [out, in], residual and fixed outlier columns included."""
        if self.outliers is not None:
            return self.outliers.dense(self.quantized().dequantize(dtype))
        if self.residual is None:
            return self.quantized().dequantize(dtype)
        return (self.quantized().dequantize() + self.residual.dense()).to(dtype)

    @property
    def packed(self) -> Packed | None:
        """What the kernel keeps, or None before `prepack`."""
        return self._packed

    @property
    def packed_spec(self) -> LinearSpec:
        """The spec the packed tensors were made for; only after `prepack`."""
        assert self._spec is not None
        return self._spec

    def adopt(self, packed: Packed) -> None:
        """Takes equal packed tensors that share memory with another layer's (see `Kernel.join`)."""
        assert self._packed is not None and packed.keys() == self._packed.keys()
        self._packed = packed

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is None:
            self.prepack()
        assert self._packed is not None and self._spec is not None and self.kernel is not None
        if self.input_order is not None:
            x = x.index_select(-1, self.input_order)
        if self.input_hadamard:
            x = hadamard.transform(x, self.input_hadamard)
        y = self.product(x)
        if self.residual is not None:
            y = y + self.residual.apply(rounded(x, self.activations, self._packed))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x [..., in] times the codes, with outlier columns apart; only after `prepack`."""
        assert self._packed is not None and self._spec is not None and self.kernel is not None
        kernel, outliers = KERNELS.get(self.kernel), self.outliers
        if outliers is None or multiplies_outliers(self._packed, x.dtype):
            y: Tensor = kernel.linear(x, self._packed, self._spec)
            return y
        rows = x.reshape(-1, self.in_features)
        columns = outliers.find(rows)
        if outliers.weight is not None:
            apart = outliers.product(rows, columns)
        else:  # the same codes under inputs that are not rounded
            only = rows - without(rows, columns)
            apart = kernel.linear(only, self._packed, dataclasses.replace(self._spec, activations=None)).float()
        if len(columns) < self.in_features:
            apart = apart + kernel.linear(without(rows, columns), self._packed, self._spec).float()
        return apart.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _canonical_codes(self) -> Tensor:
        if self.codes is not None:
            return self.codes
        assert self._packed is not None and self._spec is not None and self.kernel is not None
        return packing.pack(KERNELS.get(self.kernel).codes(self._packed, self._spec), self.format.bits)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.codes is None:
            destination[prefix + "codes"] = self._canonical_codes()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._packed is not None:
            self.unpack()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QLinear:
        target = fn(torch.empty(0, dtype=self.scale.dtype, device=self.scale.device)).device
        was_packed, moves = self._packed is not None, target != self.scale.device
        if was_packed and moves:
            self.unpack()
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(target)
        if was_packed and moves and target.type != "meta":
            self.prepack()
        return self

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        if self.activations is not None:
            text += f", activations={self.activations.name}"
        if self.input_hadamard:
            text += f", input_hadamard={'x'.join(map(str, self.input_hadamard))}"
        if self.residual_spec is not None:
            text += f", residual of rank {self.residual_spec.rank}"
        if self.outlier_spec is not None:
            count = self.outlier_spec.columns
            text += f", {'some' if count is None else count} columns in 16 bits"
        return f"{text}, format={self.format.name}, kernel={self.kernel or 'not yet chosen'}"


def rounded(x: Tensor, format: Format | None, packed: Packed) -> Tensor:
    """x [..., in] as a product of `packed` with activations in `format` sees it."""
    if format is None:
        return x
    return round_rows(x.reshape(-1, x.shape[-1]), format, fixed_params(packed)).reshape(x.shape).to(x.dtype)


def qlinears(model: nn.Module) -> Iterator[tuple[str, QLinear]]:
    """(name, module) of every QLinear in `model`."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, QLinear))
