"""On a CUDA device: the Triton kernels equal their definitions, in graphs and under torch.compile too."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton_cases import attention, error, filled

from fewbits.formats import parse_format
from fewbits.formats.outliers import Outliers
from fewbits.kernels import KERNELS, LinearSpec, choose
from fewbits.kernels.kv_tiles import KVTiles
from fewbits.kernels.reference import KERNEL as REFERENCE
from fewbits.metrics.error import sqnr_db
from fewbits.nn import QLinear

SHAPES = [(5, 100), (33, 200), (96, 576), (1000, 4096)]
INT8 = torch.int8, 127.5, -128.0, 127.0
FP8 = torch.float8_e4m3fn, 448.0, -448.0, 448.0


@pytest.fixture(autouse=True)
def operators() -> None:
    from fewbits.kernels import decode_attention, triton_kv_write, triton_product, triton_quantize  # noqa: F401


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [16, 100, 576, 4096, 14336])
def test_tokens_are_rounded_as_the_format_says(k: int, dtype: torch.dtype) -> None:
    from fewbits.kernels import triton_quantize

    x = torch.randn(37, k, device="cuda").to(dtype)
    x[0], x[1], x[2, 3] = 0, x[1] * 300, 1000
    for name, args in (("int8-token", INT8), ("fp8_e4m3-token", FP8)):
        format = parse_format(name)
        scale, _ = format.params(x.float())
        levels = format.grid.value(format.encode(x.float(), scale, None))
        for rows in (x, torch.cat((x, x), 1)[:, :k]):  # rows apart in memory, too
            for quantize in (torch.ops.fewbits.quantize_tokens, triton_quantize.launch):
                q, found, _ = quantize(rows, *args)
                assert torch.equal(found, scale[:, 0])
                assert torch.equal(q[:, :k].float(), levels) and not q[:, k:].float().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [100, 4096, 14336])
def test_norm_and_silu_before_the_rounding(k: int, dtype: torch.dtype) -> None:
    from fewbits.kernels import triton_quantize

    x, weight = torch.randn(9, k, device="cuda").to(dtype), torch.rand(k, device="cuda").to(dtype)
    spread = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    normed = weight * (x.float() * spread).to(x.dtype)
    gated = torch.nn.functional.silu(x[:, : k // 2]) * x[:, k // 2 :]
    for before, v in (("rms_norm", normed), ("silu", gated)):
        expected, scales, _ = torch.ops.fewbits.quantize_tokens(v, *INT8)
        for quantize in (torch.ops.fewbits.quantize_tokens, triton_quantize.launch):
            q, scale, _ = quantize(x, *INT8, before, weight, 1e-5)
            torch.testing.assert_close(scale, scales, rtol=0.01, atol=0)
            assert (q != expected).double().mean() < 0.01  # where 16 bits came out one step apart
            assert (q.int() - expected.int()).abs().max() <= 1


def test_no_tokens_and_nan() -> None:
    x = torch.randn(3, 256, device="cuda").bfloat16()
    x[1, 7] = torch.nan
    q, _, _ = torch.ops.fewbits.quantize_tokens(x, *FP8)
    assert torch.isnan(q.float()[1, 7]) and not q.float()[[0, 2]].isnan().any()
    assert torch.ops.fewbits.quantize_tokens(x[:0], *FP8)[0].shape == (0, 256)


@pytest.mark.parametrize("inputs", ["int8-token", "int8-tensor", "int8-tensor-static"])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_products_equal_torchs(shape: tuple[int, int], inputs: str) -> None:
    format, activations = parse_format("int8-channel"), parse_format(inputs)
    weight = format.quantize(torch.randn(shape, device="cuda"))
    spec = LinearSpec(format=format, shape=shape, device=torch.device("cuda", 0), activations=activations)
    kernel, torchs = KERNELS.get("triton_int8"), KERNELS.get("int8_mm")
    assert choose(spec) is kernel
    packed, other = kernel.prepack(weight), torchs.prepack(weight)
    assert torch.equal(kernel.codes(packed, spec), weight.codes)
    state = {"input_scale": torch.tensor([[0.02]], device="cuda")} if activations.scaling.static else {}
    for rows in [*range(1, 71), 130, 257]:
        x = torch.randn(rows, shape[1], device="cuda")
        y = kernel.linear(x, packed | state, spec)
        assert sqnr_db(torchs.linear(x, other | state, spec), y) > kernel.floor_db, rows
        assert torch.equal(y, kernel.linear(x, packed | state, spec))
    for dtype in (torch.float16, torch.bfloat16):
        strided = torch.randn(2, 3, 2 * shape[1], device="cuda").to(dtype)[..., ::2]
        y = kernel.linear(strided, packed | state, spec)
        assert y.dtype == dtype and y.shape == (2, 3, shape[0])
        assert sqnr_db(torchs.linear(strided.float(), other | state, spec), y) > 45
    assert kernel.linear(x[:0], packed | state, spec).shape == (0, shape[0])


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 20])
def test_outlier_columns_in_the_same_launch(count: int, dtype: torch.dtype, kept: torch.dtype) -> None:
    w = torch.randn(96, 512, device="cuda")
    columns = torch.randperm(512, device="cuda")[:count].sort().values
    outliers = Outliers(threshold=6.0, columns=columns.int(), weight=w[:, columns].to(kept))
    weight = parse_format("int8-channel").quantize(w.index_fill(1, columns, 0))
    module = QLinear.from_quantized(weight, activations=parse_format("int8-token"), outliers=outliers)
    for rows in (1, 16, 70, 200):
        x = torch.randn(rows, 512, device="cuda")
        x[:, columns] *= 60
        x = x.to(dtype)
        found = module.prepack(KERNELS.get("triton_int8"))(x)
        expected = module.prepack(KERNELS.get("int8_mm"))(x.float())  # apart, in float32
        assert sqnr_db(expected, found) > (45 if dtype == torch.bfloat16 else 60)


@pytest.mark.parametrize("name", ["fp8_e4m3-channel", "fp8_e4m3-tensor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_products_equal_the_reference(shape: tuple[int, int], name: str) -> None:
    format, activations = parse_format(name), parse_format("fp8_e4m3-token")
    spec = LinearSpec(format=format, shape=shape, device=torch.device("cuda", 0), activations=activations)
    kernel = KERNELS.get("fp8_mm")
    if not kernel.accepts(spec):
        pytest.skip(str(kernel.accepts(spec)))
    weight = format.quantize(torch.randn(shape, device="cuda"))
    packed, plain = kernel.prepack(weight), REFERENCE.prepack(weight)
    assert torch.equal(kernel.codes(packed, spec), weight.codes)
    for rows in (1, 3, 17, 64, 70, 300):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.randn(rows, shape[1], device="cuda").to(dtype)
            y = kernel.linear(x, packed, spec)
            assert y.dtype == dtype and y.shape == (rows, shape[0])
            assert sqnr_db(REFERENCE.linear(x.float(), plain, spec), y) > kernel.floor_db


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("group", "width", "ratio", "lengths"),
    [
        (128, 128, 4, [4097, 2049]), (32, 128, 4, [1000, 501]), (64, 128, 4, [129, 65]), (64, 64, 3, [130, 66]),
        (32, 64, 8, [1, 1]), (128, 128, 1, [300, 151]), (128, 128, 12, [5000, 1, 700]), (64, 256, 6, [700, 300]),
    ],
)  # fmt: skip
def test_decode_attention(bits: int, group: int, width: int, ratio: int, lengths: list[int]) -> None:
    """As the dispatcher has it, and by Triton where that is not what it takes."""
    from fewbits.kernels import triton_attention

    batch, length = len(lengths), max(lengths)
    k = torch.randn(batch, 2, length, width, device="cuda") * torch.rand(width, device="cuda") * 3
    kv, q = filled(k, torch.randn_like(k) + 0.5, bits, group), torch.randn(batch, 2 * ratio, width, device="cuda")
    counts = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    held = kv.keys, kv.key_params, kv.values, kv.value_params, counts, width**-0.5
    expected = attention(q, kv.dequantize("keys", length), kv.dequantize("values", length), counts, width**-0.5)
    y = torch.ops.fewbits.decode_attention(q, *held)
    assert error(y, expected) < 5e-4
    assert torch.equal(torch.ops.fewbits.decode_attention(q, *held), y)
    assert error(torch.ops.fewbits.decode_attention(q.bfloat16(), *held), y) < 5e-3
    assert error(triton_attention.launch(q, *held), expected) < 5e-4


@pytest.mark.parametrize("teams", [2, 4])
@pytest.mark.parametrize("blocks", [1, 5, 132])
def test_decode_attention_however_the_work_is_shared(blocks: int, teams: int) -> None:
    """Blocks that take many heads, that begin in one and end in another, and that share one."""
    from fewbits.kernels import cuda_attention

    k, lengths = torch.randn(3, 2, 6000, 128, device="cuda"), torch.tensor([6000, 1, 1500], dtype=torch.int32).cuda()
    kv, q = filled(k, torch.randn_like(k), 4, 128), torch.randn(3, 8, 128, device="cuda")
    held = kv.keys, kv.key_params, kv.values, kv.value_params
    if (reason := cuda_attention.refusal(q, *held)) is not None:
        pytest.skip(reason)
    expected = attention(q, kv.dequantize("keys", 6000), kv.dequantize("values", 6000), lengths, 0.09)
    assert error(cuda_attention.launch(q, *held, lengths, 0.09, blocks, teams), expected) < 5e-4


def test_operators_are_well_made_and_run_in_graphs_and_compiled() -> None:
    format, activations = parse_format("int8-channel"), parse_format("int8-token")
    weight = format.quantize(torch.randn(96, 256, device="cuda"))
    spec = LinearSpec(format=format, shape=weight.shape, device=torch.device("cuda", 0), activations=activations)
    kernel = choose(dataclasses.replace(spec))
    packed = kernel.prepack(weight)
    x = torch.randn(17, 256, device="cuda")
    q, scale, _ = torch.ops.fewbits.quantize_tokens(x, *INT8)
    torch.library.opcheck(torch.ops.fewbits.quantize_tokens.default, (x, *INT8))
    torch.library.opcheck(
        torch.ops.fewbits.scaled_product.default, (q, packed["weight"], scale, packed["scale"], torch.float32)
    )
    kv, queries = filled(*(torch.randn(1, 2, 200, 64, device="cuda") for _ in range(2)), 4, 64), torch.randn(1, 8, 64)
    queries, lengths = queries.cuda(), torch.tensor([200], dtype=torch.int32, device="cuda")
    held = kv.keys, kv.key_params, kv.values, kv.value_params, lengths, 0.125
    torch.library.opcheck(torch.ops.fewbits.decode_attention.default, (queries, *held))

    def step(x: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return kernel.linear(x, packed, spec) * 2, torch.ops.fewbits.decode_attention(queries, *held) + 1

    expected = step(x, queries)
    compiled = torch.compile(step, fullgraph=True)(x, queries)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, queries)
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    for found in (compiled, captured):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    longer = torch.tensor([77], dtype=torch.int32, device="cuda")
    lengths.copy_(longer)  # read on the device: the same graph goes on with another length
    graph.replay()
    torch.testing.assert_close(captured[1], step(x, queries)[1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group", "width"), [(128, 128), (32, 128), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tokens_are_written_as_the_format_rounds_them(bits: int, group: int, width: int, dtype: torch.dtype) -> None:
    half, length = width // 2, 300
    k, v = (torch.randn(2, length, 3, width, device="cuda").to(dtype).transpose(1, 2) for _ in range(2))
    angle = torch.rand(2, length, half, device="cuda").repeat(1, 1, 2) * 7
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    turned = k * cos[:, None] + torch.cat((-k[..., half:], k[..., :half]), -1) * sin[:, None]
    kv, starts = KVTiles.empty(2, 3, length, width, bits, group, "cuda"), torch.zeros(2, dtype=torch.int32).cuda()
    held = kv.keys, kv.key_params, kv.values, kv.value_params
    for begin, end in ((0, 200), (200, 201), (201, length)):
        part = slice(begin, end)
        starts.fill_(begin)
        torch.ops.fewbits.write_kv(k[:, :, part], v[:, :, part], cos[:, part], sin[:, part], starts, *held)
    expected = filled(turned.float(), v.float(), bits, group)
    for side in ("keys", "values"):
        for found, plain in zip(kv.tokens(side, length), expected.tokens(side, length), strict=True):
            assert torch.equal(found, plain), side
    starts.fill_(length - 1)
    token = k[:, :, -1:], v[:, :, -1:], cos[:, -1:], sin[:, -1:], starts
    torch.library.opcheck(torch.ops.fewbits.write_kv.default, (*token, *held))
