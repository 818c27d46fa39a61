"""Products of weights in few bits, timed beside the dense ones of cuBLAS and what others have installed here.

A contestant is a way to hold a weight [N, K] and to multiply x [M, K] by it. All of them get random data, CUDA graphs
and buffers that rotate past the L2 cache (kernels/timing.py). The roof is what reading the weight once, reading x and
writing y takes at the bandwidth measured in the same run. Beside its time every contestant has the signal-to-noise
ratio of its product: against float32 with the very weights it decodes (what the kernel adds), and against float32 with
the original Gaussian weights (what the format costs).

FP8 is given its activations rounded already; rounding them takes time that is not counted here. It is counted where a
format of ours says what inputs are rounded to (`int4-g128/fp8_e4m3-token`); such are asked for 16 tokens and more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.core.errors import Unsupported, first_line
from fewbits.formats import parse_format
from fewbits.formats.scheme import parse_scheme
from fewbits.kernels import KERNELS, LinearSpec, choose
from fewbits.kernels.timing import copies, microseconds, read_bandwidth
from fewbits.metrics.error import sqnr_db

SHAPES = {
    "8B qkv": (6144, 4096), "8B o": (4096, 4096), "8B gate+up": (28672, 4096), "8B down": (4096, 14336),
    "70B gate+up": (57344, 8192),
}  # fmt: skip
TOKENS = (1, 4, 16, 64, 256, 4096)
FORMATS = ("int4-g128", "int4-g128/fp8_e4m3-token")
Say = Callable[[str], None]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Held:
    """A weight as a contestant holds it: bytes it reads, its product, and the float32 weight it stands for."""

    bytes: int
    product: Product
    stands_for: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """`hold(w)` takes a bfloat16 weight [N, K]; `most`: tokens it is asked for."""

    name: str
    hold: Callable[[Tensor], Held]
    most: int = 1 << 20


def _ours(name: str) -> Contestant:
    scheme = parse_scheme(name)
    inputs = scheme.activations

    def hold(w: Tensor) -> Held:
        weight = scheme.weights.quantize(w.float())
        spec = LinearSpec(
            format=weight.format, shape=weight.shape, device=w.device, dtype=torch.bfloat16, activations=inputs
        )
        kernel = choose(spec)
        packed = kernel.prepack(weight)
        size = sum(part.numel() * part.element_size() for part in packed.values())
        return Held(
            bytes=size, product=lambda x: kernel.linear(x, packed, spec),
            stands_for=weight.dequantize() if w.numel() < 1 << 25 else None,
        )  # fmt: skip

    return Contestant(name=f"fewbits {name}", hold=hold)


def _cublas(w: Tensor) -> Held:
    return Held(bytes=2 * w.numel(), product=lambda x: functional.linear(x, w), stands_for=w.float())


def _to_e4m3(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and a scale a row."""
    scale = rows.float().abs().amax(1, keepdim=True) / 448
    return (rows.float() / scale).to(torch.float8_e4m3fn), scale


