"""What mlx-lm computes on a checkpoint: logits. JSON in, JSON out.

A program of its own: it may crash without taking `verify` along, and runs in any environment with mlx-lm (`pip install
mlx-lm`, on Linux with mlx[cpu]; no fewbits is needed). It computes in float32, so that a difference is one of weights.

    echo '{"path": "directory", "ids": [[1, 2]]}' | python by_mlx.py
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path


def main() -> None:
    asked = json.load(sys.stdin)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with contextlib.redirect_stdout(sys.stderr):
        import mlx.core as mx
        from mlx_lm.utils import load_model

        model, _ = load_model(Path(asked["path"]))
        model.set_dtype(mx.float32)
        logits = [model(mx.array([ids]))[0].tolist() for ids in asked["ids"]]
    json.dump({"logits": logits}, sys.stdout)


if __name__ == "__main__":
    main()
