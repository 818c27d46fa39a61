"""A lean decode engine for models of the llama shape: the same weights, without modules.

At one token a step, a small model spends as long in Python as in arithmetic: transformers' Llama makes some
60 torch calls a layer through a dozen modules. Here a layer is about 20 calls on plain tensors:

    x = rms_norm(h) * g;  q, k, v = one product;  rotate q and k;  cache k and v;  attend
    h += o_proj(attended)
    x = rms_norm(h) * g;  gate, up = one product
    h += down_proj(silu(gate) * up)

- *Products* are joined where weights read the same x (runtime/product.py); each states the dtype it computes
  in, and x is cast once per product. Hidden states are float32.
- *Rotation*: with a = first half, b = second half of a head, (a + ib) * exp(i * angle) is one complex
  multiplication. Keys are cached rotated, as interleaved (real, imaginary) pairs; queries are in the same
  order, and a dot product does not mind the order.
- *Cache*: one float32 tensor, [layers, 2, kv heads, capacity, head size], doubled when full. A prompt that
  begins as the last one did keeps the common part: a chat does not read its own history again.
- *One token on a CPU* goes through runtime/one_row.py, the same computation with every buffer made before.
- *Head*: on a CPU, float16 with a power of two per row (exact for weights that were bfloat16, 11 bits of
  mantissa for others). A float32 head of 49152 x 576 takes 11 ms a token on 2 cores, bfloat16 4, this 2.3.

Accuracy: float32 weights agree with transformers to rounding but for the head, 70 dB or better in the logits;
4-bit and 8-bit kernels round x to bfloat16 per product, as they do in transformers too.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbits.core.errors import BadInput, Unsupported
from fewbits.kernels import No, Yes
from fewbits.nn.mixed_linear import MixedLinear
from fewbits.nn.qlinear import QLinear
from fewbits.runtime.one_row import OneRow
from fewbits.runtime.product import Product, product

# Families whose block is exactly the one above, with or without biases and with or without norms on q and k.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length so far
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def accepts(model: nn.Module) -> Yes | No:
    """Whether `Engine(model)` computes what the model does, or why not."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in MODEL_TYPES or type(model).__name__ != _CLASSES[kind]:
        return No(f"{kind} is not of the llama shape ({', '.join(MODEL_TYPES)})")
    if config.hidden_act != "silu":
        return No(f"its activation is {config.hidden_act}, not silu")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return No("it has layers of sliding attention")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return No("it has sliding attention")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE:
        return No(f"its rotary frequencies ({rope}) depend on the length")
    if model.training:
        return No("it is in training mode: call model.eval()")
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in (*_ATTENTION, *_MLP, "lm_head") and type(module) not in (nn.Linear, QLinear, MixedLinear):
            return No(f"{name} is a {type(module).__name__}, neither Linear nor QLinear")
        if module._forward_hooks or module._forward_pre_hooks:
            return No(f"{name or 'the model'} has forward hooks")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        return No("its weights are not all on one device")
    return Yes()


_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class _Layer:
    """What one block needs, as plain attributes."""

    __slots__ = (
        "down",
        "eps",
        "gate_up",
        "k_norm",
        "keys",
        "mlp_norm",
        "norm",
        "o",
        "q_norm",
        "qkv",
        "values",
    )

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.norm = block.input_layernorm.weight.detach().float()
        self.mlp_norm = block.post_attention_layernorm.weight.detach().float()
        self.eps = block.input_layernorm.variance_epsilon
        self.qkv = product(attention.q_proj, attention.k_proj, attention.v_proj, dtype=dtype)
        self.o = product(attention.o_proj, dtype=dtype)
        self.gate_up = product(mlp.gate_proj, mlp.up_proj, dtype=dtype)
        self.down = product(mlp.down_proj, dtype=dtype)
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.q_norm = None if q_norm is None else q_norm.weight.detach().float()
        self.k_norm = None if k_norm is None else k_norm.weight.detach().float()


