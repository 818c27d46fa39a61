"""Mixtures of experts: the llama block with the MLP replaced by a router and many MLPs.

transformers keeps all experts of a block in two 3-D parameters, ``gate_up_proj`` [E, 2I, H] and
``down_proj`` [E, H, I]; checkpoints keep three matrices per expert. Every expert's gate and up read the
block's second norm, as the router does. Routers are small and decide discretely, so they are left alone.
"""

from __future__ import annotations

from typing import Any

from fewbits.models.llama import ATTENTION_INPUTS, GGUF_ATTENTION, GGUF_QK_NORMS, ROTARY_PERMUTED
from fewbits.models.topology import ExpertLayout, GGUFLayout, Topology

EXPERT_INPUTS = ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
NORMS = (("input_layernorm", ATTENTION_INPUTS), ("post_attention_layernorm", EXPERT_INPUTS))
# What llama.cpp takes for granted of its architectures, by the fields of config.json.
Fixed = tuple[tuple[str, tuple[Any, ...]], ...]
GATES_AS_THEY_ARE: Fixed = (("norm_topk_prob", (False,)),)  # the chosen experts' probabilities, not made to sum to 1
EXPERTS_EVERYWHERE: Fixed = (("decoder_sparse_step", (1,)), ("mlp_only_layers", ([], None)))
GGUF_EXPERTS = (("ffn_gate_exps", "gate_proj"), ("ffn_up_exps", "up_proj"), ("ffn_down_exps", "down_proj"))

QWEN3_MOE = Topology(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    norms=NORMS,
    routers=("mlp.gate",),
    experts=ExpertLayout(),
    gguf=GGUFLayout(
        architecture="qwen3moe",
        names=(*GGUF_ATTENTION, *GGUF_QK_NORMS, ("ffn_gate_inp", "mlp.gate")),
        experts=GGUF_EXPERTS,
    ),
)
QWEN2_MOE = Topology(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    norms=(
        ("input_layernorm", ATTENTION_INPUTS),
        (
            "post_attention_layernorm",
            (
                *EXPERT_INPUTS,
                "mlp.shared_expert.gate_proj",
                "mlp.shared_expert.up_proj",
                "mlp.shared_expert_gate",
            ),
        ),
    ),
    routers=("mlp.gate", "mlp.shared_expert_gate"),
    experts=ExpertLayout(),
    gguf=GGUFLayout(
        architecture="qwen2moe",
        names=(
            *GGUF_ATTENTION,
            ("ffn_gate_inp", "mlp.gate"),
            ("ffn_gate_inp_shexp", "mlp.shared_expert_gate"),
            ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
            ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
            ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
        ),
        experts=GGUF_EXPERTS,
        vectors=("mlp.shared_expert_gate",),
        fixed=(*GATES_AS_THEY_ARE, *EXPERTS_EVERYWHERE, ("tie_word_embeddings", (False,))),
    ),
)
OLMOE = Topology(
    name="olmoe",
    model_types=("olmoe",),
    norms=NORMS,
    routers=("mlp.gate",),
    experts=ExpertLayout(),
    gguf=GGUFLayout(
        architecture="olmoe",
        names=(*GGUF_ATTENTION, *GGUF_QK_NORMS, ("ffn_gate_inp", "mlp.gate")),
        experts=GGUF_EXPERTS,
        fixed=(
            *GATES_AS_THEY_ARE,
            ("clip_qkv", (None,)),
            ("attention_bias", (False,)),
            ("tie_word_embeddings", (False,)),
        ),
    ),
)
MIXTRAL = Topology(
    name="mixtral",
    model_types=("mixtral",),
    norms=NORMS,
    routers=("mlp.gate",),
    experts=ExpertLayout(disk="block_sparse_moe.experts.{expert}.{part}", gate="w1", up="w3", down="w2"),
    renamed=((".mlp.", ".block_sparse_moe."),),
    gguf=GGUFLayout(
        architecture="llama",
        names=(*GGUF_ATTENTION, ("ffn_gate_inp", "mlp.gate")),
        experts=GGUF_EXPERTS,
        permuted=ROTARY_PERMUTED,
    ),
)
