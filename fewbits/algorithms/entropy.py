"""Entropy calibration: clip where the quantized histogram says most like the original.

For every threshold i of a histogram of |x|, from as many bins as the format has magnitudes to all of them:

    P = bins 0 ... i-1, the last with the mass beyond it added: what clipping makes of the data
    Q = bins 0 ... i-1 merged into 2**(b-1) levels, each level's mass spread evenly over its bins that are not empty

and the threshold with the smallest KL(P || Q) is kept, the largest one on a tie. The first bin is set to the second:
exact zeros (ReLU, padding) say nothing about where to clip. It clips less than the squared error would.

This is TensorRT's INT8 calibration as NVIDIA's pytorch-quantization and ModelOpt publish it, bin for bin (there the
threshold is the i-th edge; Migacz's slides take half a bin more). Each threshold is a pass over the histogram, a tenth
of a second in all: meant for one activation at a time rather than for every row of a weight.
Source: Migacz 2017, "8-bit inference with TensorRT", GTC.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.algorithms.ranges import Range, within
from fewbits.calibration.histogram import Histogram
from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import Format

MOST_BLOCKS = 64


@dataclass(frozen=True, kw_only=True)
class KL:
    """TensorRT's entropy calibration; `bins` of the histogram of a block, 2**(bits - 1) levels."""

    bins: int = 2048

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise BadInput(f"{self.bins} bins: at least 2 are needed")

    def of_blocks(self, blocks: Tensor, format: Format) -> Range:
        """One histogram per block, from 0 to its largest magnitude. Unsupported for more than `MOST_BLOCKS` of them."""
        count = blocks.shape[:-1].numel()
        if count > MOST_BLOCKS:
            raise Unsupported(
                f"range estimator kl compares some 2000 histograms for each of {count} blocks, which takes hours for a "
                "model: use mse, or a format with one scale per tensor"
            )
        low, high = torch.aminmax(blocks.float(), dim=-1)
        flat = blocks.float().abs().reshape(-1, blocks.shape[-1])
        kept = [self._magnitude(block, format) for block in flat]
        return within(low, high, torch.stack(kept).reshape(low.shape))

    def of_histogram(self, histogram: Histogram, format: Format) -> Range:
        counts = histogram.magnitudes()
        if not len(counts):
            raise BadInput("the histogram is empty: no values came by, so there is no range to estimate")
        magnitude = threshold(counts, _magnitudes(format)) * histogram.width
        low, high = torch.tensor(histogram.low), torch.tensor(histogram.high)
        return within(low, high, torch.tensor(magnitude))

    def _magnitude(self, block: Tensor, format: Format) -> Tensor:
        top = block.max()
        if top == 0:
            return top
        index = (block.double() * (self.bins / top.double())).to(torch.int64).clamp_(max=self.bins - 1)
        bin = threshold(torch.bincount(index, minlength=self.bins), _magnitudes(format))
        return top if bin == self.bins else top * (bin / self.bins)


def _magnitudes(format: Format) -> int:
    """How many levels |x| is quantized to: 128 for 8 bits with a sign."""
    return max(1 << (format.bits - 1), 1)


def threshold(counts: Tensor, levels: int = 128) -> int:
    """How many of the bins of |x|, `counts` [bins], to keep.

    All of them where there is nothing to choose: fewer bins than levels, or no mass beyond the first bin.
    """
    bins = counts.double().cpu()
    if len(bins) <= levels:
        return len(bins)
    bins = torch.cat([bins[1:2], bins[1:]])
    total = float(bins.sum())
    if total == 0:
        return len(bins)
    best, least = len(bins), float("inf")
    beyond = total - bins.cumsum(0)
    for kept in range(levels, len(bins) + 1):
        divergence = _divergence(bins[:kept], float(beyond[kept - 1]), levels)
        if divergence <= least:
            best, least = kept, divergence
    return best


def _divergence(kept: Tensor, beyond: float, levels: int) -> float:
    """KL(P || Q) in nats; infinite where P has mass in a bin that Q leaves empty."""
    if beyond > 0 and kept[-1] == 0:
        return float("inf")
    count = len(kept)
    used = kept > 0
    level = torch.arange(count) * levels // count
    mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, kept)
    bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, used.double())
    spread = (mass / bins)[level[used]]
    clipped = kept.clone()
    clipped[-1] += beyond
    p, q = clipped[used] / clipped.sum(), spread / spread.sum()
    return float((p * (p / q).log()).sum())
