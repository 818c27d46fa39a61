"""From ``config.json`` to GGUF metadata: the inverse of gguf_config.py.

A key that llama.cpp lacks is a fact it does not know. So a configuration is written only if every field that changes
what the model computes is either a key or what llama.cpp does anyway; others are refused by name. Llama 3's rotary
scaling and Phi-3's two lists of factors are tensors there (`rope_tensors`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints.gguf_config import ROPE_LONG, ROPE_SHORT, ROPE_TENSOR, llama3_divisors
from fewbits.core.errors import BadInput, Unsupported
from fewbits.models.topology import Topology

# general.file_type, for people and for listings: the type that most weights have
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14,
    "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4": 38,
}  # fmt: skip
_PERIODS = {"gemma2": 2, "gemma3_text": 6}  # of layers with full attention; the others see a window
_LARGEST = {"gemma2": 46, "gemma3_text": 62}  # blocks of the size whose attention llama.cpp scales by width / heads


def model_keys(config: dict[str, Any], topology: Topology, where: str) -> dict[str, Any]:
    """The ``<architecture>.*`` keys. Unsupported, naming the field, for what llama.cpp would compute otherwise."""
    layout = topology.gguf
    assert layout is not None
    _refuse(config, topology, where)

    def size(name: str, default: int | None = None) -> int:
        value = default if config.get(name) is None else config[name]
        if type(value) is not int or value <= 0:
            raise BadInput(f"{where}: config.json has {name} {value!r}; a positive integer is needed")
        return value

    heads = size("num_attention_heads")
    width = size("head_dim", size("hidden_size") // heads)
    keys: dict[str, Any] = {
        "vocab_size": size("vocab_size"),
        "context_length": size("max_position_embeddings"),
        "embedding_length": size("hidden_size"),
        "block_count": size("num_hidden_layers"),
        "feed_forward_length": size("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": size("num_key_value_heads", heads),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps") or 1e-6),
        **_rope_keys(config, width, where),
    }
    if topology.experts is not None:
        experts = "num_experts" if "num_experts" in config else "num_local_experts"
        keys["expert_count"] = size(experts)
        keys["expert_used_count"] = size("num_experts_per_tok")
        if "moe_intermediate_size" in config:
            keys["expert_feed_forward_length"] = size("moe_intermediate_size")
        if "shared_expert_intermediate_size" in config:
            keys["expert_shared_feed_forward_length"] = size("shared_expert_intermediate_size")
    if topology.name in ("gemma2", "gemma3_text", "phi3") and isinstance(config.get("sliding_window"), int):
        keys["attention.sliding_window"] = size("sliding_window")
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if topology.name == "gemma2" and config.get(cap):
            keys[cap] = float(config[cap])
    for key, field in layout.scales:
        factor = config.get(field, 1.0)
        if not isinstance(factor, int | float) or not 0 < factor < float("inf"):
            raise BadInput(f"{where}: config.json has {field} {factor!r}; a positive number is needed")
        keys[key] = float(factor)
    return {f"{layout.architecture}.{key}": value for key, value in keys.items()}


def rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters, whether config.json has them transformers 5's way or as older versions wrote them."""
    stated = config.get("rope_parameters") or {}
    older = config.get("rope_scaling") or {}
    kind = older.get("rope_type") or older.get("type") or "default"
    found = {"rope_theta": config.get("rope_theta"), **older, "rope_type": kind, **stated}
    found["rope_theta"] = float(found.get("rope_theta") or 10000.0)
    if config.get("partial_rotary_factor") is not None:
        found.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    return found


def full_attention_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters of layers with full attention: Gemma 3 gives those with a window others."""
    stated = config.get("rope_parameters") or {}
    if "full_attention" in stated:
        return rope_parameters({"rope_parameters": stated["full_attention"]})
    return rope_parameters(config)


def _rope_keys(config: dict[str, Any], width: int, where: str) -> dict[str, Any]:
    rope = full_attention_rope(config)
    kind = rope["rope_type"]
    share = float(rope.get("partial_rotary_factor") or 1.0)
    keys: dict[str, Any] = {"rope.dimension_count": round(width * share), "rope.freq_base": rope["rope_theta"]}
    window = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    base = window.get("rope_theta") or config.get("rope_local_base_freq")
    if base:
        keys["rope.freq_base_swa"] = float(base)
    if kind in ("linear", "yarn"):
        keys["rope.scaling.type"] = kind
        keys["rope.scaling.factor"] = float(rope["factor"])
    if kind in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = int(
            rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
            or config["max_position_embeddings"]
        )  # fmt: skip
    if kind == "yarn":
        extra = {key for key in ("attention_factor", "beta_fast", "beta_slow", "mscale") if rope.get(key) is not None}
        if extra:
            raise Unsupported(f"{where}: YaRN with {', '.join(sorted(extra))} is not written to GGUF")
    if kind not in ("default", "linear", "yarn", "llama3", "longrope"):
        raise Unsupported(f"{where}: rotary scaling {kind!r}; GGUF takes default, linear, yarn, llama3 and longrope")
    if kind == "longrope":
        keys["rope.scaling.attn_factor"] = _longrope_factor(rope, config)
    return keys


def _longrope_factor(rope: dict[str, Any], config: dict[str, Any]) -> float:
    """What transformers multiplies cosines and sines by (its documentation, and the paper arXiv 2402.13753)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
    scale = float(rope.get("factor") or config["max_position_embeddings"] / original)
    if scale <= 1:
        return 1.0
    logs = torch.tensor([scale, original], dtype=torch.float64).log()
    return float((1 + logs[0] / logs[1]).sqrt())


