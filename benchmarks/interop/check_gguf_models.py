"""Small random models of every family that goes to GGUF, computed by llama.cpp and by transformers.

    python benchmarks/interop/check_gguf_models.py --llama PATH/TO/ENV/bin/python [--families granite olmo2 ...]

The models are those of tests/unit/test_gguf_export.py, with 40 tokens of text, in float32. llama.cpp keeps keys and
values in float16 and computes attention so, which random models of two blocks show as 0.2 to 1 % of the largest logit.
A wrong rotation, norm, order of rows or factor shows as tens of percent. The record is "gguf_models".
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from check_gguf import ask
from recorded import ROOT, save

from fewbits.checkpoints.gguf_export import write_gguf
from fewbits.core.record import environment

BOUND = 0.02


def tests() -> Any:
    """The module that has the families' configurations."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "unit")]
    return importlib.import_module("test_gguf_export")


def compare(family: str, python: str, folder: Path) -> dict[str, Any]:
    model, source = tests().saved(folder / "m", **tests().FAMILIES[family])
    write_gguf(source, folder / "m.gguf", dense="F32")
    ids = [(37 * index + 11) % 250 for index in range(40)]
    answer = ask(python, {"path": str(folder / "m.gguf"), "ids": [ids], "logits": True})
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0].double().numpy()
    theirs = np.array(answer["logits"][0])
    return {"family": family, "difference": float(np.abs(theirs - ours).max() / np.abs(ours).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--llama", required=True, help="python of an environment with xllamacpp and numpy")
    parser.add_argument("--families", nargs="+", help="default: all")
    parser.add_argument("--dry", action="store_true", help="print only, keep no record")
    args = parser.parse_args()
    rows = []
    for family in args.families or tests().FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(family, args.llama, Path(folder)))
            print(rows[-1], flush=True)
    if not args.dry:
        print(save("gguf_models", {"environment": environment(), "bound": BOUND, "rows": rows}))
    bad = [row["family"] for row in rows if row["difference"] > BOUND]
    if bad:
        raise SystemExit(f"further from transformers than {BOUND:.0%} of the largest logit: {', '.join(bad)}")


if __name__ == "__main__":
    main()
