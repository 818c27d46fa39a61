"""Phi-3: the llama block with q, k, v fused in one linear and gate, up in another."""

from __future__ import annotations

from fewbits.models.topology import GGUFLayout, Topology

PHI3 = Topology(
    name="phi3",
    model_types=("phi3",),
    norms=(
        ("input_layernorm", ("self_attn.qkv_proj",)),
        ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
    products=(("*up_proj", "*down_proj"),),
    value_output=None,
    shared_inputs=(("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)),
    gguf=GGUFLayout(
        architecture="phi3",
        names=(
            ("attn_norm", "input_layernorm"),
            ("attn_qkv", "self_attn.qkv_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("ffn_up", "mlp.gate_up_proj"),
            ("ffn_down", "mlp.down_proj"),
        ),
    ),
)
