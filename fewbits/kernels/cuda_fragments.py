"""Weights of 2, 3, 4 and 8 bits on an NVIDIA GPU (compute capability 8.0 up), in the tensor cores' own order.

Layout, bit tricks and the three kernels are told in fragments.py. Here is which formats they take, what is kept of a
weight, and which kernel multiplies how many tokens: what was measured (tuned.py), else `few` up to 16 tokens, `many` up
to 256 (Hopper), and from there the weight is decoded once for a dense product of cuBLAS's.

Accuracy, on Gaussian data against float32: 55 dB where sums are kept in float32 and only x and y are bfloat16, as in
`few` and, where that is as fast, in `many`; 52 dB where a weight times its scale is rounded to bfloat16 as well, as it
is in a dense product. With float16 in and out 70 and 65 dB; x that float16 cannot hold is the caller's to see.

Inputs that are rounded to E4M3 token by token meet 4-bit integers in Hopper's FP8 tensor cores, 52 dB from the product
of the very rounded inputs; from some 128 tokens on, where it saves time, with levels times scales rounded to E4M3 as
well: 31 dB. (Weights of 4 bits lose .2 to .3 dB by that rounding, LOG.md, 2026-12-01.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, library
from torch.nn import functional

from fewbits.formats import Format, Quantized
from fewbits.formats.scales import PlainScale
from fewbits.kernels import e4m3_tokens, fragment_layout, fragments, nvrtc, tuned
from fewbits.kernels.base import Bound, LinearSpec, No, Packed, Yes, affine, middle_code, split_levels, whole_tokens
from fewbits.kernels.fragment_choices import Config
from fewbits.kernels.fragment_layout import Layout

_MOST_E4M3_COLUMNS = 512  # of a unit, for two of them to lie in shared memory
_ZERO_GROUP = 128  # columns to a group where a whole row has one zero point


@lru_cache(maxsize=1024)  # asked at every product
def layout_of(format: Format, columns: int, half: bool) -> Layout | No:
    """What of `format` the kernels are compiled for, or why they are not."""
    scaling, table = format.scaling, affine(format) is not None
    if scaling.minimum or scaling.block not in ("group", "channel", "tensor"):
        no = affine(format)
        return no if no is not None else No(f"it has no scales per {scaling.block}")
    if table and format.bits > 4:
        return No(f"{format.grid.name} has more levels than its tables of 16")
    if (table and format.bits not in (2, 3, 4)) or format.bits not in (2, 3, 4, 8):
        return No(f"it has no order for {format.bits} bits")
    group = scaling.group_size if scaling.block == "group" else None
    if group is None or group >= columns:
        group = _ZERO_GROUP if scaling.zero_point else 0
    if group % 16:
        return No(f"groups of {group} columns are no multiple of 16")
    offset = 0 if table or scaling.zero_point else middle_code(format)
    return Layout(bits=format.bits, table=table, group=group, zero=scaling.zero_point, offset=offset, half=half)


@lru_cache(maxsize=16)
def _gpu(device: int) -> tuple[str, int, int, int]:
    """Name, major compute capability, multiprocessors, bytes of shared memory that a thread block can have."""
    gpu = torch.cuda.get_device_properties(device)
    return gpu.name, gpu.major, gpu.multi_processor_count, gpu.shared_memory_per_block_optin


def config_for(layout: Layout, n: int, k: int, m: int, device: int) -> Config | None:
    """The kernel and its choices for m tokens; None: decode once and multiply by a dense product."""
    name, major, multiprocessors, limit = _gpu(device)
    return tuned.choice(name, major, layout, n, k, m, multiprocessors, limit)


@library.custom_op("fewbits::fragments_linear", mutates_args=(), device_types="cuda")
def fragments_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, alpha: Tensor, table: Tensor | None, bits: int,
    group: int, offset: int,
) -> Tensor:  # fmt: skip
    """x [M, K] bfloat16 or float16, contiguous -> [M, N], N = len(alpha); the rest as fragment_layout.py packs it."""
    if x.data_ptr() % 16:
        x = x.clone()
    half = x.dtype == torch.float16
    layout = Layout(bits=bits, table=table is not None, group=group, zero=zero is not None, offset=offset, half=half)
    weight = fragments.Packed(
        words=words, scale=scale, zero=zero, alpha=alpha, table=None if table is None else table[int(half)],
        n=alpha.shape[0], k=x.shape[1],
    )  # fmt: skip
    config = config_for(layout, weight.n, weight.k, x.shape[0], x.device.index)
    return fragments.product(x, weight, layout, config)


@fragments_linear.register_fake
def _(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, alpha: Tensor, table: Tensor | None, bits: int,
    group: int, offset: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], alpha.shape[0])


@lru_cache(maxsize=1024)
def layout_for(spec: LinearSpec) -> Layout | No:
    """`layout_of` a product. E4M3 times E4M3 it is of 4-bit integers with inputs rounded token by token, on Hopper."""
    inputs, layout = spec.activations, layout_of(spec.format, spec.shape[1], spec.dtype == torch.float16)
    if inputs is None or isinstance(layout, No) or torch.cuda.get_device_capability(spec.device)[0] != 9:
        return layout
    by_token = inputs.scaling.block == "token" and inputs.scaling.store == PlainScale()
    whole = layout.bits == 4 and not layout.table and layout.group % 32 == 0 and layout.unit <= _MOST_E4M3_COLUMNS
    return dataclasses.replace(layout, e4m3=inputs.grid.name == "fp8_e4m3" and by_token and whole)


@library.custom_op("fewbits::fragments_e4m3_linear", mutates_args=(), device_types="cuda")
def fragments_e4m3_linear(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, alpha: Tensor, group: int, offset: int
) -> Tensor:
    """x [M, K] in 16 or 32 bits, M > 0, of any row stride -> [M, N] float16 where x is, else bfloat16.

    Weights of 4 bits and consecutive levels, as fragment_layout.py packs them; x is rounded to E4M3 token by token.
    """
    layout = Layout(
        bits=4, table=False, group=group, zero=zero is not None, offset=offset, half=x.dtype == torch.float16, e4m3=True
    )
    weight = fragments.Packed(
        words=words, scale=scale, zero=zero, alpha=alpha, table=None, n=alpha.shape[0], k=x.shape[1]
    )
    config = config_for(layout, weight.n, weight.k, x.shape[0], x.device.index)
    return fragments.product(e4m3_tokens.round_tokens(x, layout.part), weight, layout, config)


@fragments_e4m3_linear.register_fake
def _(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, alpha: Tensor, group: int, offset: int) -> Tensor:
    dtype = torch.float16 if x.dtype == torch.float16 else torch.bfloat16
    return x.new_empty(x.shape[0], alpha.shape[0], dtype=dtype)


class CudaFragments:
    name = "cuda_fragments"
    floor_db = 45.0  # 28 with E4M3 inputs and many tokens
    input_dtype: torch.dtype | None = torch.bfloat16
    recovers_codes = True

    def accepts(self, spec: LinearSpec) -> Yes | No:
        if spec.device.type != "cuda" or torch.version.hip is not None:
            return No(f"runs on NVIDIA GPUs, not on {spec.device.type if torch.version.hip is None else 'AMD'}")
        if (no := whole_tokens(spec)) is not None:
            return no
        if isinstance(layout := layout_of(spec.format, spec.shape[1], False), No):
            return layout
        if (reason := nvrtc.available()) is not None:
            return No(reason)
        major, minor = torch.cuda.get_device_capability(spec.device)
        if major < 8:
            return No(f"it needs compute capability 8.0, this GPU has {major}.{minor}")
        own = layout_for(spec)  # asks the GPU
        products = "products in 16 bits"
        if isinstance(own, Layout) and own.e4m3:
            products = "E4M3 products, for many tokens of weights rounded to it once more"
        return Yes(f"{spec.format.bits} bits per weight in memory, {products}")

    def prepack(self, weight: Quantized) -> Packed:
        rows, columns = weight.shape
        layout = layout_of(weight.format, columns, False)
        assert isinstance(layout, Layout)
        if weight.codes.is_cuda:
            nvrtc.counters(weight.codes.device.index)  # allocates, which nothing can while a graph is captured
        padded = columns + -columns % 8
        scale, zero = weight.scale.expand(rows, -1), weight.zero
        if zero is not None and scale.shape[1] == 1:  # one zero point for a row: as many as it has groups
            groups = -(-columns // layout.group)
            scale, zero = scale.expand(-1, groups), zero.expand(rows, groups)
        codes = functional.pad(weight.codes, (0, padded - columns))
        scales, alpha = fragment_layout.pack_scales(scale, padded, layout)
        packed = {"weight": fragment_layout.pack(codes, layout), "scales": scales, "alpha": alpha}
        if zero is not None:
            packed["zeros"] = fragment_layout.pack_groups(zero, padded, layout)
        if layout.table:
            levels = torch.tensor(weight.format.grid.levels, device=codes.device)
            packed["table"] = torch.stack(
                [fragment_layout.pack_table(levels, half, layout.bits) for half in (False, True)]
            )
        nvrtc.settle(packed["weight"])
        return packed

    def codes(self, packed: Packed, spec: LinearSpec) -> Tensor:
        layout = layout_of(spec.format, spec.shape[1], False)
        assert isinstance(layout, Layout)
        return fragment_layout.unpack(packed["weight"], *spec.shape, layout)

    def linear(self, x: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        out, columns = spec.shape
        rows, token_scale = x.reshape(-1, columns), None
        if spec.activations is not None:
            layout = layout_for(spec)
            assert isinstance(layout, Layout)
            if layout.e4m3 and rows.shape[0]:
                rows = rows if rows.dtype in (torch.float16, torch.bfloat16) else rows.float()
                y: Tensor = fragments_e4m3_linear(
                    rows, packed["weight"], packed["scales"], packed.get("zeros"), packed["alpha"], layout.group,
                    layout.offset,
                )  # fmt: skip
                return y.to(x.dtype).reshape(*x.shape[:-1], out)
            rows, token_scale = split_levels(rows, spec.activations, packed)
        half = x.dtype == torch.float16 and token_scale is None
        y = self._multiply(rows.to(torch.float16 if half else torch.bfloat16), packed, spec)
        if token_scale is not None:
            y = y * token_scale
        return y.to(x.dtype).reshape(*x.shape[:-1], out)

    def _multiply(self, rows: Tensor, packed: Packed, spec: LinearSpec) -> Tensor:
        layout = layout_of(spec.format, spec.shape[1], False)
        assert isinstance(layout, Layout)
        if not rows.shape[0]:
            return rows.new_empty(0, spec.shape[0])
        if rows.shape[1] % 8:
            rows = functional.pad(rows, (0, -rows.shape[1] % 8))
        rows = rows.contiguous()
        y: Tensor = fragments_linear(
            rows, packed["weight"], packed["scales"], packed.get("zeros"), packed["alpha"], packed.get("table"),
            layout.bits, layout.group, layout.offset,
        )  # fmt: skip
        return y

    def bind(self, packed: Packed, spec: LinearSpec) -> Bound:
        if spec.activations is not None:
            return lambda x: self.linear(x, packed, spec)
        return lambda x: self._multiply(x, packed, spec)

    def join(self, parts: Sequence[Packed], specs: Sequence[LinearSpec]) -> tuple[Packed, list[Packed]] | None:
        rows = [spec.shape[0] for spec in specs]
        if any(count % fragment_layout.ROWS for count in rows):
            return None  # padded rows would come to lie between the parts
        if "table" in parts[0] and any(not torch.equal(part["table"], parts[0]["table"]) for part in parts):
            return None  # codebooks of their own
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "table"}
        if "table" in parts[0]:
            whole["table"] = parts[0]["table"]
        nvrtc.settle(whole["weight"])
        weights = whole["weight"].split([count // 16 for count in rows])
        return whole, [{**part, "weight": weight} for part, weight in zip(parts, weights, strict=True)]


KERNEL = CudaFragments()
