"""Search for the fastest choices of `few`, `many` and `dense`, product by product.

Candidates are compiled first, on all cores, then timed (timing.py) on random weights. A file of the fastest goes where
`tuned.py` looks. Five shapes at seven numbers of tokens take about a minute on an H200 with 16 cores.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from fewbits.kernels import fragments, nvrtc
from fewbits.kernels.e4m3_tokens import round_tokens
from fewbits.kernels.fragment_choices import Config, Few, Many, dense_takes, fits, runs_on
from fewbits.kernels.fragment_layout import ROWS, Layout, pack, pack_table
from fewbits.kernels.timing import Call, copies, microseconds

Progress = Callable[[str], None]
DENSE_FROM = 256  # tokens
ROUNDED_FROM = 128  # tokens: below, levels times scales are not rounded to E4M3, which gains nothing
FINALISTS = 6
COARSE_GAIN = 1.03  # times as fast
_WAYS = [(0, 1), (1, 1), (2, 1), (0, 2), (0, 4)]  # `share` and `split` of `many`


def candidates(m: int, e4m3: bool = False) -> list[Config]:
    """What is tried for m tokens."""
    if e4m3:
        return _e4m3_candidates(m)
    found: list[Config] = []
    if m <= 8:
        one = [
            (1, 16, 2, 1, 2, True), (1, 16, 3, 1, 2, True), (1, 16, 4, 1, 2, True), (1, 16, 6, 1, 1, True),
            (2, 16, 2, 1, 1, True), (1, 12, 3, 2, 3, True), (1, 16, 2, 1, 2, False), (1, 16, 3, 1, 1, False),
            (1, 16, 4, 1, 1, False), (2, 16, 2, 1, 1, False), (1, 8, 4, 2, 2, False), (1, 12, 4, 1, 2, False),
            (1, 16, 2, 32, 2, False), (1, 8, 4, 32, 3, False),
            # units of 2 and 3 bits are small: more of them are as many bytes on their way
            (1, 16, 6, 1, 1, False), (1, 16, 8, 1, 1, False), (1, 8, 8, 2, 2, False), (1, 16, 8, 1, 1, True),
        ]  # fmt: skip
        found += [
            Few(rt=rt, warps=warps, ring=ring, per_sm=per_sm, resident=resident, staged=staged, split=split)
            for rt, warps, ring, per_sm, resident, staged in one for split in (1, 2)
        ]  # fmt: skip
    if 4 < m <= 16:
        two = [(1, 16, 2, 1), (1, 16, 3, 1), (2, 16, 2, 1), (2, 12, 3, 1), (2, 8, 2, 2)]
        found += [
            Few(rt=rt, warps=warps, ring=ring, per_sm=per_sm, resident=per_sm, mt=2, staged=staged, split=split)
            for rt, warps, ring, per_sm in two for staged in (False, True) for split in (1, 2, 4)
        ]  # fmt: skip
    if m > 8:
        wide = [
            (16, 1, 5, 2, True), (16, 2, 5, 1, True), (16, 2, 5, 2, True), (16, 3, 5, 1, True), (16, 4, 5, 1, True),
            (16, 3, 5, 1, False), (16, 4, 5, 1, False), (32, 1, 5, 2, True), (32, 2, 5, 1, True), (32, 3, 4, 1, True),
            (32, 4, 4, 1, True), (32, 3, 4, 1, False), (32, 4, 4, 1, False), (64, 1, 4, 2, False), (64, 1, 4, 2, True),
            (64, 2, 4, 1, True), (64, 2, 4, 1, False), (64, 3, 4, 1, True), (64, 3, 4, 1, False), (64, 4, 4, 1, False),
            (128, 1, 5, 1, False), (128, 2, 4, 1, False), (128, 3, 4, 1, False), (256, 2, 3, 1, False),
        ]  # fmt: skip
        clusters = [
            (16, 1, 5, 2, True), (16, 2, 8, 1, True), (16, 3, 8, 1, True), (16, 4, 8, 1, True), (16, 4, 5, 1, True),
            (16, 3, 5, 1, False), (32, 1, 5, 2, True), (32, 2, 8, 1, True), (32, 3, 6, 1, True), (32, 3, 4, 1, False),
            (64, 1, 8, 1, True), (64, 1, 4, 1, False), (64, 2, 6, 1, True), (64, 2, 4, 1, False), (64, 3, 4, 1, False),
            (128, 1, 5, 1, False), (128, 2, 4, 1, False), (128, 3, 4, 1, False), (256, 2, 3, 1, False),
        ]  # fmt: skip
        ways = [(choice, share, 1) for choice in wide for share in (0, 1, 2)]
        ways += [(choice, 0, split) for choice in clusters for split in (2, 4)]
        found += [
            Many(nt=nt, wg=wg, stages=stages, per_sm=per_sm, apart=apart, share=share, split=split)
            for (nt, wg, stages, per_sm, apart), share, split in ways
            if m / 8 <= nt < max(2 * m, 32) or (m > 2048 and nt >= 128)
        ]  # fmt: skip
    if 8 < m <= 16:
        found += [
            Many(nt=16, wg=wg, stages=stages, per_sm=per_sm, apart=apart, share=share, split=split, warpwise=True)
            for wg, stages, per_sm in ((1, 8, 2), (2, 8, 1), (2, 5, 2), (4, 5, 1)) for apart in (True, False)
            for share, split in _WAYS
        ]  # fmt: skip
    return found


def _e4m3_candidates(m: int) -> list[Config]:
    wide = [
        (16, 1, 8, 2), (16, 2, 8, 1), (16, 3, 8, 1), (16, 4, 8, 1), (32, 1, 8, 2), (32, 2, 8, 1), (32, 3, 8, 1),
        (32, 4, 6, 1), (64, 1, 8, 2), (64, 2, 8, 1), (64, 2, 5, 1), (64, 3, 8, 1), (64, 4, 6, 1), (96, 2, 8, 1),
        (128, 1, 5, 2), (128, 1, 8, 1), (128, 2, 8, 1), (128, 2, 5, 1), (160, 2, 6, 1),
    ]  # fmt: skip
    rounded = [
        (64, 2, 8, 1), (64, 4, 6, 1), (128, 1, 8, 1), (128, 2, 7, 1), (128, 3, 6, 1), (192, 2, 6, 1), (256, 1, 5, 1),
        (256, 2, 5, 1), (256, 2, 4, 1),
    ]  # fmt: skip
    return [
        Many(nt=nt, wg=wg, stages=stages, per_sm=per_sm, share=share, split=split, apart=apart)
        for some, apart in ((wide, True), (rounded if m >= ROUNDED_FROM else [], False))
        for nt, wg, stages, per_sm in some for share, split in _WAYS
        if m / 8 <= nt < max(2 * m, 32) or (m > 768 and nt >= 128)
    ]  # fmt: skip


def random_weight(layout: Layout, n: int, k: int, device: torch.device) -> fragments.Packed:
    """A weight of random codes in the packed order."""
    _, units, size = pack(torch.zeros(ROWS, k, dtype=torch.uint8), layout).shape
    tiles = -(-n // ROWS) * ROWS // 16
    scales = (tiles, units * layout.groups, 8, 2)
    words = torch.randint(-(2**31), 2**31 - 1, (tiles, units, size), device=device, dtype=torch.int32)
    zero = torch.randint(0, 1 << layout.bits, scales, device=device, dtype=torch.uint8)
    levels = torch.randn(1 << layout.bits, device=device)
    return fragments.Packed(
        words=words, scale=torch.rand(scales, device=device).half(), zero=zero if layout.zero else None,
        alpha=torch.ones(n, device=device), n=n, k=k,
        table=pack_table(levels, layout.half, layout.bits) if layout.table else None,
    )  # fmt: skip


def weight_bytes(weight: fragments.Packed) -> int:
    parts = (weight.words, weight.scale, weight.zero, weight.alpha)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def compile_all(layout: Layout, configs: Sequence[Config], device: int) -> None:
    """Compiles on all cores; a compiler's thread leaves the interpreter to others."""
    sources = {fragments.source(layout, config) for config in configs}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda text: nvrtc.compiled(text, nvrtc.options(device)), sources))


