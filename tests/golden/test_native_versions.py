"""Files of every version of the native format (make_native_versions.py) decode to what they stood for, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.checkpoints.codecs import quantized_modules
from fewbits.checkpoints.native import VERSION, read_modules
from fewbits.checkpoints.safetensors_file import SafetensorsFile
from fewbits.core.errors import Unsupported

FOLDER = Path(__file__).parent / "native"
FILES = sorted(FOLDER.glob("v*.safetensors"))


class Kept:
    """A fixture as a source."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path.name, SafetensorsFile(path)

    def names(self) -> list[str]:
        return [name for name in self.file.names() if not name.endswith(".expected")]

    def tensor(self, name: str) -> Tensor:
        return self.file.tensor(name)

    def config(self) -> dict[str, Any]:
        return {"quantization_config": json.loads(self.file.metadata["quantization_config"])}


def test_there_is_a_file_of_every_version() -> None:
    stated = [Kept(path).config()["quantization_config"]["version"] for path in FILES]
    assert stated == list(range(1, VERSION + 1))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_version_is_still_read(path: Path) -> None:
    source: Any = Kept(path)
    modules = quantized_modules(source)
    assert modules.entries
    for module in modules.entries:
        assert torch.equal(modules.dense(module), source.file.tensor(f"{module}.expected")), module


def test_a_later_version_is_refused_with_the_way_out() -> None:
    with pytest.raises(Unsupported, match="upgrade fewbits"):
        read_modules({"version": VERSION + 1, "modules": {}})
