"""Gemma: the llama block with norms that multiply by 1 + w, embeddings scaled by sqrt(width), and a tied head.

Gemma 2 and 3 normalise what the sub-layers write as well; 2 caps logits with tanh, 3 normalises queries and keys; both
let most layers attend to a window only. A weight w of these norms is stored as its distance from 1, so a scale
cannot be folded into it by a product: `norms` is empty, and the transforms that need it leave the family alone. GGUF
holds 1 + w (`norm_offset`).
"""

from __future__ import annotations

from fewbits.models.llama import GGUF_ATTENTION, GGUF_MLP, GGUF_QK_NORMS
from fewbits.models.topology import GGUFLayout, Topology

_GELU = ("gelu_pytorch_tanh", "gelu")  # configurations of Gemma say "gelu" where the model computes the other
_POST_NORMS = (
    *(pair for pair in GGUF_ATTENTION if pair[0] != "ffn_norm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)

GEMMA = Topology(
    name="gemma",
    model_types=("gemma",),
    norms=(),
    gguf=GGUFLayout(architecture="gemma", names=GGUF_ATTENTION + GGUF_MLP, norm_offset=1.0, activation=_GELU),
)
GEMMA2 = Topology(
    name="gemma2",
    model_types=("gemma2",),
    norms=(),
    gguf=GGUFLayout(architecture="gemma2", names=_POST_NORMS + GGUF_MLP, norm_offset=1.0, activation=_GELU),
)
GEMMA3 = Topology(
    name="gemma3_text",
    model_types=("gemma3_text",),
    norms=(),
    gguf=GGUFLayout(
        architecture="gemma3", names=_POST_NORMS + GGUF_QK_NORMS + GGUF_MLP, norm_offset=1.0, activation=_GELU
    ),
)
