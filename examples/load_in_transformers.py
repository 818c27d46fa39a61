"""A checkpoint fewbits wrote, through plain transformers.

    python examples/load_in_transformers.py OUT "The capital of France is"

A compressed-tensors checkpoint needs the package compressed-tensors and not fewbits; for a native one,
`import fewbits` is what teaches transformers the format.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def main(directory: str, prompt: str = "The capital of France is") -> None:
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    if config["quantization_config"]["quant_method"] == "fewbits":
        import fewbits  # noqa: F401
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
