"""fewbits.load and from_pretrained: dense, native and compressed-tensors checkpoints, and damaged ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from tiny_runtime_models import (
    block_linears,
    dense_twin,
    quantized_weights,
    saved,
    tiny_llama,
    write_quantized,
)

from fewbits.core.errors import BadInput, Unsupported
from fewbits.formats import parse_format
from fewbits.integrations.on_import import install
from fewbits.metrics.error import sqnr_db
from fewbits.nn import QLinear, qlinears
from fewbits.runtime.load import load, load_all

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS.to(model.device)).logits.float().cpu()


@pytest.fixture
def dense_directory(tmp_path):
    model = tiny_llama()
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, True
    saved(model, tmp_path / "dense")
    return tmp_path / "dense"


def test_a_dense_directory(dense_directory) -> None:
    model, tokenizer = load(dense_directory)
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert not model.training and model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.temperature == 0.3
    assert tokenizer.decode(tokenizer("abc").input_ids) == "abc"
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "name"),
    [("gptq", "int4-g32"), ("gptq_v2", "int4-asym-g32"), ("awq", "int4-asym-g32"), ("bitsandbytes", "nf4-g64-dq")],
)
def test_checkpoints_of_others(tmp_path, kind: str, name: str) -> None:
    format = parse_format(name).with_scale_dtype(torch.float16)
    original = tiny_llama(intermediate_size=192)
    weights = quantized_weights(original, format)
    directory = write_quantized(tmp_path / kind, original, weights, kind=kind)
    loaded = load_all(directory)
    assert len(loaded.quantized) == len(weights) and not loaded.decoded and not loaded.notes
    for path, module in qlinears(loaded.model):
        assert torch.equal(module.dequantize(), weights[path].dequantize())
    # Kernels for 4 bits round x to 8 bits.
    assert sqnr_db(logits(dense_twin(original, weights)), logits(loaded.model)) > 30


def test_act_order_is_a_gather_of_the_input(tmp_path) -> None:
    format = parse_format("int4-g32").with_scale_dtype(torch.float16)
    original = tiny_llama(intermediate_size=192)
    linears, order = block_linears(original), {}
    for name, linear in linears.items():
        # a permutation as files say it: sorted within each group
        shuffled = torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(len(name)))
        order[name] = torch.cat([part.sort().values for part in shuffled.split(32)])
    weights = {name: format.quantize(linear.weight.detach()[:, order[name]]) for name, linear in linears.items()}
    directory = write_quantized(tmp_path / "gptq", original, weights, kind="gptq", order=order)
    model, _ = load(directory)
    assert all(module.input_order is not None for _, module in qlinears(model))
    for name, weight in weights.items():
        linears[name].weight.data[:, order[name]] = weight.dequantize()
    assert sqnr_db(logits(original), logits(model)) > 30
    saved(model, tmp_path / "again")  # native, version 5
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]["version"] == 5
    again, _ = load(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))


def test_dtype(dense_directory) -> None:
    model, _ = load(dense_directory, dtype=torch.bfloat16)
    assert model.dtype == model.config.dtype == torch.bfloat16
    with pytest.raises(BadInput, match="float32, bfloat16 or float16"):
        load(dense_directory, dtype=torch.int8)


@pytest.mark.parametrize("kind", ["native", "compressed-tensors"])
@pytest.mark.parametrize(
    ("name", "activations"),
    [
        ("int4-asym-g32", None),
        ("int4-g64", None),
        ("int3-g32", None),
        ("int8-channel", None),
        ("int8-channel", "int8-token"),
        ("fp8_e4m3-channel", "fp8_e4m3-token"),
        ("nf4-g64", None),
    ],
)
def test_a_quantized_directory(tmp_path, kind: str, name: str, activations: str | None) -> None:
    if kind == "compressed-tensors" and name == "nf4-g64":
        return  # it has no NF4
    format = parse_format(name).with_scale_dtype(torch.bfloat16)
    inputs = None if activations is None else parse_format(activations)
    original = tiny_llama(intermediate_size=192)
    weights = quantized_weights(original, format)
    path = write_quantized(tmp_path / "q", original, weights, kind=kind, activations=inputs)
    found = load_all(path)
    assert set(found.quantized) == set(weights) and not found.decoded
    for module_name, module in qlinears(found.model):
        assert torch.equal(module.dequantize(), weights[module_name].dequantize())
        assert module.kernel not in (None, "reference")
    expected = logits(dense_twin(original, weights))
    assert sqnr_db(expected, logits(found.model)) > (35 if activations is None else 18)


def test_biases_and_an_untied_head(tmp_path) -> None:
    original = tiny_llama(model_type="qwen2", tied=False)
    assert original.model.layers[0].self_attn.q_proj.bias is not None
    weights = quantized_weights(original, parse_format("int8-channel"))
    model, _ = load(write_quantized(tmp_path / "q", original, weights))
    assert sqnr_db(logits(dense_twin(original, weights)), logits(model)) > 35


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_fused_experts_are_decoded(tmp_path, model_type: str) -> None:
    from safetensors.torch import load_file, save_file

    changes = {"num_experts": 4, "moe_intermediate_size": 96, "num_experts_per_tok": 2}
    if model_type == "mixtral":
        changes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    original = tiny_llama(model_type=model_type, **changes)
    saved(original, tmp_path / "q")
    format, tensors, modules = parse_format("int8-channel"), {}, {}
    dense = load_file(tmp_path / "q" / "model.safetensors")
    from fewbits.checkpoints import native

    for name, tensor in dense.items():
        module = name.removesuffix(".weight")
        if re.search(r"\.(w[123]|\w+_proj)\.weight$", name):
            weight = format.quantize(tensor)
            tensors.update({f"{module}.{part}": value for part, value in weight.to_state().items()})
            modules[module] = native.module_entry(format, None, weight.shape)
            dense[name] = weight.dequantize()
        else:
            tensors[name] = tensor
    save_file(dense, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    expected = logits(load(tmp_path / "q")[0])
    save_file(tensors, tmp_path / "q" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"] = native.quantization_config(modules)
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    found = load_all(tmp_path / "q")
    assert len(found.quantized) == 8 and len(found.decoded) == 2 * 4 * 3
    assert all("experts" in name for name in found.decoded)
    assert sqnr_db(expected, logits(found.model)) > 35


@pytest.fixture
def native_directory(tmp_path):
    original = tiny_llama()
    weights = quantized_weights(original, parse_format("nf4-g64").with_scale_dtype(torch.bfloat16))
    return write_quantized(tmp_path / "native", original, weights)


def test_from_pretrained_after_import(native_directory) -> None:
    install()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(native_directory, dtype=torch.float32)
    ours, _ = load(native_directory)
    assert len(list(qlinears(model))) == 14
    assert all(module.kernel == "cpu_fp16" for _, module in qlinears(model))
    assert torch.equal(logits(model), logits(ours))


def test_importing_fewbits_is_all_it_takes(native_directory) -> None:
    program = (
        "import sys, fewbits; assert 'torch' not in sys.modules and 'transformers' not in sys.modules;"
        "from transformers import AutoModelForCausalLM;"
        f"m = AutoModelForCausalLM.from_pretrained({str(native_directory)!r});"
        "assert type(m.model.layers[0].mlp.up_proj).__name__ == 'QLinear'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_saving_a_loaded_model_gives_a_native_checkpoint(native_directory, tmp_path) -> None:
    model, tokenizer = load(native_directory)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = load(tmp_path / "again")
    assert torch.equal(logits(model), logits(again))


def test_generate_of_transformers_runs(native_directory) -> None:
    model, tokenizer = load(native_directory)
    inputs = tokenizer("hello", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert out.shape[1] <= inputs.input_ids.shape[1] + 5


def edit_config(directory, change) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def first_module(config):
    return next(iter(config["quantization_config"]["modules"].values()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["quantization_config"].update(quant_method="aqlm"), "aqlm"),
        (lambda c: c["quantization_config"].update(version=99), "upgrade fewbits"),
        (
            lambda c: c["quantization_config"]["modules"].update({"model.nowhere": first_module(c)}),
            "model.nowhere",
        ),
        (lambda c: first_module(c).update(format="nf5-g64"), "nf5-g64"),
        (lambda c: first_module(c).update(shape=[64, 65]), "proj"),
        (lambda c: c.update(hidden_size=32, head_dim=8), "config.json"),
    ],
)
def test_damaged_configurations(native_directory, change, says: str) -> None:
    edit_config(native_directory, change)
    with pytest.raises(BadInput, match=says):
        load(native_directory)


def test_transformers_is_told_what_it_cannot_replace(native_directory) -> None:
    install()
    from transformers import AutoModelForCausalLM

    edit_config(
        native_directory,
        lambda c: c["quantization_config"]["modules"].update({"model.nowhere": first_module(c)}),
    )
    with pytest.raises(Unsupported, match=r"use fewbits\.load"):
        AutoModelForCausalLM.from_pretrained(native_directory)


def test_not_a_model_and_no_such_device(tmp_path, native_directory) -> None:
    with pytest.raises(BadInput):
        load(tmp_path)
    with pytest.raises(BadInput, match="nonsense"):
        load(native_directory, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="use cpu"):
            load(native_directory, device="cuda")


def test_the_linears_of_a_tiny_model_are_counted_right() -> None:
    assert len(block_linears(tiny_llama())) == 14
    assert isinstance(QLinear(64, 16, parse_format("int8-channel")), torch.nn.Module)


def test_mlx_quantizes_embeddings_too(tmp_path) -> None:
    format = parse_format("int4-min-g32").with_scale_dtype(torch.float16)
    original = tiny_llama(intermediate_size=192)
    weights = quantized_weights(original, format)
    weights["model.embed_tokens"] = format.quantize(original.model.embed_tokens.weight.detach())
    loaded = load_all(write_quantized(tmp_path / "mlx", original, weights, kind="mlx"), dtype=torch.float32)
    assert loaded.decoded == ("model.embed_tokens",) and len(loaded.quantized) == len(weights) - 1
    assert torch.equal(loaded.model.model.embed_tokens.weight, weights["model.embed_tokens"].dequantize())
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_fused_experts_in_mxfp4(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_llama(
        model_type="gpt_oss",
        num_local_experts=4,
        num_experts_per_tok=2,
        tied=False,
        hidden_size=64,
        intermediate_size=64,
    )
    saved(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    experts = [name for name in tensors if name.endswith("_proj") and tensors[name].dim() == 3]
    for name in experts:
        count, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (count, rows, columns // 32, 16), generator=draw).to(
            torch.uint8
        )
        tensors[f"{name}_scales"] = torch.full((count, rows, columns // 32), 123, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit_config(tmp_path, lambda c: c.update(quantization_config={"quant_method": "mxfp4"}))
    loaded = load_all(tmp_path)
    linears = {f"model.layers.{n}.mlp.experts.{e}.{part}_proj" for n in range(2) for e in range(4)
               for part in ("gate", "up", "down")}  # fmt: skip
    assert len(experts) == 4 and loaded.decoded == tuple(sorted(linears)) and not loaded.notes
    block = loaded.model.model.layers[0].mlp.experts
    low = tensors["model.layers.0.mlp.experts.down_proj_blocks"][1, 5, 0, 0].item() % 16
    levels = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    expected = (-1 if low >= 8 else 1) * levels[low % 8] * 2.0**-4
    assert block.down_proj[1, 0, 5] == expected
    assert torch.isfinite(logits(loaded.model)).all()
