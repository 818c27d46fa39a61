"""Products with weights in the order of the tensor cores' registers, by three kernels.

A product with few tokens reads every weight once and multiplies it a few times, so its time is that of reading. What
keeps a kernel from it is work per weight: finding its place, turning an integer into a float, a way through shared
memory. Here none is left. The weight is stored in the order in which the threads of a warp hold the left operand of
`mma.m16n8k16` (CUDA PTX ISA, "Matrix fragments for mma.m16n8k16"; an order of Marlin's, arXiv 2408.11743), so that a
thread reads 16 bytes, all its own; and codes are packed so that one mask leaves two of them in two 16-bit floats.

With nothing but zeros around it a code is such a float: code * 2**-133 in bfloat16, code * 2**-24 in float16, for the
subnormal numbers and the first binade after them are evenly spaced, up to 255 and 2047. It may lie some bits higher,
where it counts 2, 4, ... times as much, so one shift serves several codes. (Usual is a code in the last bits of 128 or
1024, to which each has to be shifted, and which costs the sum digits.) `few` multiplies codes as they are, by tokens
times 2**64 if those are bfloat16, and takes the zero point times the sum of the group's tokens off the sum. In `many`
one fused multiplication and addition makes a code its level, exactly.

Scales of groups are float16 times a power of two a row (`alpha`), which is multiplied into the result. Packing is told
in fragment_layout.py, how the work is divided in fragment_choices.py; the kernels are in cuda/.

Sums within a group and over groups are float32 in `few`, and in `many` where `apart` is chosen; else it multiplies a
weight by its scale in 16 bits beforehand. Levels of tables are rounded to 16 bits in both.

Tokens that are rounded to E4M3 meet 4-bit integers in the FP8 tensor cores, which are twice as fast: 0000xxxx is the
E4M3 number x * 2**-9, for all x, so the same words take three instructions for eight weights. Sums of at most 128
columns are float32 from there on, for those tensor cores add with some 14 bits. Zero points are taken off at the end,
by a product of 16 bits with the sums of the tokens (e4m3_tokens.py). With many tokens the adding takes as long as the
multiplying; not `apart`, a level times its scale is rounded to E4M3, in `many` or once for `_scaled_mm`, and everything
is left to the tensor cores.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.kernels import nvrtc
from fewbits.kernels.e4m3_tokens import Rounded
from fewbits.kernels.fragment_choices import Config, Few, Many, sizes
from fewbits.kernels.fragment_layout import Layout


class _Weight(ctypes.Structure):
    _fields_ = [
        ("words", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("zero", ctypes.c_void_p), ("units", ctypes.c_int),
        ("tiles", ctypes.c_int),
    ]  # fmt: skip


def _wgmma(name: str, nt: int, kinds: str, sign: str = "1, 1, 0") -> str:
    """A function of wgmma for nt tokens: an asm statement needs its operands spelled out."""
    count = nt // 2
    acc = ",".join(f"%{i}" for i in range(count))
    a = ",".join(f"%{count + i}" for i in range(4))
    operands = ",".join(f'"+f"(d[{i}])' for i in range(count))
    return f"""DEVICE void {name}(float* d, const u32* a, u32 tokens, u32 add) {{
  asm volatile("{{.reg .pred p; .reg .b64 t; mov.b64 t, {{%{count + 4}, %{count + 6}}}; setp.ne.b32 p, %{count + 5}, 0;"
    "wgmma.mma_async.sync.aligned.m64n{nt}{kinds} {{{acc}}}, {{{a}}}, t, p, {sign};}}"
    : {operands} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(tokens), "r"(add), "n"(0x40000040));
}}
"""


def _products(nt: int, layout: Layout) -> str:
    """What `many` multiplies with: tokens in 16 bits, or E4M3 ones and the sums of their parts."""
    if layout.e4m3:
        minus = _wgmma("wgmma_minus", nt, "k16.f32.f16.f16", "-1, 1, 0")
        return _wgmma("wgmma", nt, "k32.f32.e4m3.e4m3", "1, 1") + minus
    dtype = "f16" if layout.half else "bf16"
    return _wgmma("wgmma", nt, f"k16.f32.{dtype}.{dtype}")


@lru_cache(maxsize=512)
def source(layout: Layout, config: Config | None) -> str:
    """The kernel of `config` for one layout; None: `dense`."""
    defined = {**layout.macros, **(config.macros if config else {"RT": 1})}
    text = nvrtc.program(defined, "fragments", config.name if config else "dense")
    return text.replace("@WGMMA@", _products(config.nt, layout)) if isinstance(config, Many) else text


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None or not tensor.numel() else tensor.data_ptr())


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A weight [n, k] as the kernels read it; k is a multiple of 8, x is padded to it."""

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    alpha: Tensor
    table: Tensor | None
    n: int
    k: int

    def argument(self) -> _Weight:
        words, scale, zero = (_pointer(tensor).value for tensor in (self.words, self.scale, self.zero))
        return _Weight(words, scale, zero, self.words.shape[1], self.words.shape[0])