class Engine:
    """Decodes with the weights of `model`, batch 1. Raises Unsupported with the reason where `accepts` says
    no.

    `prefill(ids)` reads a prompt and gives the logits [vocabulary] after it; `step(token)` appends one token.
    The engine holds the weights, not the model; weights changed afterwards need a new engine.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, capacity: int = 512) -> None:
        answer = accepts(model)
        if isinstance(answer, No):
            raise Unsupported(f"the decode engine does not take this model: {answer.reason}; use model.generate")
        body: Any = model.model
        config: Any = model.config
        self.limit: int = config.max_position_embeddings
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.width: int = body.layers[0].self_attn.head_dim
        self.device: torch.device = body.embed_tokens.weight.device
        self._embeddings = body.embed_tokens.weight.detach()
        dtype = self._embeddings.dtype
        self._layers = [_Layer(block, dtype) for block in body.layers]
        self._norm, self._eps = body.norm.weight.detach().float(), body.norm.variance_epsilon
        self._head: Product = product(model.lm_head, dtype=dtype, fast_head=True)
        rotary = body.rotary_emb
        self._frequencies = rotary.inv_freq.detach().float()
        self._amplitude = float(rotary.attention_scaling)
        self._scale = float(body.layers[0].self_attn.scaling)
        self._one_row: OneRow | None = None
        if self.device.type == "cpu":
            self._one_row = OneRow(
                self._layers,
                heads=self.heads,
                kv_heads=self.kv_heads,
                width=self.width,
                hidden=self._embeddings.shape[1],
                scale=self._scale,
            )
        self.tokens: list[int] = []
        self._capacity = 0
        self._reserve(min(capacity, self.limit))

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int], *, every: bool = False) -> Tensor:
        """Logits after the last of `ids`, float32 [vocabulary]; with `every`, after each of them, [len(ids),
        vocabulary].

        The longest common beginning of `ids` and what was read before is not read again. BadInput for an
        empty prompt or one longer than the model's context.
        """
        ids = list(ids)
        if not ids:
            raise BadInput("the prompt is empty: there is nothing to continue")
        if len(ids) > self.limit:
            raise BadInput(f"the prompt has {len(ids)} tokens; the model reads {self.limit} at most")
        kept = 0
        if not every:
            # The last token is always read: its logits are wanted.
            while kept < min(len(ids) - 1, len(self.tokens)) and ids[kept] == self.tokens[kept]:
                kept += 1
        del self.tokens[kept:]
        return self._read(ids[kept:], every)

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Logits after `token`, float32 [vocabulary]. BadInput past the model's context."""
        if len(self.tokens) >= self.limit:
            raise BadInput(f"the model's context of {self.limit} tokens is full")
        return self._read([token], False)

    def _read(self, ids: list[int], every: bool) -> Tensor:
        start, end = len(self.tokens), len(self.tokens) + len(ids)
        if end > self._capacity:
            self._reserve(min(max(end, 2 * self._capacity), self.limit))
        if len(ids) == 1 and self._one_row is not None:
            # `float` of a float32 row is a view of the embeddings, and h is written to.
            h = self._embeddings[ids[0]].to(torch.float32, copy=True)[None]
            h = self._one_row(h, self._turns[start], self._cache, start)
        else:
            h = self._embeddings[ids].float()
            for index, layer in enumerate(self._layers):
                h = self._block(layer, h, self._cache[index], start)
        if not every:
            h = h[-1:]
        logits = self._head.apply(self._normed(h, self._norm, self._eps, self._head.dtype)).float()
        self.tokens.extend(ids)
        return logits if every else logits[0]

    def _block(self, layer: _Layer, h: Tensor, cache: Tensor, start: int) -> Tensor:
        """h [rows, hidden] of the tokens from `start` on; cache [2, kv heads, capacity, width] of this layer."""
        rows, heads, kv = h.shape[0], self.heads, self.kv_heads
        end = start + rows
        x = self._normed(h, layer.norm, layer.eps, layer.qkv.dtype)
        qkv = layer.qkv.apply(x).float().view(rows, heads + 2 * kv, self.width)
        qk = qkv[:, : heads + kv]
        if layer.q_norm is not None:
            qk = self._head_norms(layer, qk)
        half = self.width // 2
        turned = torch.complex(qk[..., :half], qk[..., half:]).mul_(self._turns[start:end])
        qk = torch.view_as_real(turned).flatten(-2)
        cache[0, :, start:end] = qk[:, heads:].transpose(0, 1)
        cache[1, :, start:end] = qkv[:, heads + kv :].transpose(0, 1)
        context = self._attend(qk[:, :heads], cache[0, :, :end], cache[1, :, :end], start)
        h = h.add_(layer.o.apply(context.to(layer.o.dtype)))
        x = self._normed(h, layer.mlp_norm, layer.eps, layer.gate_up.dtype)
        both = layer.gate_up.apply(x)
        inner = layer.gate_up.widths[0]
        x = functional.silu(both[:, :inner]).mul_(both[:, inner:])
        return h.add_(layer.down.apply(x.to(layer.down.dtype)))

    def _normed(self, h: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """h * rsqrt(mean(h²) + eps) * weight in `dtype`."""
        return functional.rms_norm(h, (h.shape[1],), weight, eps).to(dtype)

    def _head_norms(self, layer: _Layer, qk: Tensor) -> Tensor:
        shape = (self.width,)
        queries = functional.rms_norm(qk[:, : self.heads], shape, layer.q_norm, layer.eps)
        return torch.cat([queries, functional.rms_norm(qk[:, self.heads :], shape, layer.k_norm, layer.eps)], 1)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """queries [rows, heads, width], keys and values [kv heads, end, width] -> [rows, heads * width]."""
        rows, end = queries.shape[0], keys.shape[1]
        # Row i of the new tokens sees the cache and the new tokens up to itself.
        mask = None
        if start and rows > 1:
            mask = torch.ones(rows, end, dtype=torch.bool, device=self.device).tril(start)
        context = functional.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None and rows > 1,
            scale=self._scale,
            enable_gqa=self.heads != self.kv_heads,
        )
        return context[0].transpose(0, 1).reshape(rows, -1)

    def _reserve(self, capacity: int) -> None:
        """Room for `capacity` tokens in the caches and the table of rotations."""
        grown = torch.empty(len(self._layers), 2, self.kv_heads, capacity, self.width, device=self.device)
        used = len(self.tokens)
        if used:
            grown[:, :, :, :used] = self._cache[:, :, :, :used]
        self._cache = grown
        angles = torch.arange(capacity, device=self.device).float()[:, None] * self._frequencies
        amplitude = torch.full_like(angles, self._amplitude)
        self._turns = torch.polar(amplitude, angles)[:, None]
        self._capacity = capacity


_ENGINES: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Engine]] = weakref.WeakKeyDictionary()


def _state(model: nn.Module) -> tuple[Any, ...]:
    """Changes when a weight is replaced, moved or written to."""
    tensors = [*model.parameters(), *model.buffers()]
    return tuple((t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors)


def engine_for(model: nn.Module) -> Engine | No:
    """The engine of `model`, built on first use and again when its weights changed; or why there is none."""
    answer = accepts(model)
    if isinstance(answer, No):
        return answer
    known = _ENGINES.get(model)
    if known is not None and known[0] == _state(model):
        return known[1]
    engine = Engine(model)
    _ENGINES[model] = (_state(model), engine)
    return engine
