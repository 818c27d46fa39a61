"""8-bit products, rounding of tokens and decode attention on a GPU: how right, and how fast.

    python benchmarks/bench_gpu_w8a8_kv.py [--parts product shapes chains tokens kv] [--output FILE]      two minutes

Times are medians of CUDA-graph replays over buffers that together exceed the L2, on random data. Where several
divisions of the work are tried, the record keeps each; "default" is what the package takes by itself. The record goes
to benchmarks/results, or to FILE.
"""

# ruff: noqa: B023 (a function made in a loop is used before the loop goes on)

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import recorded
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewbits.core.errors import first_line
from fewbits.core.record import environment, write_json
from fewbits.kernels import cuda_attention
from fewbits.kernels import triton_attention as attention
from fewbits.kernels import triton_product as product
from fewbits.kernels import triton_quantize as quantize
from fewbits.kernels.decode_attention import decode_attention
from fewbits.kernels.kv_tiles import KVTiles
from fewbits.kernels.timing import microseconds
from fewbits.kernels.triton_product import Tiles
from fewbits.metrics.error import sqnr_db

GPU = torch.device("cuda")
INT8_RANGE = torch.int8, 127.5, -128.0, 127.0
FP8_RANGE = torch.float8_e4m3fn, 448.0, -448.0, 448.0
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)}  # 8B, [N, K]
HEADS, QUERIES, WIDTH = 8, 32, 128
TILES = [
    Tiles(m=256, n=128, k=128, warps=8, stages=3, parts=2),
    Tiles(m=256, n=128, k=128, warps=8, stages=3, parts=1),
    Tiles(m=256, n=128, k=128, warps=8, stages=4, parts=2),
    Tiles(m=256, n=128, k=128, warps=8, stages=4, parts=2, flat=False),
    Tiles(m=128, n=256, k=128, warps=8, stages=3, parts=1),
]


def attempt(calls: list[Callable[[], object]]) -> float | None:
    """`microseconds`, or None where the library or the compiler refuses."""
    try:
        return microseconds(calls)
    except Exception as error:  # RuntimeError, or whatever Triton makes of a shape it cannot compile
        print("   ", first_line(error))
        return None