def rope_tensors(config: dict[str, Any], topology: Topology, where: str) -> dict[str, Tensor]:
    """GGUF name -> float32 tensor of what rotary scaling needs besides keys."""
    rope = full_attention_rope(config)
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if rope["rope_type"] == "llama3":
        if topology.gguf is None or topology.gguf.architecture != "llama":
            raise Unsupported(f"{where}: llama.cpp takes Llama 3's rotary scaling for llama, not {topology.name}")
        return {ROPE_TENSOR: llama3_divisors(rope, rope["rope_theta"], width)}
    if rope["rope_type"] != "longrope":
        return {}
    long, short = (torch.tensor(rope[f"{name}_factor"], dtype=torch.float32) for name in ("long", "short"))
    return {ROPE_LONG: long, ROPE_SHORT: short}


def _refuse(config: dict[str, Any], topology: Topology, where: str) -> None:
    """What the keys cannot say: Unsupported with the field's name."""
    layout = topology.gguf
    assert layout is not None
    model_type = config.get("model_type")
    if layout.writes is not None and model_type not in layout.writes:
        raise Unsupported(f"{where}: {model_type} is not {layout.architecture} to llama.cpp: GGUF cannot be written")
    activation = config.get("hidden_activation") or config.get("hidden_act") or layout.activation[0]
    if activation not in layout.activation:
        raise Unsupported(f"{where}: activation {activation!r}; llama.cpp computes {layout.activation[0]} here")
    for field, values in layout.fixed:
        if config.get(field, values[0]) not in values:
            raise Unsupported(f"{where}: {field} is {config[field]!r}; llama.cpp computes with {values[0]!r} here")
    for check in (_window, _attention_scale, _heads, _layers, _routing):
        reason = check(config, topology.name)
        if reason is not None:
            raise Unsupported(f"{where}: {reason}, which llama.cpp does not compute for {topology.name}")


def _window(config: dict[str, Any], family: str) -> str | None:
    if config.get("use_sliding_window") and family.startswith("qwen"):
        return "use_sliding_window is true"
    return "use_bidirectional_attention is true" if config.get("use_bidirectional_attention") else None


def _attention_scale(config: dict[str, Any], family: str) -> str | None:
    """llama.cpp scales scores by the head's width, in the largest Gemmas by width / heads."""
    scalar = config.get("query_pre_attn_scalar")
    if family not in _PERIODS or scalar is None:
        return None
    largest = config.get("num_hidden_layers") == _LARGEST[family]
    usual = config["hidden_size"] // config["num_attention_heads"] if largest else config.get("head_dim", 256)
    return None if scalar == usual else f"query_pre_attn_scalar is {scalar}, not {usual}"


def _heads(config: dict[str, Any], family: str) -> str | None:
    heads, width = config["num_attention_heads"], config.get("head_dim")
    if family in ("olmo2", "olmoe", "qwen2_moe") and width and width * heads != config["hidden_size"]:
        return f"{heads} heads of {width} are not hidden_size {config['hidden_size']}"
    if family == "olmoe" and (config.get("num_key_value_heads") or heads) != heads:
        return "num_key_value_heads is not num_attention_heads"
    return None


def _layers(config: dict[str, Any], family: str) -> str | None:
    kinds = config.get("layer_types")
    rotated = config.get("no_rope_layers")
    if family == "smollm3" and rotated and any(bool(each) != bool((n + 1) % 4) for n, each in enumerate(rotated)):
        return "no_rope_layers is not every fourth"
    if family not in _PERIODS or not kinds:
        return None
    period = _PERIODS[family]
    usual = ["sliding_attention" if (index + 1) % period else "full_attention" for index in range(len(kinds))]
    return None if kinds == usual else f"layer_types is not one full attention after {period - 1} with a window"


def _routing(config: dict[str, Any], family: str) -> str | None:
    if family == "qwen3_moe" and (
        config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1 or not config.get("norm_topk_prob")
    ):
        return "blocks without experts, or gates that are not normalised"
    return None
