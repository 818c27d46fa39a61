"""Every format quantizes and decodes on CUDA as it does on a CPU."""

from __future__ import annotations

import pytest
import torch

from fewbits.formats import known_formats, parse_format
from fewbits.metrics.error import sqnr_db


@pytest.mark.parametrize("name", known_formats())
def test_cuda_gives_the_codes_of_the_cpu(name: str) -> None:
    w = torch.randn(96, 768, generator=torch.Generator().manual_seed(1))
    w = w.abs() if name.startswith("dynamic8u") else w
    here, there = parse_format(name).quantize(w), parse_format(name).quantize(w.cuda())
    decoded = there.dequantize()
    assert decoded.is_cuda
    # Means and sums (double quantization, fitted codebooks) add up in another order there.
    same = (here.codes == there.codes.cpu()).float().mean()
    assert float(same) >= (0.99 if here.format.nested or here.format.fit else 1.0)
    assert sqnr_db(here.dequantize(), decoded.cpu()) > (35 if here.format.nested or here.format.fit else 120)
