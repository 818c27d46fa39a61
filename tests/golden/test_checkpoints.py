"""Linears that other libraries wrote (make_checkpoints.py) decode to what those libraries decode, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewbits.checkpoints.base import TensorInfo
from fewbits.checkpoints.codecs import CODECS, Dense, QuantizedModules, Stored, quantized_modules
from fewbits.checkpoints.safetensors_file import SafetensorsFile
from fewbits.checkpoints.words import nibbles, translate

FOLDER = Path(__file__).parent / "checkpoints"


class Case:
    """One linear of a fixture as a source that holds nothing else."""

    path = "golden"

    def __init__(self, file: SafetensorsFile, case: str) -> None:
        self.file, self.case = file, case
        self.about: dict[str, Any] = json.loads(file.metadata["cases"])[case]
        self.expected = file.tensor(f"{case}/expected")

    def names(self) -> list[str]:
        start = f"{self.case}/"
        return sorted(name.removeprefix(start) for name in self.file.names() if name.startswith(f"{start}m"))

    def info(self, name: str) -> TensorInfo:
        return self.file.info(f"{self.case}/{name}")

    def tensor(self, name: str) -> Tensor:
        return self.file.tensor(f"{self.case}/{name}")

    def config(self) -> dict[str, Any]:
        return self.about if "quantization" in self.about else {"quantization_config": self.about}


def cases() -> list[Any]:
    found = []
    for path in sorted(FOLDER.glob("*.safetensors")):
        file = SafetensorsFile(path)
        found += [pytest.param(file, case, id=f"{path.stem}-{case}") for case in json.loads(file.metadata["cases"])]
    return found


def stored(modules: QuantizedModules, name: str) -> Stored:
    found = modules.read(name)
    assert isinstance(found, Stored)
    return found


def ulps(a: Tensor, b: Tensor) -> int:
    """The largest distance in float32 numbers; minus zero is zero."""
    ordered = [torch.where(x < 0, -(x.abs().view(torch.int32)), x.abs().view(torch.int32)) for x in (a, b)]
    return int((ordered[0].long() - ordered[1].long()).abs().max())


# What the library computes in bfloat16 whatever it is given.
IN_BFLOAT16 = ("NVFP4A16",)
# Where another rounding is stated: SCB / 127 is rounded here, q * SCB there.
LAST_BITS = {"bitsandbytes-int8": 2}


@pytest.mark.parametrize(("file", "case"), cases())
def test_values_are_the_librarys(file: SafetensorsFile, case: str) -> None:
    source: Any = Case(file, case)
    modules = quantized_modules(source)
    value = together(modules)
    assert value.shape == source.expected.shape
    if case in IN_BFLOAT16:
        value = value.bfloat16().float()
    assert ulps(value, source.expected) <= LAST_BITS.get(f"{file.path.stem}-{case}", 0)


def together(modules: QuantizedModules) -> Tensor:
    """The decoded weight; of experts that share a tensor the dense tensor that they share."""
    if len(modules.entries) == 1:
        return modules.dense(*modules.entries)
    (fused,) = CODECS.get(str(modules.name)).fused({}, modules.entries)
    return fused.join(modules.dense, transposed=modules.name == "mxfp4")


@pytest.mark.parametrize(
    ("kind", "case"),
    [("mxfp4", "down_proj"), ("mxfp4", "gate_up_proj"), ("mlx", "stack-affine"), ("mlx", "stack-mxfp4")],
)
def test_experts_are_written_as_they_were(kind: str, case: str) -> None:
    """All but minus zero."""
    source: Any = Case(SafetensorsFile(FOLDER / f"{kind}.safetensors"), case)
    modules, codec = quantized_modules(source), CODECS.get(kind)
    (fused,) = codec.fused({}, modules.entries)
    written = codec.fuse(fused, {name: codec.encode(stored(modules, name)) for name in fused.modules})
    assert written.keys() == set(source.names())
    for name, tensor in written.items():
        theirs = source.tensor(name)
        if "mxfp4" in f"{kind} {case}" and not name.endswith("scales"):
            theirs = translate(theirs.view(torch.uint8), nibbles((*range(8), 0, *range(9, 16)))).view(theirs.dtype)
        assert torch.equal(tensor, theirs), name


@pytest.mark.parametrize(("file", "case"), cases())
def test_what_can_be_written_is_the_librarys_bytes(file: SafetensorsFile, case: str) -> None:
    source: Any = Case(file, case)
    modules = quantized_modules(source)
    assert modules.name is not None
    module, *others = modules.entries
    if others:
        pytest.skip("experts in one tensor have a test of their own")
    found = modules.read(module)
    codec = CODECS.get(modules.name)
    if isinstance(found, Dense) or not codec.writes or codec.refuses(found) is not None:
        pytest.skip("read only")
    unusual = source.about.get("checkpoint_format") == "gptq_p" or case.endswith("-float")
    if unusual or file.path.stem.startswith("old"):
        pytest.skip("written in the usual layout")
    packed = {"bitsandbytes": "weight", "compressed-tensors": "weight_packed", "modelopt": "weight"}
    signed_zero = packed.get(modules.name)
    for suffix, tensor in codec.encode(found).items():
        if "quant_state" not in suffix:
            name = f"{module}.{suffix}"
            assert name in source.names(), name
            theirs = source.tensor(name)
            if suffix == signed_zero and theirs.dtype == torch.uint8 and "nf4" not in case:
                theirs = translate(theirs, nibbles((*range(8), 0, *range(9, 16))))
            assert torch.equal(tensor, theirs), name