def _scaled_mm(rows: Tensor, token: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return torch._scaled_mm(rows, codes.t(), token, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True)


def _fp8(w: Tensor) -> Held:
    codes, scale = _to_e4m3(w)
    inputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # x too, whose id another tensor would have after it

    def product(x: Tensor) -> Tensor:
        if id(x) not in inputs:
            inputs[id(x)] = x, *_to_e4m3(x)
        _, rows, token = inputs[id(x)]
        return _scaled_mm(rows, token, codes, scale)

    return Held(bytes=w.numel(), product=product, stands_for=codes.float() * scale)


def _fp8_with_rounding(w: Tensor) -> Held:
    from fewbits.kernels.triton_quantize import quantize_tokens

    codes, scale = _to_e4m3(w)

    def product(x: Tensor) -> Tensor:
        rows, token, _ = quantize_tokens(x, torch.float8_e4m3fn, 448.0, -448.0, 448.0)
        return _scaled_mm(rows, token[:, None], codes, scale)

    return Held(bytes=w.numel(), product=product, stands_for=codes.float() * scale)


def _tinygemm(w: Tensor) -> Held:
    weight = parse_format("int4-g128").quantize(w.float())
    spec = LinearSpec(format=weight.format, shape=weight.shape, device=w.device, dtype=torch.bfloat16)
    kernel = KERNELS.get("cuda_int4")
    packed = kernel.prepack(weight)
    size = sum(packed[name].numel() * packed[name].element_size() for name in ("weight", "scales"))
    return Held(bytes=size, product=lambda x: kernel.linear(x, packed, spec), stands_for=weight.dequantize())


def _humming(w: Tensor) -> Held:
    from humming.layer import HummingLayer

    layer = HummingLayer(
        shape_n=w.shape[0], shape_k=w.shape[1], weight_config={"dtype": "int4", "group_size": 128},
        torch_dtype=torch.bfloat16,
    ).cuda()  # fmt: skip
    layer.load_from_unquantized(w)
    layer.transform()
    return Held(bytes=w.numel() // 2 + w.numel() // 64, product=layer)


def _bitsandbytes(w: Tensor) -> Held:
    import bitsandbytes.functional as bnb

    codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")

    def product(x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return bnb.gemv_4bit(x, codes.t(), state=state)
        return functional.linear(x, bnb.dequantize_4bit(codes, state))

    return Held(
        bytes=w.numel() // 2 + w.numel() // 16, product=product, stands_for=bnb.dequantize_4bit(codes, state).float()
    )


OTHERS = (
    Contestant(name="cuBLAS bf16", hold=_cublas),
    Contestant(name="FP8 _scaled_mm", hold=_fp8),
    Contestant(name="FP8, rounding too", hold=_fp8_with_rounding),
    Contestant(name="tinygemm", hold=_tinygemm, most=64),
    Contestant(name="Humming W4", hold=_humming),
    Contestant(name="bitsandbytes NF4", hold=_bitsandbytes),
)


def contestants(formats: Iterable[str]) -> list[Contestant]:
    return [*map(_ours, formats), *OTHERS]


def accuracy(contestant: Contestant, device: torch.device) -> dict[str, float]:
    """Decibels of a product of 1024 x 4096 with 8, 64 and 256 tokens, for which kernels differ, and what they round."""
    generator = torch.Generator(device).manual_seed(0)
    w = torch.randn(1024, 4096, device=device, generator=generator, dtype=torch.float32).bfloat16() * 0.02
    x = torch.randn(256, 4096, device=device, generator=generator, dtype=torch.float32).bfloat16()
    held = contestant.hold(w)
    found = {}
    for name, tokens in (("few", 8), ("many", 64), ("prompt", 256)):
        if tokens > contestant.most:
            continue
        y = held.product(x[:tokens].contiguous()).float()
        found[f"sqnr_{name}"] = sqnr_db(x[:tokens].float() @ w.float().t(), y)
        if held.stands_for is not None:
            found[f"kernel_sqnr_{name}"] = sqnr_db(x[:tokens].float() @ held.stands_for.t(), y)
    return found


def measure(
    formats: Sequence[str], shapes: dict[str, tuple[int, int]], tokens: Sequence[int], device: torch.device, say: Say
) -> dict[str, Any]:
    """The record of `fewbits bench kernels`: rows of contestant, shape, tokens, microseconds and the roof's."""
    if device.type != "cuda":
        raise Unsupported("kernels are timed on a CUDA device: run this on a machine with a GPU")
    asked_for = contestants(formats)
    bandwidth = read_bandwidth(device)
    say(f"read bandwidth {bandwidth / 1e12:.2f} TB/s")
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    exact: dict[str, dict[str, float]] = {}
    for contestant in asked_for:
        try:
            exact[contestant.name] = accuracy(contestant, device)
        except Exception as error:  # others' libraries may fail in any way: said, and left out
            absent[contestant.name] = first_line(error)
            say(f"{contestant.name}: not here ({absent[contestant.name]})")
            continue
        for shape, (n, k) in shapes.items():
            say(f"{contestant.name}, {shape}")
            asked = [m for m in tokens if m <= contestant.most]
            rows += _times(contestant, shape, n, k, asked, bandwidth, device)
    return {
        "kind": "kernel speed", "device": torch.cuda.get_device_name(device), "bandwidth": bandwidth,
        "shapes": {name: list(shape) for name, shape in shapes.items()}, "tokens": list(tokens), "rows": rows,
        "accuracy": exact, "absent": absent,
    }  # fmt: skip


def _times(
    contestant: Contestant, shape: str, n: int, k: int, tokens: Sequence[int], bandwidth: float, device: torch.device
) -> Iterator[dict[str, Any]]:
    if not tokens:
        return
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16) * 0.02
    first = contestant.hold(weight)
    held = [first, *(contestant.hold(weight) for _ in range(copies(first.bytes) - 1))]
    for m in tokens:
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        try:
            us = microseconds([lambda one=one: one.product(x) for one in (held if m < 1024 else held[:3])])  # noqa: B023
        except Exception as error:
            yield {"who": contestant.name, "shape": shape, "tokens": m, "failed": first_line(error)}
            torch.cuda.synchronize()
            continue
        roof = 1e6 * (first.bytes + 2 * m * (n + k)) / bandwidth
        yield {"who": contestant.name, "shape": shape, "tokens": m, "us": us, "roof_us": roof, "bytes": first.bytes}
