"""Files that fewbits writes, run by llama.cpp: perplexity, tokens and text of the embedded model, beside ours.

    python benchmarks/interop/check_gguf.py --llama PATH/TO/ENV/bin/python [--types q4_k q8_0 ...] [--windows 8] [-o
    FILE]

The environment holds llama.cpp's prebuilt library (`pip install xllamacpp`). For each type the embedded model is
rounded to it, written, read back and computed here in float32, and computed there (llama_cpp.py); both see the same
token ids. llama.cpp rounds the inputs of products with quantized weights to 8 bits and keeps keys and values in 16,
so the figures differ a little. To tell that from a difference in the weights, the same weights are also written
decoded, in float32, where inputs are not rounded: `llama_cpp_decoded` is to be equal within the bound.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from fewbits.calibration.data import pack, read_texts
from fewbits.checkpoints.gguf_export import write_gguf
from fewbits.checkpoints.source import open_source
from fewbits.core.record import environment, write_json
from fewbits.models.skeleton import load_model

BOUND = 0.005
TEXTS = [
    "The capital of France is",
    "def add(a, b):\n    return",
    "1234 naïve cafés → 猫\n\n  end",
    "<|im_start|>user\nHi",
]
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def ask(python: str, question: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).with_name("llama_cpp.py")
    done = subprocess.run([python, str(script)], input=json.dumps(question), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp failed on {question['path']}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def perplexity(model: torch.nn.Module, ids: torch.Tensor) -> float:
    losses = []
    with torch.inference_mode():
        for window in ids:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none"))
    return float(torch.cat(losses).double().mean().exp())


def compare(kind: str, args: argparse.Namespace, ids: torch.Tensor, folder: Path) -> dict[str, Any]:
    source = open_source("demo")
    path = folder / f"{kind}.gguf"
    dense = kind.upper() if kind in ("f16", "bf16", "f32") else "F16"
    write_gguf(source, path, weights=None if kind == dense.lower() else kind, dense=dense)
    again = open_source(path)
    ours = perplexity(load_model(again, dtype=torch.float32), ids)
    found = ask(
        args.llama,
        {"path": str(path), "ids": ids.tolist(), "perplexity": True, "texts": [PROMPT, *TEXTS], "generate": 24},
    )
    dense_path = folder / f"{kind}-decoded.gguf"
    write_gguf(again, dense_path, dense="F32")
    plain = float(ask(args.llama, {"path": str(dense_path), "ids": ids.tolist(), "perplexity": True})["perplexity"])
    tokenizer = again.load_tokenizer()
    tokens = [tokenizer(text).input_ids for text in [PROMPT, *TEXTS]]
    theirs = float(found["perplexity"])
    return {
        "type": kind,
        "bytes": path.stat().st_size,
        "perplexity": ours,
        "llama_cpp": theirs,
        "difference": theirs / ours - 1,
        "llama_cpp_decoded": plain,
        "difference_decoded": plain / ours - 1,
        "same_tokens": found["tokens"] == tokens,
        "same_template": found["chat_template"] == tokenizer.chat_template,
        "generated": found["generated"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", required=True, help="python of an environment with xllamacpp")
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q4_k", "q4_0", "iq4_nl", "mxfp4"])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    texts, described = read_texts(None, split="evaluation")
    tokenizer = open_source("demo").load_tokenizer()
    ids = pack(texts, tokenizer, sequence_length=256, samples=None, at_most=args.windows, description=described).ids
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.types:
            rows.append(compare(kind, args, ids, Path(folder)))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    record = {"environment": environment(), "windows": list(ids.shape), "bound": BOUND, "rows": rows}
    if args.out:
        write_json(args.out, record)
    bad = [row["type"] for row in rows if abs(row["difference_decoded"]) > BOUND or not row["same_tokens"]]
    if bad:
        raise SystemExit(f"not equal within {BOUND:.1%}: {', '.join(bad)}")


if __name__ == "__main__":
    main()
