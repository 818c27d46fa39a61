"""llm-compressor: GPTQModifier, or AWQModifier before round-to-nearest, with the library's defaults.

Quantized in float32; the scales are then stored in bfloat16, as in a model that is saved in half precision, and the
weights decoded with them by compressed-tensors. AWQ also moves scales between layers: what it changed besides the
linears (norms) is part of the result.
"""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
from contract import finish, group_parts, job, linears, load
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier


def recipe(method: str, scheme: QuantizationScheme) -> list:
    groups = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**groups)]
    return [AWQModifier(), QuantizationModifier(**groups)]


def main() -> None:
    with job() as work:
        model = load(work, device=work.accelerator())
        before = {name: tensor.detach().cpu().clone() for name, tensor in model.named_parameters()}
        names, method = list(linears(model)), str(work.options["method"])
        symmetric = bool(work.options.get("sym", True))
        arguments = QuantizationArgs(
            num_bits=work.bits, type="int", symmetric=symmetric, strategy="group", group_size=work.group_size
        )
        rows = work.ids.tolist()
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe(method, QuantizationScheme(targets=["Linear"], weights=arguments)),
            num_calibration_samples=len(rows),
            max_seq_length=work.ids.shape[1],
            shuffle_calibration_samples=False,
        )
        decoded = {}
        for name in names:
            module = model.get_submodule(name)
            scale = module.weight_scale.data.bfloat16().float()
            zero, args = module.weight_zero_point.data, module.quantization_scheme.weights
            with torch.no_grad():
                decoded[f"{name}.weight"] = fake_quantize(module.weight.data, scale, zero, args)
    linear = {f"{name}.weight" for name in names}
    shapes = [tuple(decoded[name].shape) for name in linear]
    for name, tensor in model.named_parameters():
        if name in before and name not in linear and not torch.equal(tensor.detach().cpu(), before[name]):
            decoded[name] = tensor
    extra = len(decoded) - len(linear)
    if extra:
        work.notes.append(f"{extra} tensors besides the linears were rescaled")
    parts = group_parts(shapes, work.bits, work.group_size, 16, 0 if symmetric else work.bits)
    weights = sum(rows * columns for rows, columns in shapes)
    kind = "symmetric" if symmetric else "asymmetric"
    settings = f"{method.upper()} W{work.bits} g{work.group_size} {kind}, library defaults, bfloat16 scales"
    finish(work, decoded, parts, ["llmcompressor", "compressed-tensors", "transformers"], settings, weights)


if __name__ == "__main__":
    main()
