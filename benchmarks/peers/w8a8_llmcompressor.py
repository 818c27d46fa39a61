"""llm-compressor: SmoothQuantModifier, then GPTQModifier or plain rounding, scheme W8A8, as its examples have it.

The scheme: one scale a row of the weights, one a token of the inputs, found as the model runs, symmetric both. What
oneshot leaves in memory runs through compressed-tensors, which rounds weights and inputs and multiplies in float32.
"""

from __future__ import annotations

from contract import job, linears, load
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from running import finish_running, row_parts


def main() -> None:
    with job() as work:
        model = load(work)
        modules = linears(model)
        parts, rounding = row_parts(list(modules.values())), str(work.options["rounding"])
        modifier = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[rounding]
        recipe = [modifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
        strength = work.options.get("strength")
        if strength is not None:
            recipe.insert(0, SmoothQuantModifier(smoothing_strength=float(strength)))
        rows = work.ids.tolist()
        oneshot(
            model=model,
            dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
            recipe=recipe,
            num_calibration_samples=len(rows),
            max_seq_length=work.ids.shape[1],
            shuffle_calibration_samples=False,
        )
    smoothed = "" if strength is None else f"SmoothQuantModifier(smoothing_strength={strength}), "
    settings = f'{smoothed}{modifier.__name__}(scheme="W8A8"), library defaults otherwise'
    finish_running(work, model, parts, ["llmcompressor", "compressed-tensors", "transformers"], settings)


if __name__ == "__main__":
    main()
