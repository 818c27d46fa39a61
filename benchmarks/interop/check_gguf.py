"""Files that fewbits writes, run by llama.cpp: perplexity, tokens and text of the embedded model, beside ours.

    python benchmarks/interop/check_gguf.py --llama PATH/TO/ENV/bin/python [--types q4_k q8_0 ...] [--windows 12]

The environment holds llama.cpp's prebuilt library (`pip install xllamacpp numpy`). For each type the embedded model is
rounded to it, written, read back and computed here in float32, and computed there (by_llama_cpp.py); both see the same
token ids. The record is "gguf"; `make docs` makes the table in docs/gguf.md from it.

llama.cpp rounds the inputs of a product to what its kernels multiply with: 8 bits beside quantized weights, one scale
a block of 32 (legacy types, IQ4_NL, MXFP4) or of 256 (K-quants, ternary ones), 16 bits beside 16-bit weights. To tell
what that costs from a difference in the weights, there are two controls:

- `decoded`: the same weights written in float32, where llama.cpp rounds no inputs, against ours;
- `rounded`: llama.cpp as it is, against ours with inputs rounded by the same rule.

A difference is that of the mean negative log-likelihood, as a ratio of perplexities; its standard error is by windows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recorded import save
from torch import Tensor, nn

from fewbits.calibration.data import pack, read_texts
from fewbits.checkpoints.gguf_export import write_gguf
from fewbits.checkpoints.source import open_source
from fewbits.core.record import environment
from fewbits.evaluation.verification import by_llama_cpp
from fewbits.models.skeleton import load_model

BOUND = 0.005
ALL = "f16 bf16 q8_0 q6_k q5_k q4_k q4_0 iq4_nl mxfp4 q3_k q2_k tq2_0 tq1_0"
TEXTS = [
    "The capital of France is",
    "def add(a, b):\n    return",
    "1234 naïve cafés → 猫\n\n  end",
    "<|im_start|>user\nHi",
]
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def ask(python: str, question: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [python, "-P", by_llama_cpp.__file__], input=json.dumps(question), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"llama.cpp failed on {question['path']}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def eight_bits(block: int, value: Tensor) -> Tensor:
    """`value` as llama.cpp's Q8_0 (32) and Q8_K (256) hold it: scales in float16 and in float32."""
    blocks = value.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0.0).round()
    return (codes * (scale.half().float() if block == 32 else scale)).flatten(-2)


def rounding(stored: str) -> Callable[[Tensor], Tensor] | None:
    """What llama.cpp does to the input of a product with weights of a type."""
    if stored in ("F16", "BF16"):
        dtype = torch.float16 if stored == "F16" else torch.bfloat16
        return lambda value: value.to(dtype).float()
    if stored == "F32":
        return None
    return partial(eight_bits, 256 if stored.endswith("_K") or stored.startswith("TQ") else 32)


def round_inputs(model: nn.Module, source: Any) -> list[Any]:
    """Hooks that round every linear's input as llama.cpp will; a tied head is stored as the embeddings."""
    tied, hooks = source.tied(), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            stored = tied.get(f"{name}.weight", f"{name}.weight")
            rule = rounding(source.info(stored).stored)
            if rule is not None:
                hooks.append(module.register_forward_pre_hook(lambda _, inputs, rule=rule: (rule(inputs[0]),)))
    return hooks


def nats(model: nn.Module, ids: Tensor) -> list[float]:
    """Mean negative log-likelihood of each window's tokens but the first."""
    found = []
    with torch.inference_mode():
        for window in ids:
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            found.append(float(nn.functional.cross_entropy(logits, window[1:], reduction="none").double().mean()))
    return found


def difference(theirs: list[float], ours: list[float]) -> dict[str, float]:
    """Perplexity there over perplexity here, minus 1, with its standard error by windows."""
    apart = [a - b for a, b in zip(theirs, ours, strict=True)]
    mean = statistics.fmean(apart)
    return {
        "mean": math.expm1(mean),
        "stderr": math.exp(mean) * statistics.stdev(apart) / math.sqrt(len(apart)),
        "largest_window": max(map(abs, map(math.expm1, apart))),
    }


def compare(kind: str, args: argparse.Namespace, ids: Tensor, folder: Path) -> dict[str, Any]:
    source = open_source("demo")
    path = folder / f"{kind}.gguf"
    dense = kind.upper() if kind in ("f16", "bf16", "f32") else "F16"
    write_gguf(source, path, weights=None if kind == dense.lower() else kind, dense=dense)
    again = open_source(path)
    model = load_model(again, dtype=torch.float32)
    ours = nats(model, ids)
    hooks = round_inputs(model, again)
    rounded = nats(model, ids) if hooks else ours
    del model
    question = {"ids": ids.tolist(), "nats": True, "threads": args.threads}
    found = ask(args.llama, {**question, "path": str(path), "texts": [PROMPT, *TEXTS], "generate": 24})
    decoded = found["nats"]
    if hooks:
        plain = folder / f"{kind}-decoded.gguf"
        write_gguf(again, plain, dense="F32")
        decoded = ask(args.llama, {**question, "path": str(plain)})["nats"]
        plain.unlink()
    tokenizer = again.load_tokenizer()
    stored: dict[str, int] = {}
    for name in again.names():
        info = again.info(name)
        if len(info.shape) == 2:
            stored[info.stored] = stored.get(info.stored, 0) + math.prod(info.shape)
    return {
        "type": kind,
        "weights": stored,
        "bytes": path.stat().st_size,
        "perplexity": math.exp(statistics.fmean(ours)),
        "llama_cpp": math.exp(statistics.fmean(found["nats"])),
        "difference": difference(found["nats"], ours),
        "decoded": difference(decoded, ours),
        "rounded": difference(found["nats"], rounded),
        "same_tokens": found["tokens"] == [tokenizer(text).input_ids for text in [PROMPT, *TEXTS]],
        "same_template": found["chat_template"] == tokenizer.chat_template,
        "generated": found["generated"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama", required=True, help="python of an environment with xllamacpp and numpy")
    parser.add_argument("--types", nargs="+", default=ALL.split())
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp")
    parser.add_argument("--dry", action="store_true", help="print only, keep no record")
    args = parser.parse_args()
    texts, described = read_texts(None, split="evaluation")
    tokenizer = open_source("demo").load_tokenizer()
    ids = pack(texts, tokenizer, sequence_length=256, samples=None, at_most=args.windows, description=described).ids
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.types:
            rows.append(compare(kind, args, ids, Path(folder)))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
            (Path(folder) / f"{kind}.gguf").unlink()
    asked = [args.llama, "-c", "from importlib.metadata import version; print(version('xllamacpp'))"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    record = {
        "environment": environment(), "xllamacpp": version, "windows": list(ids.shape), "bound": BOUND, "rows": rows,
    }  # fmt: skip
    if not args.dry:
        print(save("gguf", record))
    bad = [row["type"] for row in rows if abs(row["decoded"]["mean"]) > BOUND or not row["same_tokens"]]
    if bad:
        raise SystemExit(f"not equal within {BOUND:.1%}: {', '.join(bad)}")


if __name__ == "__main__":
    main()
