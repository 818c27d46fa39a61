"""On a CUDA device: products of weights in few bits equal the reference for all numbers of tokens and ragged shapes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fewbits.formats import Quantized, parse_format
from fewbits.kernels import KERNELS, LinearSpec, fragments
from fewbits.kernels.cuda_fragments import fragments_linear, layout_of
from fewbits.kernels.fragment_choices import Few, Many, fits
from fewbits.metrics.error import sqnr_db

KERNEL = KERNELS.get("cuda_fragments")
FORMATS = (
    "int4-g128", "int4-asym-g64", "int4-channel", "int4-asym-channel", "int4-g96", "int3-g64", "int3-asym-g32",
    "int2-g64", "int2-asym-g128", "int8-channel", "int8-asym-g64", "nf4-g64", "fp4_e2m1-g16", "lloyd3-g64",
    "lloyd2-g32",
)  # fmt: skip
DEVICE = torch.device("cuda", 0)


def packed(name: str, shape: tuple[int, int]) -> tuple[Quantized, dict[str, Tensor], LinearSpec]:
    weight = parse_format(name).quantize(torch.randn(shape, device=DEVICE) + 0.1)
    spec = LinearSpec(format=weight.format, shape=shape, device=DEVICE, dtype=torch.bfloat16)
    assert KERNEL.accepts(spec)
    return weight, KERNEL.prepack(weight), spec


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(100, 200), (520, 1032), (64, 4096)])
def test_equals_the_reference_for_every_number_of_tokens(name: str, shape: tuple[int, int]) -> None:
    weight, held, spec = packed(name, shape)
    dense = weight.dequantize().double()
    assert torch.equal(KERNEL.codes(held, spec), weight.codes)
    x = torch.randn(300, shape[1], device=DEVICE)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for m in [*range(1, 71), 129, 300]:
            rows = x[:m].to(dtype)
            y = KERNEL.linear(rows, held, spec)
            assert y.dtype == dtype and y.shape == (m, shape[0])
            floor = 40 if dtype != torch.float16 else 42
            assert sqnr_db(rows.double() @ dense.t(), y) > floor, (m, dtype)
            assert torch.equal(y, KERNEL.linear(rows, held, spec)), f"not stable at {m} tokens"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_kind_of_choice(bits: int) -> None:
    """Clusters, several strips a block, strips that are no whole number a block, more warps than units."""
    name = "int8-channel" if bits == 8 else f"int{bits}-asym-g64"
    choices = [
        Few(), Few(rt=2, warps=8, split=2), Few(rt=4, warps=4, mt=2, split=4), Few(warps=4, per_sm=32, resident=4),
        Few(mt=2, warps=12, ring=3), Few(mt=4, warps=8, split=8), Many(nt=16, wg=1, stages=6, apart=True),
        Many(nt=64, wg=4, share=1), Many(nt=128, wg=3, stages=2), Many(nt=256, wg=2, stages=2),
        Many(nt=96, wg=1, share=0), Many(nt=64, wg=2, per_sm=2, stages=2), Few(ring=5, resident=2, staged=True),
        Few(rt=2, warps=8, mt=2, ring=3, split=2, staged=True),
        Many(nt=64, wg=1, split=2), Many(nt=16, wg=3, split=4, apart=True), Many(nt=128, wg=2, split=3, stages=2),
        Many(nt=48, wg=2, split=2, per_sm=2, stages=2), Many(nt=16, wg=1, stages=3, per_sm=2, warpwise=True),
        Many(nt=32, wg=3, stages=3, apart=True, warpwise=True), Many(nt=16, wg=2, split=2, apart=True, warpwise=True),
    ]  # fmt: skip
    random.seed(bits)
    tried = 0
    for _ in range(6):
        n, k = random.randint(1, 700), 8 * random.randint(1, 600)
        weight, held, _ = packed(name, (n, k))
        layout = layout_of(weight.format, k, False)
        parts = fragments.Packed(
            words=held["weight"],
            scale=held["scales"],
            zero=held.get("zeros"),
            alpha=held["alpha"],
            table=None,
            n=n,
            k=k,
        )
        for config in choices:
            for m in (1, 7, 16, 31, 64):
                if not fits(config, layout, n, k, m, 132):
                    continue
                x = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
                y = fragments.multiply(x, parts, layout, config)
                assert sqnr_db(x.double() @ weight.dequantize().double().t(), y) > 40, (n, k, m, config)
                tried += 1
        decoded = fragments.dense(parts, layout)
        assert sqnr_db(weight.dequantize(), decoded) > 45
    assert tried > 50


@pytest.mark.parametrize("share", [0, 1, 2])
@pytest.mark.parametrize(("n", "k", "m"), [(5000, 1032, 64), (5003, 520, 200), (8192, 4096, 40)])
def test_tiles_that_are_left_over_are_shared(share: int, n: int, k: int, m: int) -> None:
    """More tiles than blocks that run at a time, and no whole number of them: every result is written, and the same
    every time."""
    weight, held, _ = packed("int4-asym-g64", (n, k))
    layout = layout_of(weight.format, k, False)
    parts = fragments.Packed(
        words=held["weight"], scale=held["scales"], zero=held.get("zeros"), alpha=held["alpha"], table=None, n=n,
        k=k + -k % 8,
    )  # fmt: skip
    x = torch.randn(m, parts.k, device=DEVICE, dtype=torch.bfloat16)
    x[:, k:] = 0
    expected = x[:, :k].double() @ weight.dequantize().double().t()
    for config in (Many(nt=16, wg=1, share=share, per_sm=2), Many(nt=32, wg=2, apart=True, share=share)):
        torch.full((m, n), torch.nan, device=DEVICE, dtype=torch.bfloat16)  # what y is likely to be made of
        y = fragments.multiply(x, parts, layout, config)
        assert sqnr_db(expected, y) > 40, config
        for _ in range(20):
            assert torch.equal(y, fragments.multiply(x, parts, layout, config)), config


@pytest.mark.parametrize("name", ["int4-g64", "int4-asym-g128", "nf4-g32", "lloyd3-channel"])
def test_prompts(name: str) -> None:
    """What is chosen for many tokens of a wide layer takes nearly all of the shared memory."""
    weight, held, spec = packed(name, (4096, 4096))
    dense = weight.dequantize().double()
    x = torch.randn(1100, 4096, device=DEVICE, dtype=torch.bfloat16)
    for m in (65, 256, 512, 1100):
        assert sqnr_db(x[:m].double() @ dense.t(), KERNEL.linear(x[:m], held, spec)) > 40, m


def test_x_need_not_be_contiguous_nor_aligned() -> None:
    weight, held, spec = packed("int4-g128", (256, 512))
    wide = torch.randn(9, 1025, device=DEVICE, dtype=torch.bfloat16)
    for x in (wide[:, 1:513], wide[:, :1024:2], wide.t()[:512].t()):
        y = KERNEL.linear(x, held, spec)
        assert sqnr_db(x.double() @ weight.dequantize().double().t(), y) > 40
    assert KERNEL.linear(wide[:0, :512], held, spec).shape == (0, 256)


def test_it_is_an_operator_of_torch() -> None:
    _, held, spec = packed("nf4-g64", (128, 256))
    x = torch.randn(5, 256, device=DEVICE, dtype=torch.bfloat16)
    arguments = (x, held["weight"], held["scales"], None, held["alpha"], held["table"], 4, 64, 0)
    torch.library.opcheck(fragments_linear, arguments)
    for call in (lambda x: fragments_linear(x * 2, *arguments[1:]) + 1, lambda x: KERNEL.linear(x * 2, held, spec) + 1):
        assert torch.allclose(torch.compile(call, fullgraph=True)(x), call(x))


def test_it_works_in_a_cuda_graph() -> None:
    weight, held, spec = packed("int3-g64", (320, 640))
    for m in (1, 40):
        x = torch.randn(m, 640, device=DEVICE, dtype=torch.bfloat16)
        KERNEL.linear(x, held, spec)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = KERNEL.linear(KERNEL.linear(x, held, spec)[:, :320].repeat(1, 2), held, spec)
        x.copy_(torch.randn_like(x))
        graph.replay()
        dense = weight.dequantize().double()
        once = (x.double() @ dense.t()).bfloat16().double().repeat(1, 2)
        assert sqnr_db(once @ dense.t(), y) > 35


def test_joined_weights_are_one_taller() -> None:
    a, held_a, spec_a = packed("int4-asym-g64", (128, 256))
    _, held_b, spec_b = packed("int4-asym-g64", (64, 256))
    whole, views = KERNEL.join([held_a, held_b], [spec_a, spec_b])
    x = torch.randn(3, 256, device=DEVICE, dtype=torch.bfloat16)
    tall = LinearSpec(format=a.format, shape=(192, 256), device=DEVICE, dtype=torch.bfloat16)
    y = KERNEL.linear(x, whole, tall)
    parts = [KERNEL.linear(x, view, spec) for view, spec in zip(views, (spec_a, spec_b), strict=True)]
    assert torch.equal(y, torch.cat(parts, 1))
    assert (
        KERNEL.join(
            [held_a, packed("int4-asym-g64", (50, 256))[1]],
            [spec_a, LinearSpec(format=a.format, shape=(50, 256), device=DEVICE)],
        )
        is None
    )
