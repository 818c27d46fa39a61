"""Checkpoints written here, loaded by transformers, GPTQModel, bitsandbytes and mlx-lm: do they compute the same?

    python benchmarks/interop/check_checkpoints.py --python gptq=ENV/bin/python --python bitsandbytes=ENV/bin/python ...

A small random Llama is quantized to nearest and written in each format. Each is loaded in an environment that has its
library (this one where none is given) on a CPU, in float32 where the library takes it, and its logits on a fixed text
are compared with those of the weights as fewbits decodes them. Prints one line a format: the signal-to-noise ratio of
the logits. What an activation format adds (FP8) is in it; two equal models in bfloat16 stand at about 40 dB.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# checkpoint format -> format of the weights
FORMATS = {
    "gptq": "int4-g64",
    "gptq_v2": "int4-asym-g64",
    "awq": "int4-asym-g64",
    "bitsandbytes": "nf4-g64-dq",
    "compressed-tensors": "int4-g64",
    "fp8": "fp8_block",
    "mlx": "int4-min-g64",
}
IDS = [[(7 * index + 3) % 250 for index in range(48)]]


def make(folder: Path) -> None:
    """One directory a format, and the logits it should have."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from fewbits.checkpoints.codecs import CODECS, Stored
    from fewbits.formats import parse_format

    config = AutoConfig.for_model(
        "llama", vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    for kind, name in FORMATS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        codec, layers, tensors = CODECS.get(kind), {}, {}
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                format = parse_format(name).with_scale_dtype(torch.float16)
                weight = format.quantize(torch.randn(module.weight.shape) * 0.08)
                stored = Stored(format=weight.format, shape=weight.shape, state=weight.to_state())
                assert codec.refuses(stored) is None
                module.weight.data = weight.dequantize()
                layers[path] = stored.layer
                tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in codec.encode(stored).items()}
        out = folder / kind
        out.mkdir()
        for key, value in model.state_dict().items():
            if key.removesuffix(".weight") not in layers:
                value.data = value.half().float()
                tensors[key] = value.half()
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, out / "model.safetensors", {"format": "pt"}
        )
        said = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float16"}
        (out / "config.json").write_text(json.dumps(said | codec.quantization(layers, ["lm_head"])))
        tokenizer().save_pretrained(out)  # GPTQModel loads none without
        with torch.no_grad():
            save_file({"logits": model(torch.tensor(IDS)).logits}, folder / f"{kind}.expected")


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(250)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1", pad_token="w0"
    )


def load(path: Path, kind: str) -> Any:
    """The logits [1, T, V] that the library of `kind` computes."""
    import numpy

    if kind == "mlx":
        import mlx.core as mx
        from mlx_lm.utils import load_model

        model, _ = load_model(path)
        return numpy.array(model(mx.array(IDS)).astype(mx.float32))
    import torch
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.float32, "device_map": "cpu"}
    if kind in ("gptq", "gptq_v2"):
        from gptqmodel import GPTQModel

        model = GPTQModel.load(str(path), device="cpu", dtype=torch.bfloat16).model
    elif kind == "fp8":
        from transformers import FineGrainedFP8Config

        quantization = FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128))
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, **options).float()
    else:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def check(folder: Path, kind: str) -> None:
    from safetensors.numpy import load_file

    expected, found = load_file(folder / f"{kind}.expected")["logits"], load(folder / kind, kind)
    error = float(((found - expected) ** 2).sum() / (expected**2).sum())
    print(f"RESULT {kind}: {-10 * math.log10(error) if error else math.inf:.1f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", action="append", default=[], metavar="FORMAT=PATH")
    parser.add_argument("--only", nargs="*", choices=list(FORMATS))
    parser.add_argument("--check", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.check:
        check(Path(given.check[0]), given.check[1])
        return
    pythons = dict(choice.split("=", 1) for choice in given.python)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for kind in given.only or FORMATS:
            command = [pythons.get(kind, sys.executable), __file__, "--check", folder, kind]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(lines[0].removeprefix("RESULT ") if lines else f"{kind}: failed: {why}", flush=True)


if __name__ == "__main__":
    main()
