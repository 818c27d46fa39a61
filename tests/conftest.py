"""Shared by every test: no network, markers by directory, no CUDA test lost silently."""

from __future__ import annotations

import os
from pathlib import Path

# Set before anything imports transformers: a test that needs the network is a mistake, and fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/slow is slow, tests/gpu needs a GPU: by where they lie, so that no file can forget it."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    for item in items:
        room = item.path.relative_to(HERE).parts[0]
        if room == "slow":
            item.add_marker(pytest.mark.slow)
        if room == "gpu":
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
