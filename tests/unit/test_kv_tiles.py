"""Tiles hold the codes of a cache bit for bit."""

from __future__ import annotations

import pytest
import torch
from triton_cases import filled

from fewbits.core.errors import BadInput
from fewbits.formats.kv import parse_kv
from fewbits.kernels.kv_tiles import KVTiles


@pytest.mark.parametrize(("bits", "group", "width"), [(8, 128, 128), (4, 32, 128), (4, 64, 64), (8, 32, 64)])
def test_codes_come_back(bits: int, group: int, width: int) -> None:
    k, v = torch.randn(2, 3, 150, width), torch.randn(2, 3, 150, width) + 1
    kv, format = filled(k, v, bits, group), parse_kv(f"int{bits}-g{group}").format(width)
    for side, x in (("keys", k), ("values", v)):
        expected = format.quantize(x.reshape(-1, width))
        codes, scale, minimum = kv.tokens(side, 150)
        assert torch.equal(codes.reshape(-1, width), expected.codes)
        assert torch.equal(scale.reshape(-1, width // group), expected.scale)
        assert torch.equal(minimum.reshape(-1, width // group), expected.zero)
        assert torch.equal(kv.dequantize(side, 150).reshape(-1, width), expected.dequantize())


def test_what_it_cannot_hold_it_refuses() -> None:
    for bits, group in ((3, 32), (4, 48), (4, 8)):
        with pytest.raises(BadInput, match="4 or 8 bits"):
            KVTiles.empty(1, 1, 128, 128, bits, group, "cpu")
