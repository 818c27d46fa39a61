"""bitsandbytes LLM.int8(): what a model loaded with `load_in_8bit` does, on its CPU backend, in eval mode.

Inputs are rounded with one scale a token, but for the channels that reach the threshold in a product; weights are
rounded once with one scale a row, and outlier channels meet what their codes say. In training mode its CPU backend
multiplies the inputs as they are.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear8bitLt
from contract import job, linears
from running import LINEAR, finish_running, nonlinearity, row_parts
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    with job() as work:
        threshold = float(work.options["threshold"])
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=["lm_head"])
        model = AutoModelForCausalLM.from_pretrained(
            work.model, dtype=torch.float32, quantization_config=config, device_map="cpu"
        ).eval()
    modules = linears(model)
    left = [name for name, module in modules.items() if not isinstance(module, Linear8bitLt)]
    assert not left, f"left as they were: {left[:3]}"
    first = next(iter(modules.values()))
    trained = nonlinearity(first.train(), first.in_features)
    first.eval()
    work.notes.append(f"in training mode inputs are {'rounded too' if trained > LINEAR else 'not rounded on a CPU'}")
    settings = f"load_in_8bit, threshold {threshold:g}, everything else in float32"
    finish_running(work, model, row_parts(list(modules.values())), ["bitsandbytes", "transformers"], settings)


if __name__ == "__main__":
    main()
