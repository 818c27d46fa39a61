"""What rounding inputs costs a layer, which channels are to blame, and what would help: seen before codes are made.

For a sample x of what linears of weight W read, both rounded to nearest in the formats they will have,

    e = ||x W^T - Q(x) Q(W)^T||^2 / ||x W^T||^2            the share of the outputs that is lost
    inputs = ||(x - Q(x)) W^T||^2 / ||x W^T||^2            that of rounding the inputs alone

and e again with one thing changed at a time:

| remedy | changes |
|---|---|
| token | one scale a token, where the scheme has one for all of them |
| sinks | one scale for all tokens but sinks, where the scheme has one for all of them |
| llm_int8 | the largest hundredth of the channels in 16 bits |
| smoothquant | x / s and W s, alpha 1/2 |
| rotate | x and W transformed by a Hadamard matrix |

A channel is to blame for what goes away with it: `inputs` without the rounding of channel d, whose magnitude then sets
no scale either. Static scales are those of the sample. Sinks (formats/rows.py) are rounded along, but what is lost of
them is not counted: a single one can hold more energy than all other tokens together, and with the scale it asks for it
is the only one that loses nothing. What helps a layer is an estimate of what helps the model:
errors of layers neither add up nor count alike, but where one remedy takes away nine tenths of them and others nothing,
it is clear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.algorithms.smoothing import smoothing_scales
from fewbits.formats import Format, hadamard
from fewbits.formats.outliers import round_rest
from fewbits.formats.rows import by_token, round_rows, sinks, sparing_sinks

ROWS = 64  # tokens looked at
_BLAMED = 3  # channels


def diagnose(x: Tensor, weights: Sequence[Tensor], format: Format, activations: Format) -> dict[str, Any]:
    """JSON: `error`, `inputs`, `channels` [[number, share of `inputs`], ...], worst first, `remedies`, and `sinks`:
    the share of the tokens that are.

    x [tokens, in] is what linears of `weights` [out, in] read.
    """
    x, weight = x.float(), torch.cat([weight.float() for weight in weights])
    counted = ~sinks(x)
    exact = x[counted] @ weight.t()
    signal = float(exact.square().sum()) or 1.0
    rounded, codes = round_rows(x, activations), format.quantize(weight).dequantize()

    def lost(inputs: Tensor, weight: Tensor) -> float:
        return float((exact - inputs[counted] @ weight.t()).square().sum()) / signal

    def both(inputs: Tensor, weight: Tensor) -> float:
        return lost(round_rows(inputs, activations), format.quantize(weight).dequantize())

    inputs = lost(rounded, weight)
    largest = x.abs().amax(0)
    order = largest.argsort(descending=True)
    most = order[: max(1, len(order) // 100)].sort().values
    s = smoothing_scales(largest, [weight])
    orders = hadamard.block_factors(x.shape[1])
    remedies = {
        "llm_int8": lost(round_rest(x, activations, most), codes.index_copy(1, most, weight[:, most])),
        "smoothquant": both(x / s, weight * s),
        "rotate": both(hadamard.transform(x, orders), hadamard.transform(weight, orders)),
    }
    if activations.scaling.block == "tensor":
        remedies["token"] = lost(round_rows(x, by_token(activations)), codes)
        remedies["sinks"] = lost(round_rows(x, sparing_sinks(activations)), codes)
    blamed = []
    for channel in order[:_BLAMED].tolist():
        without = lost(round_rest(x, activations, torch.tensor([channel], device=x.device)), weight)
        blamed.append([channel, 1 - without / inputs if inputs else 0.0])
    blamed.sort(key=lambda each: -each[1])
    return {
        "error": lost(rounded, codes),
        "inputs": inputs,
        "channels": blamed,
        "remedies": remedies,
        "sinks": 1 - float(counted.float().mean()),
    }