def over(sets: list[Any], call: Callable[[Any], object], least: int = 1) -> list[Callable[[], object]]:
    """A call for each set, the whole round again until there are `least`."""
    return [lambda s=s: call(s) for s in sets] * -(-least // len(sets))


def best(rows: dict[str, float | None]) -> float:
    return min(us for us in rows.values() if us is not None)


def ceilings() -> dict[str, float]:
    big = [torch.randn(1 << 27, device=GPU) for _ in range(4)]
    read, mixed = (
        microseconds(over(big, torch.sum)),
        microseconds(over([0, 2], lambda i: torch.add(big[i], 1, out=big[i + 1]))),
    )
    a = [torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16) for _ in range(3)]
    matmul = microseconds(over([0, 1], lambda i: a[i] @ a[i + 1].t()))
    found = {
        "read_tb_per_s": round(2**29 / read / 1e6, 3),
        "read_and_write_tb_per_s": round(2**30 / mixed / 1e6, 3),
        "bf16_8192_tflop_per_s": round(2 * 8192**3 / matmul / 1e6, 1),
    }
    print(found)
    return found


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gaussian rows rounded as absmax scales round them, and scales."""
    top = 30 if dtype == torch.int8 else 100
    sides = [torch.randn(rows, k, device=GPU) * top for rows in (m, n)]
    sides = [side.round().clamp(-127, 127) if dtype == torch.int8 else side.clamp(-448, 448) for side in sides]
    x, w = (side.to(dtype) for side in sides)
    return x, w, torch.rand(m, device=GPU) * 0.01, torch.rand(n, device=GPU) * 0.01


def scaled_mm(s: tuple[Tensor, ...], fast: bool) -> Tensor:
    x, w, x_scale, w_scale = s
    return torch._scaled_mm(
        x, w.t(), x_scale[:, None], w_scale[None, :], out_dtype=torch.bfloat16, use_fast_accum=fast
    )  # fmt: skip


def own(s: tuple[Tensor, ...], tiles: Tiles | None = None) -> Tensor:
    return product.launch(*s, torch.bfloat16, tiles=tiles)


def products() -> dict[str, Any]:
    """INT8 8192^3, alone and as LLM.int8() with 7 outlier columns."""
    size, columns = 8192, 7
    sets = [operands(size, size, size, torch.int8) for _ in range(3)]
    rows: dict[str, float | None] = {"default": attempt(over(sets, own))}
    rows |= {str(tiles): attempt(over(sets, lambda s: own(s, tiles))) for tiles in TILES}
    torchs = microseconds(over(sets, lambda s: torch._int_mm(s[0], s[1].t())))
    exact = (sets[0][0][:256].double() @ sets[0][1].double().t()).float() * sets[0][2][:256, None] * sets[0][3]
    equal = torch.equal(product.launch(*sets[0], torch.float32)[:256], exact)

    x = [torch.randn(size, size, device=GPU).bfloat16() for _ in range(3)]
    chosen = (torch.arange(columns, device=GPU) * 1111).int()
    mask = torch.zeros(size, dtype=torch.int8, device=GPU).index_fill_(0, chosen.long(), 1)
    weights = torch.randn(size, 16, device=GPU).bfloat16()

    def w8a8(i: int) -> Tensor:
        q, scale, _ = quantize.quantize_tokens(x[i], *INT8_RANGE)
        return own((q, sets[i][1], scale, sets[i][3]))

    def llm_int8(i: int) -> Tensor:
        q, scale, apart = quantize.launch(x[i], *INT8_RANGE, mask=mask, outliers=chosen, r=16)
        return product.launch(q, sets[i][1], scale, sets[i][3], torch.bfloat16, apart, weights)

    whole, outliers = microseconds(over([0, 1, 2], w8a8)), microseconds(over([0, 1, 2], llm_int8))
    tops = {name: us and round(2 * size**3 / us / 1e6) for name, us in rows.items()}
    found = {
        "us": rows,
        "top_per_s": tops,
        "sums_exact": equal,
        "torch_int_mm_without_scales": {"us": torchs, "top_per_s": round(2 * size**3 / torchs / 1e6)},
        "w8a8_with_rounding_us": whole,
        "llm_int8_7_columns_us": outliers,
        "llm_int8_over_w8a8": round(outliers / whole, 3),
    }
    print("INT8 8192^3, TOP/s:", tops, "torch._int_mm", found["torch_int_mm_without_scales"], "exact", equal)
    print(f"  with rounding {whole} us, LLM.int8() {outliers} us, {outliers / whole:.3f} x")
    return found


def shapes() -> dict[str, Any]:
    """The linear layers of an 8B model, M = 4096, against cuBLAS bf16; E4M3 and INT8 with the rounding of x."""
    found: dict[str, Any] = {}
    for name, (n, k) in SHAPES.items():
        x = [torch.randn(4096, k, device=GPU).bfloat16() for _ in range(2)]
        w = [torch.randn(n, k, device=GPU).bfloat16() for _ in range(2)]
        bf16 = microseconds(over([0, 1], lambda i: functional.linear(x[i], w[i])))
        rows: dict[str, float | None] = {}
        for kind, dtype in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
            sets = [operands(4096, n, k, dtype) for _ in range(2)]
            if kind == "fp8":
                rows["fp8 _scaled_mm"] = attempt(over(sets, lambda s: scaled_mm(s, True)))
                rows["fp8 _scaled_mm, exact sums"] = attempt(over(sets, lambda s: scaled_mm(s, False)))
            rows[f"{kind} default"] = attempt(over(sets, own))
        rounding = microseconds(over(x, lambda x: quantize.quantize_tokens(x, *FP8_RANGE)))
        fp8 = best({kind: us for kind, us in rows.items() if "exact" not in kind and "fp8" in kind})
        int8 = rows["int8 default"]
        found[name] = {"bf16_us": bf16, "us": rows, "rounding_us": rounding}
        found[name]["fp8_over_bf16_with_rounding"] = round(bf16 / (fp8 + rounding), 2)
        found[name]["int8_over_bf16_with_rounding"] = int8 and round(bf16 / (int8 + rounding), 2)
        print(name, found[name])
    x, w, x_scale, w_scale = operands(512, 4096, 4096, torch.float8_e4m3fn)
    exact = (x.double() @ w.double().t()) * x_scale[:, None] * w_scale
    s = x, w, x_scale, w_scale
    found["fp8_sqnr_db"] = {
        "_scaled_mm": round(sqnr_db(exact, scaled_mm(s, True)), 1),
        "_scaled_mm, exact sums": round(sqnr_db(exact, scaled_mm(s, False)), 1),
        "own, float32 out": round(sqnr_db(exact, product.launch(*s, torch.float32)), 1),
    }
    few = {}
    for m in (1, 16, 64, 256):
        sets = [operands(m, *SHAPES["gate+up"], torch.int8) for _ in range(3)]
        few[m] = {"int8 default": attempt(over(sets, own))}
        if m > 16:
            few[m]["torch._int_mm"] = attempt(over(sets, lambda s: torch._int_mm(s[0], s[1].t())))
    found["gate+up_few_tokens_us"] = few
    print(found["fp8_sqnr_db"], few)
    return found


def chains() -> dict[str, Any]:
    """Layers of an 8B model with what comes before them, 4096 tokens: in bfloat16 by the fastest that torch has for it,
    and in E4M3 rounded on the way. Attention is in bfloat16 in both, and taken off the times of o."""
    weight = torch.rand(4096, device=GPU).bfloat16()
    shape = 1, QUERIES, 4096, WIDTH
    qkv = [[torch.randn(shape, device=GPU).bfloat16() for _ in range(3)] for _ in range(2)]
    before = {
        "rms_norm": lambda x: functional.rms_norm(x, (x.shape[1],), weight, 1e-5),
        "silu": lambda x: functional.silu(x[:, : x.shape[1] // 2]) * x[:, x.shape[1] // 2 :],
    }

    def attended(i: int) -> Tensor:
        y = functional.scaled_dot_product_attention(*qkv[i], is_causal=True)
        return y.transpose(1, 2).reshape(4096, -1)

    found: dict[str, Any] = {}
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        alone = microseconds(over([0, 1], attended))
        for name, (n, k) in SHAPES.items():
            w = [torch.randn(n, k, device=GPU).bfloat16() for _ in range(2)]
            sets = [operands(4096, n, k, torch.float8_e4m3fn) for _ in range(2)]
            kind = {"o": "attention", "down": "silu"}.get(name, "rms_norm")

            def fp8(i: int, x: Tensor, *given: Any) -> Tensor:
                q, scale, _ = quantize.quantize_tokens(x, *FP8_RANGE, *given)
                return scaled_mm((q, sets[i][1], scale, sets[i][3]), True)

            if kind == "attention":
                taken = alone
                sixteen = microseconds(over([0, 1], lambda i: functional.linear(attended(i), w[i])))
                eight = microseconds(over([0, 1], lambda i: fp8(i, attended(i))))
            else:
                taken, columns = 0.0, 2 * k if kind == "silu" else k
                x = [torch.randn(4096, columns, device=GPU).bfloat16() for _ in range(2)]
                ways = before[kind], torch.compile(before[kind], dynamic=False)
                sixteen = min(microseconds(over([0, 1], lambda i: functional.linear(way(x[i]), w[i]))) for way in ways)
                eight = microseconds(over([0, 1], lambda i: fp8(i, x[i], kind, weight, 1e-5)))
            found[name] = {
                "before": kind, "before_alone_us": taken, "bf16_us": sixteen,
                "fp8_us": eight, "fp8_over_bf16": round((sixteen - taken) / (eight - taken), 2),
            }  # fmt: skip
            print("with what comes before,", name, found[name])
    return found


def tokens() -> dict[str, Any]:
    """Rounding of 4096 tokens to INT8, alone and with what comes before it."""
    weight = torch.rand(14336, device=GPU).bfloat16()
    found: dict[str, Any] = {}
    for k in (4096, 14336):
        x = [torch.randn(4096, k, device=GPU).bfloat16() for _ in range(3)]
        wide = [torch.randn(4096, 2 * k, device=GPU).bfloat16() for _ in range(2)]
        norm = over(x, lambda x: functional.rms_norm(x, (k,), weight[:k], 1e-5))
        fused = over(x, lambda x: quantize.quantize_tokens(x, *INT8_RANGE, "rms_norm", weight[:k], 1e-5))
        gated = over(wide, lambda x: quantize.quantize_tokens(x, *INT8_RANGE, "silu"))
        found[str(k)] = {
            "alone_us": microseconds(over(x, lambda x: quantize.quantize_tokens(x, *INT8_RANGE))),
            "alone_by_triton_us": {
                w: microseconds(over(x, lambda x: quantize.launch(x, *INT8_RANGE, warps=w))) for w in (2, 4, 8)
            },
            "torch_rms_norm_us": microseconds(norm),
            "rms_norm_and_rounding_us": microseconds(fused),
            "silu_and_rounding_us": microseconds(gated),
        }
        print("rounding, K", k, found[str(k)])
    return found


def kv(length: int = 32768) -> dict[str, Any]:
    """Decode attention over `length` tokens, at the dimensions of an 8B model."""
    found: dict[str, Any] = {"tokens": length, "heads": HEADS, "query_heads": QUERIES, "width": WIDTH}
    for batch in (1, 16):
        q = torch.randn(batch, QUERIES, WIDTH, device=GPU).bfloat16()
        lengths = torch.full((batch,), length, dtype=torch.int32, device=GPU)
        shape = batch, HEADS, length, WIDTH
        copies = 3 if batch == 1 else 1
        least = 24 // batch  # calls in a graph, the same for all: starting one takes microseconds
        pairs = [[torch.randn(shape, device=GPU, dtype=torch.bfloat16) for _ in range(2)] for _ in range(copies)]
        splits = {f"x{some}": max(1, 132 * some // (HEADS * batch)) for some in (1, 2, 3, 4, 6)}
        sixteen: dict[str, float | None] = {}
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            with sdpa_kernel(backend):
                sixteen[f"sdpa {name}"] = attempt(
                    over(
                        pairs,
                        lambda p: functional.scaled_dot_product_attention(q[:, :, None], *p, enable_gqa=True),
                        least,
                    )
                )
        for name, count in {"default": 0, **splits}.items():
            sixteen[name] = attempt(over(pairs, lambda p: attention.launch_sixteen(q, *p, lengths, 0.09, count), least))
        fastest = best(sixteen)
        rate = 2 * pairs[0][0].nbytes / fastest / 1e6
        print(f"batch {batch}: bf16 {sixteen}: {fastest} us, {rate:.2f} TB/s")
        rows: dict[str, Any] = {"bf16": {"us": sixteen, "tb_per_s": round(rate, 2)}}
        pairs.clear()
        for bits in (8, 4):
            for group in (128, 32):
                sets = [random_tiles(batch, length, bits, group) for _ in range(6 if batch == 1 else 1)]
                us = {"default": attempt(over(sets, lambda s: decode_attention(q, *held(s), lengths, 0.09), least))}
                for teams in (2, 3, 4):
                    us[f"CUDA, {teams} teams"] = attempt(
                        over(sets, lambda s: cuda_attention.launch(q, *held(s), lengths, 0.09, teams=teams), least)
                    )
                for name, count in {"default": 0, **splits}.items():
                    us[f"Triton {name}"] = attempt(
                        over(sets, lambda s: attention.launch(q, *held(s), lengths, 0.09, count), least)
                    )
                row = {
                    "us": us,
                    "bits_per_number": 8 * sets[0].nbytes / (2 * torch.Size(shape).numel()),
                    "tb_per_s": round(sets[0].nbytes / best(us) / 1e6, 2),
                    "over_bf16_default": us["default"] and round(fastest / us["default"], 2),
                    "over_bf16_best": round(fastest / best(us), 2),
                }
                rows[f"int{bits}-g{group}"] = row
                print(f"  int{bits}-g{group}", row)
                sets.clear()
        found[f"batch {batch}"] = rows
    found["sqnr_db"] = accuracy()
    print(found["sqnr_db"])
    return found


def held(s: KVTiles) -> tuple[Tensor, ...]:
    return s.keys, s.key_params, s.values, s.value_params


def random_tiles(batch: int, length: int, bits: int, group: int) -> KVTiles:
    tiles = KVTiles.empty(batch, HEADS, length, WIDTH, bits, group, GPU)
    for codes in (tiles.keys, tiles.values):
        codes.view(torch.uint8).random_(0, 256)
    for params in (tiles.key_params, tiles.value_params):
        params.view(torch.float16).uniform_(0.1, 0.3)
    return tiles


def accuracy(length: int = 4000) -> dict[str, float]:
    """Decode attention against float64 over the same decoded cache, float32 out: what the kernel itself rounds."""
    found = {}
    q, lengths = torch.randn(1, QUERIES, WIDTH, device=GPU), torch.tensor([length], dtype=torch.int32, device=GPU)
    for bits in (8, 4):
        for group in (128, 32):
            tiles = random_tiles(1, length, bits, group)
            k, v = (tiles.dequantize(side, length)[0].double().repeat_interleave(4, 0) for side in ("keys", "values"))
            p = torch.softmax(torch.einsum("hd,hnd->hn", q[0].double(), k) * 0.09, -1)
            expected = torch.einsum("hn,hnd->hd", p, v)
            y = decode_attention(q, *held(tiles), lengths, 0.09)[0]
            found[f"int{bits}-g{group}"] = round(sqnr_db(expected, y), 1)
    return found


PARTS = {"product": products, "shapes": shapes, "chains": chains, "tokens": tokens, "kv": kv}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, help="the record's file; without it, one under benchmarks/results")
    options = parser.parse_args()
    record: dict[str, Any] = {"environment": environment(), "device": torch.cuda.get_device_name()}
    record["ceilings"] = ceilings()
    for name in options.parts:
        start = time.perf_counter()
        record[name] = PARTS[name]()
        torch.cuda.empty_cache()
        print(f"[{name}: {time.perf_counter() - start:.0f} s]", flush=True)
        if options.output:  # what is measured stays, whatever comes
            write_json(options.output, {"gpu_w8a8_kv": record})
    if not options.output:
        print(recorded.save("gpu_w8a8_kv", record))


if __name__ == "__main__":
    main()
