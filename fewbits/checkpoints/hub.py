"""Models by hub id, where there is a network: downloaded into huggingface_hub's cache, read as a directory.

Only what a model directory needs is fetched: safetensors, JSON, tokenizer files. Pickles and code stay
where they are.
"""

from __future__ import annotations

import re
from pathlib import Path

from fewbits.core.errors import BadInput

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
]
_UNWANTED = ["*/*", "*.bin", "*.py"]


def is_hub_id(path: str) -> bool:
    """Whether `path` has the form of a hub id: ``owner/name``."""
    return bool(_ID.fullmatch(path)) and ".." not in path


def download(hub_id: str, revision: str | None = None) -> Path:
    """The local snapshot of a model; BadInput when the hub cannot be reached or has no such model."""
    from huggingface_hub import snapshot_download  # comes with transformers
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            hub_id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED, etag_timeout=10
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(
            f"{hub_id!r} is neither a directory nor a file nor a hub id within reach from here ({reason})"
        ) from error
    return Path(folder)
