"""Linear layers as bare functions: what the decode engine calls instead of modules.

A `Product` is one product of x [T, in] with one weight, or with several that read the same x, joined into one
taller weight where their kernel's layout allows it (`Kernel.join`; the modules then share its memory). Dense
16-bit weights on a CPU go through FBGEMM's float16 product (kernels/cpu_fp16.py): twice as fast as torch's
bfloat16 product at one row, and exact for bfloat16 weights within 17 binades of the row's largest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbits.formats import hadamard
from fewbits.formats.low_rank import LowRank
from fewbits.kernels import KERNELS, Kernel, LinearSpec
from fewbits.kernels.cpu_fp16 import half_linear, half_works, pack_half
from fewbits.nn.mixed_linear import MixedLinear
from fewbits.nn.qlinear import QLinear, rounded

Apply = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Product:
    """`apply(x [T, in] in dtype) -> y [T, out]`; `widths` are the rows of the weights it is made of."""

    apply: Apply
    dtype: torch.dtype
    widths: tuple[int, ...]


def product(*linears: nn.Module, dtype: torch.dtype = torch.float32, fast_head: bool = False) -> Product:
    """The product with all of `linears` (nn.Linear, QLinear or MixedLinear on one device, same input).

    dtype: of x where the kernel has no preference. fast_head: use the float16 product for a float32 weight on
    a CPU too (11 bits of mantissa; see the engine).
    """
    first = linears[0]
    if len(linears) > 1:
        return _joined(linears, dtype) or _side_by_side([product(linear, dtype=dtype) for linear in linears])
    if isinstance(first, QLinear):
        return _quantized(first, dtype)
    if isinstance(first, MixedLinear):
        return _mixed(first, dtype)
    assert isinstance(first, nn.Linear)
    return _dense([first], fast_head)


def _quantized(module: QLinear, dtype: torch.dtype) -> Product:
    packed, spec = module.prepack().packed, module.packed_spec
    assert packed is not None and module.kernel is not None
    kernel = KERNELS.get(module.kernel)
    bound = kernel.bind(packed, spec) if module.outlier_spec is None else module.product
    apply = _corrected(bound, module)
    apply = _biased(_ordered(_transformed(apply, module.input_hadamard), module.input_order), module.bias)
    return Product(apply, _input_dtype(kernel, spec, dtype), (module.out_features,))


def _mixed(module: MixedLinear, dtype: torch.dtype) -> Product:
    """The sum of the parts' products, each of its own columns of x."""
    parts = [(columns, _quantized(part, dtype)) for columns, part in zip(module.columns(), module.parts, strict=True)]

    def apply(x: Tensor) -> Tensor:
        found = [part.apply(x.index_select(-1, columns).to(part.dtype)) for columns, part in parts]
        return sum(found[1:], start=found[0])

    wanted = {part.dtype for _, part in parts}
    return Product(
        _biased(apply, module.bias), wanted.pop() if len(wanted) == 1 else torch.float32, (module.out_features,)
    )


def _input_dtype(kernel: Kernel, spec: LinearSpec, dtype: torch.dtype) -> torch.dtype:
    """The kernel's own, unless x is rounded to few bits there: rounding it to 16 before would move it across ties."""
    return torch.float32 if spec.activations is not None else kernel.input_dtype or dtype


def _transformed(apply: Apply, orders: Sequence[int]) -> Apply:
    return (lambda x: apply(hadamard.transform(x, orders))) if orders else apply


def _ordered(apply: Apply, order: Tensor | None) -> Apply:
    return apply if order is None else (lambda x: apply(x.index_select(-1, order)))


def _corrected(apply: Apply, module: QLinear) -> Apply:
    """`apply` and the residual of `module`, its factors in float32 once and for all."""
    if module.residual is None:
        return apply
    residual, packed = LowRank(out=module.residual.out.float(), into=module.residual.into.float()), module.packed
    assert packed is not None
    return lambda x: apply(x) + residual.apply(rounded(x.float(), module.activations, packed))


def _biased(apply: Apply, bias: Tensor | None) -> Apply:
    return apply if bias is None else lambda x: apply(x) + bias


def _dense(linears: Sequence[nn.Linear], fast_head: bool = False) -> Product:
    weights = [linear.weight.detach() for linear in linears]
    dtype, device = weights[0].dtype, weights[0].device
    widths = tuple(weight.shape[0] for weight in weights)
    bias = _joined_bias(linears)
    if device.type == "cpu" and half_works() and (dtype.itemsize == 2 or fast_head):
        packed = pack_half(weights[0] if len(weights) == 1 else torch.cat(weights))
        return Product(_biased(lambda x: half_linear(x, packed), bias), torch.float32, widths)
    assert len(weights) == 1
    weight = weights[0]
    return Product(lambda x: functional.linear(x, weight, bias), dtype, widths)


def _joined_bias(linears: Sequence[nn.Module]) -> Tensor | None:
    biases = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return None
    like = next(bias for bias in biases if bias is not None)
    return torch.cat(
        [
            like.new_zeros(linear.out_features) if bias is None else bias.detach()
            for linear, bias in zip(linears, biases, strict=True)
        ]
    )


def _joined(linears: Sequence[nn.Module], dtype: torch.dtype) -> Product | None:
    """One product for all of `linears`, or None where they differ in kind or their layout does not join."""
    if all(isinstance(linear, nn.Linear) for linear in linears):
        same = len({(linear.weight.dtype, linear.weight.device) for linear in linears}) == 1
        packs = linears[0].weight.dtype.itemsize == 2 and linears[0].weight.device.type == "cpu" and half_works()
        return _dense(linears) if same and packs else None
    if any(not isinstance(linear, QLinear) or _alone(linear) for linear in linears):
        return None
    if any(linear.input_state() for linear in linears):  # each with its own, which the whole has no place for
        return None
    specs = [linear.prepack().packed_spec for linear in linears]
    widths = tuple(spec.shape[0] for spec in specs)
    whole_spec = dataclasses.replace(specs[0], shape=(sum(widths), specs[0].shape[1]))
    alike = all(dataclasses.replace(spec, shape=whole_spec.shape) == whole_spec for spec in specs)
    if not alike or len({linear.kernel for linear in linears}) != 1:
        return None
    kernel = KERNELS.get(linears[0].kernel)
    joined = kernel.join([linear.packed for linear in linears], specs)
    if joined is None:
        return None
    packed, views = joined
    for linear, view in zip(linears, views, strict=True):
        linear.adopt(view)
    apply = _biased(kernel.bind(packed, whole_spec), _joined_bias(linears))
    return Product(apply, _input_dtype(kernel, whole_spec, dtype), widths)


def _alone(linear: QLinear) -> bool:
    """Whether more is done than a product with the codes."""
    moved = bool(linear.input_hadamard) or linear.input_order is not None
    return moved or linear.residual_spec is not None or linear.outlier_spec is not None


def _side_by_side(products: Sequence[Product]) -> Product:
    """Several products as one, each called in turn."""
    dtype = products[0].dtype
    widths = tuple(width for found in products for width in found.widths)

    def apply(x: Tensor) -> Tensor:
        parts = [found.apply(x.to(found.dtype)) for found in products]
        return torch.cat([part.to(parts[0].dtype) for part in parts], dim=-1)

    return Product(apply, dtype, widths)
