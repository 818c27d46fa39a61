"""Small random models with a byte tokenizer, dense and quantized in memory or on disk, for tests of running
them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from fewbits.checkpoints.codecs import CODECS, Stored
from fewbits.formats import Format, Quantized, parse_format
from fewbits.nn.qlinear import QLinear


def byte_tokenizer():
    """Every byte is a token; ids 256 and 257 are <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: ",
    )


def saved(model: nn.Module, directory: Path) -> Path:
    """`directory`, with `model` and the byte tokenizer written into it."""
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def tiny_llama(*, seed: int = 0, layers: int = 2, tied: bool = True, **changes):
    """A random Llama of 64 hidden units, 4 heads of 16 over 2 key-value heads, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = changes.pop("model_type", "llama")
    fields = {
        "vocab_size": 264,  # a few rows more than the tokenizer has, as real models do
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    config = AutoConfig.for_model(model_type, **{**fields, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.1)
    return model


OUTLIER_GAIN = 60.0


def llama_with_outliers(dimensions: tuple[int, ...], **changes):
    """A tiny Llama that computes what it did, with large values at `dimensions` of every norm's output."""
    model = tiny_llama(layers=4, **changes)
    with torch.no_grad():
        for block in model.model.layers:
            read = {
                block.input_layernorm: [getattr(block.self_attn, f"{part}_proj") for part in "qkv"],
                block.post_attention_layernorm: [block.mlp.gate_proj, block.mlp.up_proj],
            }
            for norm, linears in read.items():
                for dimension in dimensions:
                    norm.weight[dimension] *= OUTLIER_GAIN
                    for linear in linears:
                        linear.weight[:, dimension] /= OUTLIER_GAIN
    return model


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }


def quantized_weights(model: nn.Module, format: Format) -> dict[str, Quantized]:
    return {name: format.quantize(module.weight.detach(), name) for name, module in block_linears(model).items()}


def quantize_in_place(model: nn.Module, name: str, activations: str | None = None) -> nn.Module:
    """Every linear of the blocks as a prepacked QLinear, rounded to nearest."""
    format = parse_format(name).with_scale_dtype(torch.bfloat16)
    inputs = None if activations is None else parse_format(activations)
    for path, weight in quantized_weights(model, format).items():
        bias = model.get_submodule(path).bias
        model.set_submodule(path, QLinear.from_quantized(weight, bias, inputs).prepack())
    return model


def dense_twin(model: nn.Module, weights: dict[str, Quantized]) -> nn.Module:
    """`model` with each quantized weight written back dense: what a quantized checkpoint has to compute."""
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight.dequantize())
    return model


def write_quantized(
    directory: Path,
    model: nn.Module,
    weights: dict[str, Quantized],
    *,
    kind: str = "native",
    activations: Format | None = None,
    order: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A checkpoint of `model` whose linears are `weights`, in the checkpoint format called `kind`."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors, stored = {}, {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if not tied and not (module in weights and leaf == "weight"):
            tensors[name] = tensor.contiguous()
    for name, weight in weights.items():
        held = Stored(format=weight.format, shape=weight.shape, state=weight.to_state(), activations=activations)
        stored[name] = held if order is None else dataclasses.replace(held, order=order[name])
        parts = CODECS.get(kind).encode(stored[name])
        tensors.update({f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()})
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = model.config.to_dict()
    layers = {name: weight.layer for name, weight in stored.items()}
    config |= CODECS.get(kind).quantization(layers, ["lm_head"])
    (directory / "config.json").write_text(json.dumps(config, default=str))
    model.generation_config.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory
