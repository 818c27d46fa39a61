"""The llama family: pre-norm blocks of grouped-query attention and a gated MLP.

    x = x + o_proj(attention(q, k, v = {q,k,v}_proj(input_layernorm(x))))
    x = x + down_proj(act(gate_proj(h)) * up_proj(h)),   h = post_attention_layernorm(x)

Most open models since 2023 have this shape; the tables below differ in biases, norms on queries and keys,
and in what llama.cpp calls them.
"""

from __future__ import annotations

from fewbits.models.topology import GGUFLayout, Topology

ATTENTION_INPUTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP_INPUTS = ("mlp.gate_proj", "mlp.up_proj")
NORMS = (("input_layernorm", ATTENTION_INPUTS), ("post_attention_layernorm", MLP_INPUTS))

GGUF_ATTENTION = (
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
)
GGUF_QK_NORMS = (("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm"))
GGUF_MLP = (("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj"))

# llama.cpp rotates adjacent pairs where transformers rotates halves, and reorders the rows of the query and
# key projections of architecture "llama" to make up for it. The others rotate halves there, too.
ROTARY_PERMUTED = ("self_attn.q_proj", "self_attn.k_proj")

LLAMA = Topology(
    name="llama",
    model_types=("llama", "mistral", "ministral", "seed_oss"),
    norms=NORMS,
    gguf=GGUFLayout(
        architecture="llama",
        names=GGUF_ATTENTION + GGUF_MLP,
        permuted=ROTARY_PERMUTED,
        writes=("llama", "mistral"),  # the others have architectures of their own there
    ),
)
# Granite multiplies embeddings, what blocks add, attention scores and logits by numbers of its own.
GRANITE = Topology(
    name="granite",
    model_types=("granite",),
    norms=NORMS,
    gguf=GGUFLayout(
        architecture="granite",
        names=GGUF_ATTENTION + GGUF_MLP,
        permuted=ROTARY_PERMUTED,
        scales=(
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),
        ),
    ),
)
# Every fourth block of SmolLM3 rotates nothing.
SMOLLM3 = Topology(
    name="smollm3",
    model_types=("smollm3",),
    norms=NORMS,
    gguf=GGUFLayout(
        architecture="smollm3",
        names=GGUF_ATTENTION + GGUF_MLP,
        permuted=ROTARY_PERMUTED,
        fixed=(("no_rope_layer_interval", (4,)), ("use_sliding_window", (False,))),
    ),
)
QWEN2 = Topology(
    name="qwen2",
    model_types=("qwen2",),
    norms=NORMS,
    gguf=GGUFLayout(architecture="qwen2", names=GGUF_ATTENTION + GGUF_MLP),
)
QWEN3 = Topology(
    name="qwen3",
    model_types=("qwen3",),
    norms=NORMS,
    gguf=GGUFLayout(architecture="qwen3", names=GGUF_ATTENTION + GGUF_QK_NORMS + GGUF_MLP),
)
# OLMo 2 normalises what the sub-layers write, not what they read: no norm feeds a linear.
OLMO2 = Topology(
    name="olmo2",
    model_types=("olmo2",),
    norms=(),
    gguf=GGUFLayout(
        architecture="olmo2",
        names=(
            *(pair for pair in GGUF_ATTENTION if not pair[0].endswith("norm")),
            *GGUF_QK_NORMS,
            *GGUF_MLP,
            ("post_attention_norm", "post_attention_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        ),
        fixed=(("attention_bias", (False,)), ("tie_word_embeddings", (False,))),
    ),
)