def _fastest(calls: Sequence[Sequence[Call]], coarse: Sequence[int] = ()) -> tuple[int, float]:
    """Which of `calls` take the least, and how long: the fastest few are timed three times more, in both orders.

    Many products heat the GPU, which then slows down: who comes first must not win by that. Those that round more,
    `coarse`, win by COARSE_GAIN or not at all.
    """
    times = [microseconds(some) for some in calls]
    last = sorted(range(len(calls)), key=times.__getitem__)[:FINALISTS]
    again: dict[int, list[float]] = {i: [] for i in last}
    for order in (last, last[::-1], last):
        for i in order:
            again[i].append(microseconds(calls[i]))
    medians = {i: statistics.median(found) for i, found in again.items()}
    best = min(medians, key=lambda i: medians[i] * (COARSE_GAIN if i in coarse else 1))
    return best, medians[best]


def tune(
    layout: Layout, shapes: Sequence[tuple[int, int]], tokens: Sequence[int], device: torch.device, say: Progress
) -> list[dict[str, Any]]:
    """The fastest choice of every shape (n, k) and number of tokens, as rows of `tuned.py`, with its microseconds."""
    index = device.index or 0
    gpu = torch.cuda.get_device_properties(index)
    capability, sms, limit = gpu.major, gpu.multi_processor_count, gpu.shared_memory_per_block_optin
    tried = {config for m in tokens for config in candidates(m, layout.e4m3)}
    usable = {config for config in tried if runs_on(config, capability)}
    say(f"compiling {len(usable)} kernels for {layout.bits} bits")
    compile_all(layout, sorted(usable, key=str), index)
    cases = []
    for n, k in shapes:
        size = weight_bytes(random_weight(layout, n, k, device))
        weights = [random_weight(layout, n, k, device) for _ in range(copies(size))]
        for m in tokens:
            plain = torch.randn(m, k, device=device, dtype=torch.float16 if layout.half else torch.bfloat16)
            x = round_tokens(plain, layout.part) if layout.e4m3 else plain
            configs: list[Config | None] = [
                config
                for config in candidates(m, layout.e4m3)
                if config in usable and fits(config, layout, n, k, m, sms, limit)
            ]
            if (m >= DENSE_FROM or (not configs and not layout.e4m3)) and dense_takes(layout, n):
                configs.append(None)
            if not configs:
                say(f"{n} x {k}, {m} tokens: none of the choices that are tried fits")
                continue
            some = weights if m <= DENSE_FROM else weights[:4]
            calls = [[partial(fragments.product, x, weight, layout, config) for weight in some] for config in configs]
            coarse = [i for i, config in enumerate(configs) if layout.e4m3 and not getattr(config, "apart", False)]
            best, taken = _fastest(calls, coarse)
            chosen = configs[best]
            say(f"{n} x {k}, {m} tokens: {taken:.1f} us, {'dense' if chosen is None else chosen}")
            cases.append(
                {
                    "bits": layout.bits, "table": layout.table, "group": layout.group, "n": n, "k": k, "m": m,
                    "kernel": "dense" if chosen is None else chosen.name,
                    "choices": {} if chosen is None else asdict(chosen), "microseconds": round(taken, 2),
                }
                | ({"e4m3": True} if layout.e4m3 else {})
            )  # fmt: skip
        del weights
    return cases
