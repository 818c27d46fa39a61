"""Files that fewbits writes, run by llama.cpp: perplexity, tokens and text of the embedded model, beside ours.

    PYTHONPATH=benchmarks python benchmarks/interop/check_gguf.py --llama ENV/bin/python [--types q4_k …] [--windows 8]

A type is rounded to nearest; `q4_k:awq` is quantized by that method. Rows of --since count as measured.

The environment holds llama.cpp's prebuilt library (`pip install xllamacpp numpy`). For each type the embedded model is
rounded to it, written, read back and computed here in float32, and computed there (by_llama_cpp.py); both see the same
token ids. The record is "gguf"; `make docs` makes the table in docs/gguf.md from it.

llama.cpp rounds the inputs of a product to what its kernels multiply with, mostly 8 bits (llama_inputs.py), and we do
not. To tell what that costs from a difference in the weights, there are two controls:

- `decoded`: the same weights written in float32, where llama.cpp rounds no inputs, against ours; on the first windows,
  since there the two agree to a few thousandths of a percent in each;
- `rounded`: llama.cpp as it is, against ours with inputs rounded by its rule. `inputs` is what the rule costs here:
  ours with inputs rounded against ours.

Rounding makes small differences larger: sums in another order move a few inputs over the edge between two codes, the
next layer's inputs differ by more, and after some layers two computations by one rule differ like two draws of its
error. So `rounded` is near zero on average only, and takes many windows; all of the built-in text is the default.

A type that more than doubles the perplexity has ruined the model, and compares nothing: no bound is asked of it.

A difference is that of the mean negative log-likelihood, as a ratio of perplexities; its standard error is by windows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from llama_inputs import round_inputs
from recorded import save
from torch import Tensor, nn

from fewbits.calibration.data import pack, read_texts
from fewbits.checkpoints.gguf_export import write_gguf
from fewbits.checkpoints.source import open_source
from fewbits.core.record import environment
from fewbits.evaluation.verification import by_llama_cpp
from fewbits.models.skeleton import load_model
from fewbits.pipeline.quantize import quantize

BOUND = 0.005
DECODED = 8  # windows of the control in float32
RUINED = 2.0  # times the perplexity of the weights as they were
ALL = "f16 bf16 q8_0 q6_k q5_k q4_k q4_k:awq q4_0 iq4_nl mxfp4 q3_k q2_k tq2_0 tq1_0"
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


def written(kind: str, folder: Path) -> Path:
    """The embedded model as a file of a type, or of TYPE:METHOD."""
    weights, _, method = kind.partition(":")
    if method:
        chosen = {"method": method, "checkpoint_format": "gguf", "eval_samples": 0}
        return quantize("demo", weights, out=folder / kind.replace(":", "-"), **chosen) / "model.gguf"
    path = folder / f"{kind}.gguf"
    dense = kind.upper() if kind in ("f16", "bf16", "f32") else "F16"
    write_gguf(open_source("demo"), path, weights=None if kind == dense.lower() else kind, dense=dense)
    return path


def compare(kind: str, args: argparse.Namespace, ids: Tensor, folder: Path) -> dict[str, Any]:
    path = written(kind, folder)
    again = open_source(path)
    question = {"ids": ids.tolist(), "nats": True, "threads": args.threads}
    whole = {**question, "path": str(path), "texts": [PROMPT, *TEXTS], "generate": 24}
    with ThreadPoolExecutor(1) as beside:
        asked = beside.submit(ask, args.llama, whole)
        model = load_model(again, dtype=torch.float32)
        ours = nats(model, ids)
        inputs = round_inputs(model, again)
        rounded = nats(model, ids)
        found = asked.result()
    del model
    plain = folder / "decoded.gguf"
    write_gguf(again, plain, dense="F32")
    decoded = ask(args.llama, {**question, "ids": question["ids"][:DECODED], "path": str(plain)})["nats"]
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
        "meet": inputs,
        "bytes": path.stat().st_size,
        "perplexity": math.exp(statistics.fmean(ours)),
        "llama_cpp": math.exp(statistics.fmean(found["nats"])),
        "difference": difference(found["nats"], ours),
        "decoded": difference(decoded, ours[:DECODED]),
        "rounded": difference(found["nats"], rounded),
        "inputs": difference(rounded, ours),
        "same_tokens": found["tokens"] == [tokenizer(text).input_ids for text in [PROMPT, *TEXTS]],
        "same_template": found["chat_template"] == tokenizer.chat_template,
        "generated": found["generated"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama", required=True, help="python of an environment with xllamacpp and numpy")
    parser.add_argument("--types", nargs="+", default=ALL.split())
    parser.add_argument("--windows", type=int, help="of 256 tokens; default: all there are")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp")
    parser.add_argument("--since", type=Path, help="a record whose rows of other types stand beside those asked for")
    parser.add_argument("--dry", action="store_true", help="print only, keep no record")
    args = parser.parse_args()
    texts, described = read_texts(None, split="evaluation")
    tokenizer = open_source("demo").load_tokenizer()
    ids = pack(texts, tokenizer, sequence_length=256, samples=None, at_most=args.windows, description=described).ids
    whole = math.exp(statistics.fmean(nats(load_model(open_source("demo"), dtype=torch.float32), ids)))
    rows: list[dict[str, Any]] = []
    if args.since:
        before = json.loads(args.since.read_text(encoding="utf-8"))["gguf"]
        if before["windows"] != list(ids.shape):
            raise SystemExit(f"{args.since.name} has other windows: {before['windows']}, not {list(ids.shape)}")
        rows = [row for row in before["rows"] if row["type"] not in args.types]
    for kind in args.types:
        with tempfile.TemporaryDirectory() as folder:
            row = compare(kind, args, ids, Path(folder))
        rows.append({**row, "ruined": row["perplexity"] > RUINED * whole})
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    asked = [args.llama, "-c", "from importlib.metadata import version; print(version('xllamacpp'))"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    record = {
        "environment": environment(), "xllamacpp": version, "windows": list(ids.shape), "decoded_windows": DECODED,
        "perplexity": whole, "bound": BOUND, "rows": rows,
    }  # fmt: skip
    if not args.dry:
        print(save("gguf", record))
    bad = [row["type"] for row in rows if not row["same_tokens"] or (not row["ruined"] and beyond(row))]
    if bad:
        raise SystemExit(f"not equal within {BOUND:.1%}: {', '.join(bad)}")


def beyond(row: dict[str, Any]) -> bool:
    """Whether a control fails: the weights decoded, or the same rule for inputs on both sides."""
    return any(abs(row[control]["mean"]) > BOUND for control in ("decoded", "rounded"))


if __name__ == "__main__":
    main()
