"""From GGUF metadata to ``config.json``: the same facts under other names.

Sizes that a tensor states (vocabulary, tied head, biases) are taken from the tensors, the rest from the
``<architecture>.*`` keys. Rotary scaling needs care: "linear" and "yarn" are keys, but Llama 3's scheme is
baked into a tensor of frequency divisors, ``rope_freqs.weight``. Its four parameters are recovered from the
tensor and checked to reproduce it; a tensor they do not explain is refused rather than dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewbits.core.errors import BadInput, Unsupported
from fewbits.models.topology import Topology

ROPE_TENSOR = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (ROPE_TENSOR, ROPE_LONG, ROPE_SHORT)
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_GEMMA_PERIODS = {"gemma2": 2, "gemma3_text": 6}  # of layers with full attention; the others see a window
_GEMMA_LARGEST = {"gemma2": 46, "gemma3_text": 62}  # blocks of the size whose attention scales by width / heads
_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


MAX_BLOCKS = 1 << 12


class Keys:
    """The ``<architecture>.*`` keys of a file, with errors that name file and key."""

    def __init__(self, metadata: dict[str, Any], path: str) -> None:
        self.metadata, self.path = metadata, path
        self.architecture = metadata.get("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer below 2**31; a list that repeats one number counts as that number."""
        value = self.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, list):
            raise Unsupported(f"{self.path}: {self.architecture}.{key} differs from block to block")
        if type(value) is not int or not 0 < value < 2**31:
            raise BadInput(f"{self.path}: {self.architecture}.{key} is {value!r}; a positive integer is needed")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise BadInput(f"{self.path}: {self.architecture}.{key} is {value!r}; a positive number is needed")
        # a float32 of 1e-5 reads as 9.99999974e-06: seven digits are all it ever had
        return float(f"{value:.7g}")


def build_config(
    keys: Keys,
    topology: Topology,
    dtype: torch.dtype,
    shape: Callable[[str], tuple[int, ...] | None],
    read: Callable[[str], Tensor],
) -> dict[str, Any]:
    """The configuration of a llama-like model; `shape(gguf name)` is None for a tensor the file lacks.

    Raises BadInput for missing or impossible keys, Unsupported for rotary schemes without an equivalent.
    """
    family = topology.name
    embeddings = shape("token_embd.weight")
    if embeddings is None or len(embeddings) != 2:
        raise BadInput(f"{keys.path}: the file holds no matrix 'token_embd.weight', so no language model")
    hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
    if hidden % heads and keys.get("attention.key_length") is None:
        raise BadInput(f"{keys.path}: {heads} heads do not divide the width {hidden}")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": embeddings[0],
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "head_dim": keys.size("attention.key_length", keys.get("rope.dimension_count") or hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.real("attention.layer_norm_rms_epsilon", 1e-5),
        "tie_word_embeddings": shape("output.weight") is None,
        "dtype": str(dtype).removeprefix("torch."),
    }
    rope = _rope(keys, config["head_dim"], shape, read)
    config["rope_parameters"] = rope
    config["rope_theta"] = rope["rope_theta"]  # where readers older than transformers 5 look
    config.update(_family_fields(keys, family, shape))
    config.update(_layout_fields(keys, topology, config["head_dim"]))
    if family == "gemma3_text":
        window = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 10000.0)}
        config["rope_parameters"] = {"full_attention": rope, "sliding_attention": window}
    config.update(token_ids(keys.metadata))
    return config


def token_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The special token ids the file states, under the names of config.json."""
    return {
        name: metadata[key] for name, key in _TOKEN_IDS.items() if type(metadata.get(key)) is int and metadata[key] >= 0
    }


def _family_fields(keys: Keys, family: str, shape: Callable[[str], tuple[int, ...] | None]) -> dict[str, Any]:
    if family == "qwen2":
        return {"use_sliding_window": False}
    if family.startswith("gemma"):
        return _gemma_fields(keys, family)
    if family == "phi3":
        return _phi3_fields(keys)
    if family == "mixtral":
        return {
            "num_local_experts": keys.size("expert_count"),
            "num_experts_per_tok": keys.size("expert_used_count"),
        }
    biased = shape("blk.0.attn_q.bias") is not None
    fields: dict[str, Any] = {"qkv_bias" if family == "qwen2_moe" else "attention_bias": biased}
    if family in ("llama", "granite", "smollm3"):
        fields["mlp_bias"] = shape("blk.0.ffn_up.bias") is not None
    if family == "smollm3":
        fields["pad_token_id"] = None  # transformers' default is a token of its own vocabulary
    if family in ("qwen2_moe", "qwen3_moe", "olmoe"):
        fields["num_experts"] = keys.size("expert_count")
        fields["num_experts_per_tok"] = keys.size("expert_used_count")
    if family in ("qwen2_moe", "qwen3_moe"):
        fields["moe_intermediate_size"] = keys.size("expert_feed_forward_length")
    if family == "qwen2_moe":
        fields["shared_expert_intermediate_size"] = keys.size("expert_shared_feed_forward_length")
    if family == "qwen3_moe":  # llama.cpp normalises always, so only such models are converted
        fields |= {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    return fields


def _layout_fields(keys: Keys, topology: Topology, width: int) -> dict[str, Any]:
    """What the family's table says: fields that llama.cpp takes for granted, and factors."""
    layout = topology.gguf
    assert layout is not None
    fields = {field: values[0] for field, values in layout.fixed if field != "tie_word_embeddings"}
    for key, field in layout.scales:
        fields[field] = keys.real(key, width**-0.5 if key == "attention.scale" else 1.0)
    return fields