def _maps(x: Tensor | Rounded, weight: Packed, layout: Layout, config: Many) -> tuple[nvrtc.Argument, ...]:
    """What `many` copies at once: of the tokens 128 bytes each; of all tiles of a block the words of 128 columns, the
    scales of a unit, and its zero points, or with E4M3 tokens whose sums are kept apart the sums of 64 parts."""
    tiles, rows = weight.words.shape[0], config.rows // 16
    tokens = x.levels if isinstance(x, Rounded) else x

    def of_tiles(values: Tensor | None, dtype: torch.dtype, columns: int) -> nvrtc.TensorMap:
        given = weight.words if values is None or not values.numel() else values  # what is not there is not read
        width = given.numel() * given.element_size() // (tiles * dtype.itemsize)
        return nvrtc.tensor_map_at(given.data_ptr(), dtype, tiles, width, (rows, columns), False)

    zeros = of_tiles(weight.zero, torch.int32, 4 * max(1, layout.groups))
    return (
        nvrtc.tensor_map(tokens, (config.nt, 128 // tokens.element_size())),
        of_tiles(weight.words, torch.int64, 32 * layout.bits),
        of_tiles(weight.scale, torch.int32, 8 * max(1, layout.groups)),
        nvrtc.tensor_map(x.sums, (config.nt, 64)) if isinstance(x, Rounded) and config.apart else zeros,
    )


def multiply(x: Tensor | Rounded, weight: Packed, layout: Layout, config: Config) -> Tensor:
    """x [M, k] of the layout's dtype, contiguous, or rounded to E4M3 -> [M, n] of that dtype, by `few` or `many`."""
    m, n, k = (x.levels if isinstance(x, Rounded) else x).shape[0], weight.n, weight.k
    y = torch.empty(m, n, dtype=torch.float16 if layout.half else torch.bfloat16, device=weight.words.device)
    run = nvrtc.kernel(source(layout, config), config.name, y.device.index)
    blocks, memory, sums = sizes(config, layout, n, k, m, run.multiprocessors)
    counted = ctypes.c_int(m), ctypes.c_int(n)
    held = weight.argument(), _pointer(weight.alpha), _pointer(weight.table)
    if isinstance(config, Few):
        assert isinstance(x, Tensor)
        arguments: tuple[nvrtc.Argument, ...] = (*held, _pointer(x), _pointer(y), *counted, ctypes.c_int(k))
    else:
        shared = torch.empty(sums, dtype=torch.float32, device=y.device) if sums else None
        counts = ctypes.c_void_p(nvrtc.counters(y.device.index) if sums else 0)
        maps = _maps(x, weight, layout, config)
        if isinstance(x, Rounded):
            maps += (_pointer(x.scale),)
        arguments = (*held, *maps, _pointer(y), _pointer(shared), counts, *counted)
    run.launch((blocks, 1), config.threads, memory, arguments)
    return y


def dense(weight: Packed, layout: Layout) -> Tensor:
    """The weight in 16 bits, [n, k]; with E4M3 tokens in E4M3, less alpha, [n, k to the next 16] in their order."""
    dtype = torch.float16 if layout.half else torch.bfloat16
    k = weight.k
    if layout.e4m3:
        dtype, k = torch.float8_e4m3fn, -(-k // 16) * 16
    out = torch.empty(weight.n, k, dtype=dtype, device=weight.words.device)
    run = nvrtc.kernel(source(layout, None), "dense", out.device.index)
    arguments = (
        weight.argument(), _pointer(weight.alpha), _pointer(weight.table), _pointer(out),
        ctypes.c_int(weight.n), ctypes.c_int(k),
    )  # fmt: skip
    warps = weight.words.shape[0] * weight.words.shape[1]
    run.launch((min(-(-warps // 8), 16 * run.multiprocessors), 1), 256, layout.table_bytes, arguments)
    return out


def product(x: Tensor | Rounded, weight: Packed, layout: Layout, config: Config | None) -> Tensor:
    """x [M, k] -> [M, n] by `config`'s kernel; None: the weight decoded once, and a dense product."""
    if config is not None:
        return multiply(x, weight, layout, config)
    if not isinstance(x, Rounded):
        return functional.linear(x, dense(weight, layout))
    levels, scale = x.levels.view(torch.float8_e4m3fn), x.scale[: x.levels.shape[0], None]
    y = torch._scaled_mm(
        levels, dense(weight, layout).t(), scale, weight.alpha[None, :], out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return y.half() if layout.half else y
