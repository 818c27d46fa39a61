"""The Triton kernels in Triton's interpreter: what they compute, not how fast. tests/gpu runs them on a GPU."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from triton_cases import attention, error, filled

if torch.cuda.is_available():
    pytest.skip("there is a GPU: tests/gpu runs the compiled kernels", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="triton is not installed (on a CPU it is optional: pip install triton)")
if np.lib.NumpyVersion(np.__version__) >= "2.4.0":  # an array of one number is no index any more
    pytest.skip(f"Triton's interpreter does not run with numpy {np.__version__}", allow_module_level=True)

from fewbits.formats import parse_format
from fewbits.kernels import triton_attention, triton_kv_write, triton_product, triton_quantize
from fewbits.kernels.kv_tiles import KVTiles


@pytest.mark.parametrize(("m", "k"), [(5, 100), (3, 576), (1, 16)])
def test_tokens_are_rounded_as_the_format_says(m: int, k: int) -> None:
    torch.manual_seed(0)
    format, x = parse_format("int8-token"), torch.randn(m, k)
    x[0] *= 300
    scale, _ = format.params(x)
    codes = format.encode(x, scale, None)
    q, found, _ = triton_quantize.launch(x, torch.int8, 127.5, -128.0, 127.0)
    assert torch.equal(found, scale[:, 0]) and not q[:, k:].any()
    # The interpreter's multiply-add rounds twice, which ties show: -absmax stands between -127 and -128.
    apart = q[:, :k].short() + 128 != codes.short()
    assert ((x / scale)[apart] + 127.5).abs().lt(1e-4).all()


def test_norm_and_silu_before_the_rounding() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64), torch.rand(64) + 0.5
    normed = torch.nn.functional.rms_norm(x, (64,), weight, 1e-5)
    gated = torch.nn.functional.silu(x[:, :32]) * x[:, 32:]
    for before, expected in (("rms_norm", normed), ("silu", gated)):
        q, scale, _ = triton_quantize.launch(x, torch.int8, 127.5, -128.0, 127.0, before, weight, 1e-5)
        assert error(q.float() * scale[:, None], expected) < 0.01
        torch.testing.assert_close(scale, expected.abs().amax(1) / 127.5)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("m", "n", "k"), [(5, 33, 112), (70, 96, 64)])
def test_sums_are_exact_and_columns_are_added(m: int, n: int, k: int, parts: int) -> None:
    torch.manual_seed(0)
    x, w = (torch.randint(-128, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
    scales = torch.rand(m), torch.rand(n)
    tiles = triton_product.Tiles(m=64, n=32, k=64, warps=4, stages=2, parts=parts, group=2)
    exact = (x.double() @ w.double().t()).float() * scales[0][:, None] * scales[1]
    assert torch.equal(triton_product.launch(x, w, *scales, torch.float32, tiles=tiles), exact)
    left, right = torch.randn(m, 16).half(), torch.randn(n, 16).half()
    y = triton_product.launch(x, w, *scales, torch.float32, left, right, tiles)
    assert error(y, exact.double() + left.double() @ right.double().t()) < 1e-6


def test_outlier_channels_leave_the_row() -> None:
    torch.manual_seed(0)
    x, columns = torch.randn(3, 64), torch.tensor([2, 40], dtype=torch.int32)
    x[:, columns.long()] *= 100
    mask = torch.zeros(64, dtype=torch.int8).index_fill_(0, columns.long(), 1)
    x = x.half()
    q, scale, apart = triton_quantize.launch(
        x, torch.int8, 127.5, -128.0, 127.0, mask=mask, outliers=columns, r=16
    )  # fmt: skip
    rest = x.float().index_fill(1, columns.long(), 0)
    torch.testing.assert_close(scale, rest.abs().amax(1) / 127.5)
    assert not q[:, columns.long()].any()
    assert torch.equal(apart[:, :4], x[:, columns.long()].repeat(1, 2)) and not apart[:, 4:].any()


@pytest.mark.parametrize(
    ("bits", "group", "width", "ratio", "length"),
    [(8, 128, 128, 4, 300), (4, 128, 128, 4, 300), (4, 32, 128, 4, 150), (8, 64, 64, 3, 130), (4, 32, 64, 8, 100)],
)
def test_decode_attention(bits: int, group: int, width: int, ratio: int, length: int) -> None:
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, length, width) * torch.rand(width) * 3, torch.randn(2, 1, length, width) + 0.5
    kv, q = filled(k, v, bits, group), torch.randn(2, ratio, width)
    lengths = torch.tensor([length, 77], dtype=torch.int32)
    expected = attention(q, kv.dequantize("keys", length), kv.dequantize("values", length), lengths, width**-0.5)
    for splits in (1, 2):
        y = triton_attention.launch(
            q, kv.keys, kv.key_params, kv.values, kv.value_params, lengths, width**-0.5, splits
        )  # fmt: skip
        assert error(y, expected) < 5e-4


def test_decode_attention_in_sixteen_bits() -> None:
    torch.manual_seed(0)
    k, v, q = torch.randn(2, 1, 128, 64).half(), torch.randn(2, 1, 128, 64).half(), torch.randn(2, 4, 64).half()
    lengths = torch.tensor([128, 50], dtype=torch.int32)
    y = triton_attention.launch_sixteen(q, k, v, lengths, 0.125, splits=2, tile=64)
    assert error(y, attention(q, k, v, lengths, 0.125)) < 2e-3


@pytest.mark.parametrize(("bits", "group", "new"), [(8, 64, 1), (4, 64, 3), (4, 16, 20), (8, 32, 2)])
def test_tokens_are_written_as_the_format_rounds_them(bits: int, group: int, new: int) -> None:
    torch.manual_seed(0)
    width, before = 64, 120
    k, v = torch.randn(2, 2, before + new, width).half(), torch.randn(2, 2, before + new, width).half()
    angle = torch.rand(2, before + new, width // 2).repeat(1, 1, 2) * 7
    cos, sin = angle.cos().half(), angle.sin().half()
    turned = k * cos[:, None] + torch.cat((-k[..., 32:], k[..., :32]), -1) * sin[:, None]
    kv = KVTiles.empty(2, 2, before + new, width, bits, group, "cpu")
    starts = torch.zeros(2, dtype=torch.int32)
    held = kv.keys, kv.key_params, kv.values, kv.value_params
    for begin, end in ((0, before), (before, before + new)):
        part = slice(begin, end)
        starts.fill_(begin)
        triton_kv_write.write(k[:, :, part], v[:, :, part], cos[:, part], sin[:, part], starts, *held)
    expected = filled(turned.float(), v.float(), bits, group)
    for side in ("keys", "values"):
        found, plain = kv.tokens(side, before + new), expected.tokens(side, before + new)
        assert torch.equal(found[1], plain[1]) and torch.equal(found[2], plain[2])
        assert (found[0] != plain[0]).double().mean() < 1e-3  # ties, under the interpreter's multiply-add
