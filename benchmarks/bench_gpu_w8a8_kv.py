"""Sweeps the Triton kernels (8-bit products, rounding of tokens, decode attention) on one GPU, correctness first.

python benchmarks/bench_gpu_w8a8_kv.py [correct] [product] [fp8] [tokens] [kv]     about two minutes
"""

# ruff: noqa: B023 (what loops define is used before they go on)

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewbits.formats import parse_format
from fewbits.formats.kv import parse_kv
from fewbits.kernels import triton_attention as attention
from fewbits.kernels import triton_product as product
from fewbits.kernels import triton_quantize as quantize
from fewbits.kernels.kv_tiles import TILE, KVTiles
from fewbits.kernels.triton_product import Tiles

GPU = torch.device("cuda")
Call = Callable[[], object]
INT8_RANGE = torch.int8, 127.5, -128.0, 127.0


def micros(calls: list[Call], budget_ms: float = 60.0) -> float:
    """Median microseconds of a call: CUDA-graph replays over `calls`, each with buffers of its own."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    first = max(replay(), replay())
    times = sorted(replay() for _ in range(max(5, min(100, int(budget_ms / max(first, 1e-3))))))
    return times[len(times) // 2] * 1e3 / len(calls)


def attempt(name: str, calls: Callable[[], list[Call]]) -> float:
    try:
        return micros(calls())
    except Exception as error:
        print(f"    {name}: {type(error).__name__} {str(error).splitlines()[0][:110]}")
        torch.cuda.synchronize()
        return float("nan")


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def ceilings() -> None:
    big = [torch.randn(1 << 28, device=GPU, dtype=torch.bfloat16) for _ in range(3)]
    us = micros([lambda b=b: torch.sum(b.view(torch.int32), dtype=torch.int64) for b in big])
    copy = micros([lambda: big[0].copy_(big[1]), lambda: big[1].copy_(big[2])])
    print(f"read (torch.sum) {2**29 / us / 1e6:.2f} TB/s, copy {2**30 / copy / 1e6:.2f} TB/s")


def int8_pair(m: int, n: int, k: int, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, ...]:
    """Gaussian data rounded with a scale a row, as models give it."""
    if dtype == torch.int8:
        sides = [(torch.randn(r, k, device=GPU) * 30).round().clamp(-127, 127).to(dtype) for r in (m, n)]
    else:
        sides = [(torch.randn(r, k, device=GPU) * 100).clamp(-448, 448).to(dtype) for r in (m, n)]
    return *sides, torch.rand(m, device=GPU) * 0.01, torch.rand(n, device=GPU) * 0.01


def correct() -> None:
    torch.manual_seed(int(time.time()))
    form = parse_format("int8-token")
    for m, n, k in [(1, 33, 100), (17, 64, 576), (130, 1000, 4096), (257, 264, 14336), (70, 8, 32)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(m, k, device=GPU).to(dtype)
            x[0] *= 30
            scale, _ = form.params(x.float())
            codes = form.encode(x.float(), scale, None).short() - 128
            q, s, _ = quantize.quantize_tokens(x, torch.int8, 127.5, -128.0, 127.0)
            same = float((q[:, :k].short() == codes).double().mean()), float((s == scale[:, 0]).double().mean())
            w = torch.randint(-128, 128, (q.shape[1], n), device=GPU).t().contiguous().to(torch.int8)
            ws = torch.rand(n, device=GPU)
            y = product.scaled_product(q, w, s, ws, torch.float32)
            exact = (q.double() @ w.double().t()).float() * s[:, None] * ws
            ax, aw = torch.randn(m, 16, device=GPU).bfloat16(), torch.randn(n, 16, device=GPU).bfloat16()
            z = product.scaled_product(q, w, s, ws, torch.float32, ax, aw)
            ok = torch.equal(y, exact)
            bad = min(same) < 1 or not ok or error(z, exact.double() + ax.double() @ aw.double().t()) > 1e-6
            if bad:
                after = error(z, exact.double() + ax.double() @ aw.double().t())
                print(f"    {m, n, k} {dtype}: codes, scales {same}, product {error(y, exact):.1e}, apart {after:.1e}")
            f, fs, _ = quantize.quantize_tokens(x, torch.float8_e4m3fn, 448.0, -448.0, 448.0)
            wf = torch.randn(n, f.shape[1], device=GPU).to(torch.float8_e4m3fn)
            y = product.scaled_product(f, wf, fs, ws, torch.float32)
            expected = (f.double() @ wf.double().t()) * fs[:, None] * ws
            want = (x.float() / fs[:, None]).to(torch.float8_e4m3fn)
            if error(y, expected) > 2e-3 or not torch.equal(want.float(), f[:, :k].float()):
                print(f"    fp8 {m, n, k} {dtype}: {error(y, expected):.1e}, codes {error(f[:, :k], want):.1e}")
    x, weight = torch.randn(9, 4096, device=GPU).bfloat16(), torch.rand(4096, device=GPU).bfloat16()
    normed = weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)
    q, s, _ = quantize.quantize_tokens(x, torch.int8, 127.5, -128.0, 127.0, "rms_norm", weight, 1e-5)
    q2, s2, _ = quantize.quantize_tokens(normed, torch.int8, 127.5, -128.0, 127.0)
    print("rms_norm: codes equal", float((q == q2).double().mean()), "scales", float((s == s2).double().mean()))
    q, s, _ = quantize.quantize_tokens(x, torch.int8, 127.5, -128.0, 127.0, "silu")
    q2, s2, _ = quantize.quantize_tokens(functional.silu(x[:, :2048]) * x[:, 2048:], torch.int8, 127.5, -128.0, 127.0)
    print("silu: codes equal", float((q == q2).double().mean()), "scales", float((s == s2).double().mean()))
    worst = {}
    for bits in (4, 8):
        for group, d, ratio, length in [(128, 128, 4, 1000), (32, 128, 4, 4097), (64, 64, 3, 130), (32, 128, 8, 77)]:
            b, heads = 2, 2
            k = torch.randn(b, heads, length, d, device=GPU) * torch.rand(d, device=GPU) * 3
            v = torch.randn(b, heads, length, d, device=GPU) + 0.5
            kv = filled(k, v, bits, group)
            lengths = torch.tensor([length, length // 2 + 1], dtype=torch.int32, device=GPU)
            q = torch.randn(b, heads * ratio, d, device=GPU).bfloat16()
            y = attention.decode_attention(q, kv.keys, kv.key_params, kv.values, kv.value_params, lengths, d**-0.5)
            expected = plain(q, kv.dequantize("keys", length), kv.dequantize("values", length), lengths)
            worst[bits, group, d, ratio, length] = round(error(y, expected), 5)
    print("attention against float64, output bf16 (0.002 is its rounding):", worst)
    ops = torch.library.opcheck
    x, w, s, ws = int8_pair(40, 48, 64)
    ops(torch.ops.fewbits.scaled_product.default, (x, w, s, ws, torch.bfloat16))
    ops(torch.ops.fewbits.quantize_tokens.default, (torch.randn(5, 100, device=GPU), torch.int8, 127.5, -128.0, 127.0))
    ops(
        torch.ops.fewbits.decode_attention.default,
        (q, kv.keys, kv.key_params, kv.values, kv.value_params, lengths, 0.1),
    )
    print("opcheck passes")


def filled(k: torch.Tensor, v: torch.Tensor, bits: int, group: int) -> KVTiles:
    b, heads, length, d = k.shape
    form = parse_kv(f"int{bits}-g{group}").format(d)
    kv = KVTiles.empty(b, heads, length, d, bits, group, k.device)
    for side, x in (("keys", k), ("values", v)):
        z = form.quantize(x.reshape(-1, d))
        kv.put(side, *(t.reshape(b, heads, length, -1) for t in (z.codes, z.scale, z.zero)))
    return kv


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    ratio, out = q.shape[1] // k.shape[1], []
    for b, length in enumerate(lengths.tolist()):
        keys, values = (t[b, :, :length].double().repeat_interleave(ratio, 0) for t in (k, v))
        p = torch.softmax(torch.einsum("hd,hnd->hn", q[b].double(), keys) * q.shape[2] ** -0.5, -1)
        out.append(torch.einsum("hn,hnd->hd", p, values))
    return torch.stack(out)


INT8 = [
    Tiles(m=128, n=256, k=128, warps=8, stages=3, parts=2),
    Tiles(m=128, n=256, k=128, warps=8, stages=4, parts=2),
    Tiles(m=128, n=256, k=128, warps=8, stages=3, parts=1),
    Tiles(m=128, n=256, k=128, warps=8, stages=4, parts=2, flat=False),
    Tiles(m=128, n=256, k=128, warps=8, stages=3, parts=2, group=16),
    Tiles(m=256, n=128, k=128, warps=8, stages=3, parts=2),
    Tiles(m=128, n=128, k=128, warps=4, stages=3, per_sm=2, parts=1),
    Tiles(m=128, n=256, k=64, warps=8, stages=6, parts=2),
    Tiles(m=128, n=256, k=256, warps=8, stages=2, parts=2),
]
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate+up": (28672, 4096), "down": (4096, 14336)}


def products() -> None:
    size = 8192
    tera = 2 * size**3 / 1e6
    a = [torch.randn(size, size, device=GPU, dtype=torch.bfloat16) for _ in range(4)]
    us = micros([lambda i=i: a[i] @ a[i + 1].t() for i in range(3)])
    print(f"8192^3 cuBLAS bf16 {tera / us:.0f} TFLOP/s")
    a.clear()
    sets = [int8_pair(size, size, size) for _ in range(3)]
    us = attempt("_int_mm", lambda: [lambda s=s: torch._int_mm(s[0], s[1].t()) for s in sets])
    print(f"8192^3 torch._int_mm {tera / us:.0f} TOP/s")
    best = (0.0, INT8[0])
    for tiles in INT8:
        name = str(tiles).removeprefix("Tiles")
        us = attempt(name, lambda t=tiles: [lambda s=s: product.launch(*s, torch.bfloat16, tiles=t) for s in sets])
        print(f"8192^3 int8 {name} {tera / us:.0f} TOP/s")
        best = max(best, (tera / us, tiles), key=lambda found: found[0] if found[0] == found[0] else 0)
    tiles = best[1]
    x = [torch.randn(size, size, device=GPU).bfloat16() for _ in range(3)]
    apart_w = torch.randn(size, 16, device=GPU).bfloat16()
    columns = torch.arange(7, device=GPU, dtype=torch.int32) * 1111
    mask = torch.zeros(size, dtype=torch.int8, device=GPU)
    mask[columns.long()] = 1
    top = (torch.int8, 127.5, -128.0, 127.0)

    def whole(i: int, outliers: bool) -> None:
        more = ("none", None, 0.0, mask, columns, 16) if outliers else ()
        q, s, apart = quantize.quantize_tokens(x[i], *top, *more)
        sides = (apart, apart_w) if outliers else (None, None)
        product.launch(q, sets[i][1], s, sets[i][3], torch.bfloat16, *sides, tiles=tiles)

    alone = micros([lambda i=i: quantize.quantize_tokens(x[i], *top) for i in range(3)])
    without = attempt("w8a8", lambda: [lambda i=i: whole(i, False) for i in range(3)])
    apart = attempt("llm.int8", lambda: [lambda i=i: whole(i, True) for i in range(3)])
    print(
        f"8192^3 with rounding of x: W8A8 {without:.0f} us ({tera / without:.0f} TOP/s), LLM.int8() {apart:.0f} us "
        f"= {apart / without:.3f} x; rounding alone {alone:.1f} us = {3 * size**2 / alone / 1e6:.2f} TB/s"
    )


def fp8() -> None:
    m = 4096
    some = [
        Tiles(m=128, n=256, k=128, warps=8, stages=3, parts=2),
        Tiles(m=128, n=256, k=128, warps=8, stages=4, parts=2, flat=False),
        Tiles(m=256, n=128, k=128, warps=8, stages=3, parts=2),
        Tiles(m=128, n=128, k=128, warps=4, stages=3, per_sm=2),
    ]
    print("M = 4096, us: bf16 | _scaled_mm fast, exact | ours fp8 | ours int8 | rounding | bf16 / (fp8 + rounding)")
    for name, (n, k) in SHAPES.items():
        x = [torch.randn(m, k, device=GPU).bfloat16() for _ in range(2)]
        w = [torch.randn(n, k, device=GPU).bfloat16() for _ in range(2)]
        bf16 = micros([lambda i=i: functional.linear(x[i], w[i]) for i in range(2)])
        w.clear()
        sets = [int8_pair(m, n, k, torch.float8_e4m3fn) for _ in range(2)]
        fast, slow = (
            attempt("_scaled_mm", lambda f=f: [
                lambda s=s: torch._scaled_mm(
                    s[0], s[1].t(), s[2][:, None], s[3][None, :], out_dtype=torch.bfloat16, use_fast_accum=f
                ) for s in sets
            ]) for f in (True, False)
        )  # fmt: skip
        ours = [
            attempt("fp8", lambda t=t: [lambda s=s: product.launch(*s, torch.bfloat16, tiles=t) for s in sets])
            for t in some
        ]
        sets = [int8_pair(m, n, k) for _ in range(2)]
        int8 = [
            attempt("int8", lambda t=t: [lambda s=s: product.launch(*s, torch.bfloat16, tiles=t) for s in sets])
            for t in some
        ]
        rounding = micros([
            lambda i=i: quantize.quantize_tokens(x[i], torch.float8_e4m3fn, 448.0, -448.0, 448.0) for i in range(2)
        ])  # fmt: skip
        best = min(t for t in [fast, *ours] if t == t)
        print(
            f"{name:8} {bf16:.0f} | {fast:.0f} {slow:.0f} | {' '.join(f'{t:.0f}' for t in ours)} | "
            f"{' '.join(f'{t:.0f}' for t in int8)} | {rounding:.1f} | {bf16 / (best + rounding):.2f}"
        )
        if name == "qkv":
            s = int8_pair(256, n, k, torch.float8_e4m3fn)
            exact = (s[0].double() @ s[1].double().t()) * s[2][:, None] * s[3]
            found = [
                torch._scaled_mm(
                    s[0], s[1].t(), s[2][:, None], s[3][None, :], out_dtype=torch.bfloat16, use_fast_accum=f
                )
                for f in (True, False)
            ]
            mine = product.launch(*s, torch.bfloat16)
            print("  error: fast, exact sums, ours", [f"{error(y, exact):.5f}" for y in (*found, mine)])


def tokens() -> None:
    print("rounding of tokens, microseconds by warps (TB/s of the best); M = 4096")
    for k in (4096, 14336):
        x = [torch.randn(4096, k, device=GPU).bfloat16() for _ in range(3)]
        row = {
            warps: attempt("tokens", lambda w=warps: [
                lambda i=i: quantize._launch(x[i], *INT8_RANGE, "none", None, 0.0, None, None, 0, w)
                for i in range(3)
            ]) for warps in (4, 8, 16)
        }  # fmt: skip
        best = min(row.values())
        print(f"  K {k}", {w: round(t, 1) for w, t in row.items()}, f"{3 * 4096 * k / best / 1e6:.2f}")
    weight = torch.rand(4096, device=GPU).bfloat16()
    x = [torch.randn(4096, 4096, device=GPU).bfloat16() for _ in range(3)]
    norm = micros([lambda i=i: functional.rms_norm(x[i], (4096,), weight, 1e-5) for i in range(3)])
    fused = micros([
        lambda i=i: quantize.quantize_tokens(x[i], torch.int8, 127.5, -128.0, 127.0, "rms_norm", weight, 1e-5)
        for i in range(3)
    ])  # fmt: skip
    print(f"  rms_norm of torch {norm:.1f}, with rounding in one kernel {fused:.1f}")


def kv(length: int = 32768) -> None:
    heads, queries, d = 8, 32, 128
    print(f"decode attention, {length} tokens, {queries} on {heads} heads of {d}; microseconds")
    for batch in (1, 16):
        copies = 3 if batch == 1 else 1
        q = torch.randn(batch, queries, d, device=GPU).bfloat16()
        lengths = torch.full((batch,), length, dtype=torch.int32, device=GPU)
        pairs = [
            [torch.randn(batch, heads, length, d, device=GPU, dtype=torch.bfloat16) for _ in range(2)]
            for _ in range(copies)
        ]
        size = pairs[0][0].nbytes * 2
        rows = {}
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            with sdpa_kernel(backend):
                rows[f"sdpa {name} gqa"] = attempt(name, lambda: [
                    lambda p=p: functional.scaled_dot_product_attention(q[:, :, None], *p, enable_gqa=True)
                    for p in pairs
                ])  # fmt: skip
                rows[f"sdpa {name} 4 rows"] = attempt(name, lambda: [
                    lambda p=p: functional.scaled_dot_product_attention(q.view(batch, heads, 4, d), *p) for p in pairs
                ])  # fmt: skip
        for tile, stages in ((128, 2), (128, 3), (64, 4)):
            for per_sm in (1, 2, 4):
                splits = max(1, 132 * per_sm // (heads * batch))
                rows[f"ours bf16 tile {tile} stages {stages} x{per_sm}"] = attempt(f"bf16 {tile} {stages}", lambda: [
                    lambda p=p: attention.launch_sixteen(q, *p, lengths, 0.09, splits, stages, 4, tile)
                    for p in pairs
                ])  # fmt: skip
        best = min(t for t in rows.values() if t == t)
        print(f" batch {batch}: bf16, {size / 1e6:.0f} MB, best {best:.1f} us = {size / best / 1e6:.2f} TB/s")
        for name, us in rows.items():
            if "sdpa" in name or us < 1.1 * best:
                print(f"    {name:32} {us:.1f}")
        pairs.clear()
        for bits in (8, 4):
            for group in (128, 32):
                sets = [random_tiles(batch, heads, length, d, bits, group) for _ in range(6 if batch == 1 else 1)]
                found = {}
                for stages, warps in ((2, 4), (3, 4), (4, 4), (3, 8)):
                    for per_sm in (1, 2, 3, 4, 6):
                        splits = max(1, 132 * per_sm // (heads * batch))
                        found[f"stages {stages} warps {warps} x{per_sm}"] = attempt(f"int{bits} {stages}", lambda: [
                            lambda s=s: attention.launch(
                                q, s.keys, s.key_params, s.values, s.value_params, lengths, 0.09,
                                splits, stages, warps,
                            ) for s in sets
                        ])  # fmt: skip
                ranked = sorted((t, name) for name, t in found.items() if t == t)
                nbytes = sets[0].nbytes
                print(
                    f"    int{bits}-g{group}: {nbytes / 1e6:.0f} MB, {ranked[0][0]:.1f} us = "
                    f"{nbytes / ranked[0][0] / 1e6:.2f} TB/s, {best / ranked[0][0]:.2f} x bf16; "
                    + ", ".join(f"{name} {t:.1f}" for t, name in ranked[:3]) + f", worst {ranked[-1][0]:.1f}"
                )  # fmt: skip
                sets.clear()


def random_tiles(batch: int, heads: int, length: int, d: int, bits: int, group: int) -> KVTiles:
    kv = KVTiles.empty(batch, heads, length, d, bits, group, GPU)
    for codes in (kv.keys, kv.values):
        codes.view(torch.uint8).random_(0, 256)
    for params in (kv.key_params, kv.value_params):
        params.view(torch.float16).uniform_(0.1, 0.3)
    assert kv.keys.shape[3] == TILE
    return kv


def main() -> None:
    parts = {"correct": correct, "product": products, "fp8": fp8, "tokens": tokens, "kv": kv}
    print(torch.cuda.get_device_name(), torch.__version__)
    ceilings()
    for name in sys.argv[1:] or parts:
        start = time.time()
        try:
            parts[name]()
        except Exception as failure:
            import traceback

            traceback.print_exc()
            print(f"{name}: {failure}")
        torch.cuda.empty_cache()
        print(f"[{name} took {time.time() - start:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
