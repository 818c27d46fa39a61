"""How llama.cpp rounds the inputs of its products on a CPU.

A product of quantized weights is one of integers there: the inputs are rounded too, to a type that goes with that of
the weights (`vec_dot_type` in ggml-cpu.c).

    weights                            inputs
    F16, BF16                          the same 16 bits
    Q4_0 Q5_0 Q8_0 IQ4_NL MXFP4        Q8_0    x = d * q    |q| <= 127, d: fp16 per 32
    Q4_1 Q5_1                          Q8_1    the same, and an fp16 sum of the block, for the weights' minima
    K-quants, ternary, other IQ types  Q8_K    x = d * q    |q| <= 127, d: float32 per 256

The largest input of a block sets the step of all: 1/127 of it, so the error of the others grows with outliers, and a
block of 256 catches more of them than one of 32. An engine that multiplies in float rounds nothing and gives another
perplexity with the same weights; rounded here, by `round_inputs`, it is the same again, up to the order of sums.

Values are those of ggml's reference, bit for bit. Its x86 kernels make the same Q8_K; for Q8_0 they multiply by
127 / max instead of 1 / (max / 127) and take ties to the even code: of 23.6 million inputs of the embedded model's down
projections 31 differ. Q8_1's sum is not made: it is that of the codes, to 11 bits.
Sources: quantize_row_q8_0_ref and quantize_row_q8_K_ref of ggml-quants.c, type_traits_cpu of ggml-cpu.c, llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.formats import parse_format

Q8_K_BLOCK = 256


def q8_0(value: Tensor) -> Tensor:
    """`value` [..., 32 n] as Q8_0 holds it: the codes are of the float32 scale, which is then rounded to fp16."""
    return parse_format("q8_0").quantize(value.reshape(-1, value.shape[-1])).dequantize().view(value.shape)


def q8_k(value: Tensor) -> Tensor:
    """`value` [..., 256 n] as Q8_K holds it: the scale is signed, the largest input falls on -127; ties go to even."""
    blocks = value.unflatten(-1, (-1, Q8_K_BLOCK))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    # One tensor by another: a number over a tensor is the number times its reciprocal, which rounds twice.
    inverse = torch.where(largest == 0, 0.0, largest.new_tensor(-127.0) / largest)
    codes = (inverse * blocks).round().clamp(max=127)
    return (torch.where(largest == 0, 0.0, inverse.reciprocal()) * codes).flatten(-2)


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "F16": lambda value: value.half().float(),
    "BF16": lambda value: value.bfloat16().float(),
    "Q8_0": q8_0,
    "Q8_1": q8_0,
    "Q8_K": q8_k,
}

# Type of inputs: the types of weights that meet it. F32 meets what there is.
_WEIGHTS = {
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q4_0 Q5_0 Q8_0 IQ4_NL MXFP4",
    "Q8_1": "Q4_1 Q5_1",
    "Q8_K": "Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS",
}
MEETS = {"F32": "F32", **{weight: kind for kind, weights in _WEIGHTS.items() for weight in weights.split()}}


def round_inputs(model: nn.Module, source: Any) -> dict[str, int]:
    """Has every linear of `model` round its input as llama.cpp does beside the weights that `source` stores for it.

    A tied head is stored as the embeddings. Returns how many weights meet each type of input.
    """
    tied, met = source.tied(), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind = MEETS[source.info(tied.get(f"{name}.weight", f"{name}.weight")).stored]
            met[kind] = met.get(kind, 0) + module.weight.numel()
            if kind in RULES:
                module.register_forward_pre_hook(lambda _, inputs, rule=RULES[kind]: (rule(inputs[0]),))
    return met