def _gemma_fields(keys: Keys, family: str) -> dict[str, Any]:
    """What Gemma adds; llama.cpp itself knows the pattern of windows and the scale of attention."""
    act = "gelu_pytorch_tanh"
    if family == "gemma":
        return {"hidden_act": act, "hidden_activation": act, "attention_bias": False}
    blocks, period = keys.size("block_count"), _GEMMA_PERIODS[family]
    if blocks > MAX_BLOCKS:
        raise BadInput(f"{keys.path}: {blocks} blocks; at most {MAX_BLOCKS} are allowed")
    width = keys.size("attention.key_length", 256)
    largest = blocks == _GEMMA_LARGEST[family]
    scalar = keys.size("embedding_length") // keys.size("attention.head_count") if largest else width
    fields: dict[str, Any] = {
        "hidden_activation": act,
        "attention_bias": False,
        "query_pre_attn_scalar": scalar,
        "sliding_window": keys.size("attention.sliding_window", 4096),
        "layer_types": ["sliding_attention" if (n + 1) % period else "full_attention" for n in range(blocks)],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    if family == "gemma2":
        fields["attn_logit_softcapping"] = keys.real("attn_logit_softcapping", 50.0)
        fields["final_logit_softcapping"] = keys.real("final_logit_softcapping", 30.0)
    return fields


def _phi3_fields(keys: Keys) -> dict[str, Any]:
    length = keys.get("rope.scaling.original_context_length") or keys.size("context_length")
    window = keys.get("attention.sliding_window")
    return {
        "original_max_position_embeddings": length,
        "sliding_window": window if type(window) is int and window > 0 else None,
        "pad_token_id": None,
    }


def _rope(
    keys: Keys, width: int, shape: Callable[[str], tuple[int, ...] | None], read: Callable[[str], Tensor]
) -> dict[str, Any]:
    theta = keys.real("rope.freq_base", 10000.0)
    default = {"rope_type": "default", "rope_theta": theta}
    if shape(ROPE_TENSOR) is not None:
        return default | _llama3(keys, read(ROPE_TENSOR), theta, width)
    rotated = keys.size("rope.dimension_count", width)
    if rotated != width:
        default["partial_rotary_factor"] = rotated / width
    if shape(ROPE_LONG) is not None and shape(ROPE_SHORT) is not None:
        return default | _longrope(keys, read(ROPE_LONG), read(ROPE_SHORT), rotated)
    kind = keys.get("rope.scaling.type", "none")
    if kind == "none" or (kind == "linear" and keys.get("rope.scaling.factor") in (None, 0.0, 1.0)):
        return default
    if kind not in ("linear", "yarn"):
        raise Unsupported(f"{keys.path}: rotary scaling {kind!r}; fewbits reads none, linear, yarn and Llama 3's")
    scaled = default | {"rope_type": kind, "factor": keys.real("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        length = keys.get("rope.scaling.original_context_length")
        scaled["original_max_position_embeddings"] = length or keys.size("context_length")
    return scaled


def _longrope(keys: Keys, long: Tensor, short: Tensor, rotated: int) -> dict[str, Any]:
    """Phi-3's factors of each frequency, for long and for short texts."""
    for factors in (long, short):
        if factors.shape != (rotated // 2,) or not bool((factors.isfinite() & (factors > 0)).all()):
            raise BadInput(f"{keys.path}: rotary factors {tuple(factors.shape)}; {rotated // 2} positive ones needed")
    length = keys.size("rope.scaling.original_context_length", keys.size("context_length"))
    return {
        "rope_type": "longrope",
        "long_factor": [float(f"{value:.7g}") for value in long.float().tolist()],
        "short_factor": [float(f"{value:.7g}") for value in short.float().tolist()],
        "original_max_position_embeddings": length,
        "factor": max(1.0, keys.size("context_length") / length),
        "attention_factor": keys.real("rope.scaling.attn_factor", 1.0),
    }


def _llama3(keys: Keys, divisors: Tensor, theta: float, width: int) -> dict[str, Any]:
    """Llama 3's parameters behind a tensor of frequency divisors, verified against it."""
    divisors = divisors.float().flatten()
    for original in (8192, 4096, 2048, keys.size("context_length")):
        found = {
            "rope_type": "llama3",
            "factor": float(f"{float(divisors.max()):.6g}"),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        expected = llama3_divisors(found, theta, width)
        if expected.shape == divisors.shape and torch.allclose(expected, divisors, rtol=1e-4):
            return found
    raise Unsupported(f"{keys.path}: the rotary frequencies in {ROPE_TENSOR!r} follow no scheme fewbits knows")


def llama3_divisors(found: dict[str, Any], theta: float, width: int) -> Tensor:
    """1 for short wavelengths, `factor` for long ones, between them 1 / (a mean of 1/factor and 1)."""
    wavelengths = 2 * math.pi * theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    ratio = found["original_max_position_embeddings"] / wavelengths
    low, high = found["low_freq_factor"], found["high_freq_factor"]
    smooth = ((ratio - low) / (high - low)).clamp(0, 1)
    divisors: Tensor = 1 / ((1 - smooth) / found["factor"] + smooth)
    return divisors.float()
