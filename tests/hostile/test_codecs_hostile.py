"""Quantized checkpoints with a tensor or a field broken, in every checkpoint format that has a fixture.

The linears in tests/golden/checkpoints were written by other libraries, those of EXL3 are made here; each is broken in
each way below. A reader may take what it can take, but never crash, and never take a value that is no number, a tensor
that is missing or one of another shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from exl3_oracle import random_linear
from limits import attempt, refused
from torch import Tensor

from fewbits.checkpoints.base import TensorInfo
from fewbits.checkpoints.codecs import quantized_modules
from fewbits.checkpoints.safetensors_file import SafetensorsFile
from fewbits.core.errors import BadInput

FOLDER = Path(__file__).parents[1] / "golden" / "checkpoints"


class Made:
    """Random EXL3 linears, as a file of fixtures has them."""

    CASES = ("mcg", "3inst")

    def __init__(self) -> None:
        about = {"quant_method": "exl3", "bits": 2.0, "head_bits": 6}
        self.metadata = {"cases": json.dumps({case: {**about, "codebook": case} for case in self.CASES})}
        self._tensors = {
            f"{case}/{name}": value
            for case in self.CASES
            for name, value in random_linear(2, case, 128, 128, old=case == "3inst")[0].items()
        }

    def names(self) -> list[str]:
        return list(self._tensors)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].clone()


class Broken:
    """One linear of a fixture as a source, with some tensors and configuration replaced."""

    path = "broken"
    dtype = torch.float32

    def __init__(self, file: SafetensorsFile | Made, case: str) -> None:
        about = json.loads(file.metadata["cases"])[case]
        self.settings: dict[str, Any] = about if "quantization" in about else {"quantization_config": about}
        start = f"{case}/"
        names = [name for name in file.names() if name.startswith(f"{start}m")]
        self.tensors = {name.removeprefix(start): file.tensor(name) for name in names}

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def tied(self) -> dict[str, str]:
        return {}

    def info(self, name: str) -> TensorInfo:
        value = self.tensor(name)
        return TensorInfo(shape=tuple(value.shape), dtype=value.dtype, nbytes=value.nbytes, stored=str(value.dtype))

    def tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise BadInput(f"{self.path}: no tensor named {name!r}")
        return self.tensors[name]

    def config(self) -> dict[str, Any]:
        return self.settings

    def decode(self) -> dict[str, Tensor]:
        modules = quantized_modules(self)  # type: ignore[arg-type]
        return {name: modules.read(name).dense() for name in modules.entries}


def fixtures() -> list[Any]:
    found = []
    for path in sorted(FOLDER.glob("*.safetensors")):
        file = SafetensorsFile(path)
        found += _cases(path.stem, file, json.loads(file.metadata["cases"]))
    return found + _cases("exl3", Made(), Made.CASES)


def _cases(kind: str, file: SafetensorsFile | Made, cases: Iterable[str]) -> list[Any]:
    """The first case of a format always runs."""
    return [
        pytest.param(file, case, id=f"{kind}-{case}", marks=[pytest.mark.slow] if position else [])
        for position, case in enumerate(cases)
    ]


def extreme(value: Tensor, largest: bool) -> Tensor:
    if value.dtype == torch.bool:
        return torch.full_like(value, largest)
    limits = torch.finfo(value.dtype) if value.is_floating_point() else torch.iinfo(value.dtype)
    return torch.full_like(value, limits.max if largest else limits.min)


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "a row less": lambda value: value[:-1] if value.dim() else value.reshape(1).repeat(3),
    "a column more": lambda value: torch.cat([value, value[..., -1:]], dim=-1) if value.dim() else value.repeat(2),
    "no rows": lambda value: value[:0] if value.dim() else value.reshape(1)[:0],
    "flat": lambda value: value.flatten() if value.dim() != 1 else value.reshape(1, -1),
    "a dimension more": lambda value: value[None],
    "of float64": lambda value: value.double(),
    "of int16": lambda value: torch.zeros(value.shape, dtype=torch.int16),
    "of truth values": lambda value: torch.ones(value.shape, dtype=torch.bool),
    "all largest": lambda value: extreme(value, True),
    "all smallest": lambda value: extreme(value, False),
}


def test_there_are_fixtures_and_they_are_good() -> None:
    assert len(fixtures()) >= 10
    for parameters in fixtures():
        file, case = parameters.values
        assert Broken(file, case).decode()


@pytest.mark.parametrize("way", BROKEN)
@pytest.mark.parametrize(("file", "case"), fixtures())
def test_broken_tensors_are_refused_or_read(file: SafetensorsFile | Made, case: str, way: str) -> None:
    for name in Broken(file, case).names():
        source = Broken(file, case)
        source.tensors[name] = BROKEN[way](source.tensors[name])
        found: dict[str, Tensor] = {}
        attempt(lambda source=source, found=found: found.update(source.decode()))
        for value in found.values():
            assert bool(value.isfinite().all()), name


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("file", "case"), fixtures())
def test_scales_that_are_no_numbers_are_refused(file: SafetensorsFile | Made, case: str, number: str) -> None:
    for name, value in Broken(file, case).tensors.items():
        if value.is_floating_point() and value.numel() and value.dtype.itemsize > 1:
            source = Broken(file, case)
            source.tensors[name] = value.clone()
            source.tensors[name].view(-1)[-1] = float(number)
            codes = name.endswith("W_q")  # HQQ can view codes as floats: any bits are right
            (attempt if codes else refused)(source.decode)


@pytest.mark.parametrize(("file", "case"), fixtures())
def test_a_missing_tensor_is_refused_or_not_needed(file: SafetensorsFile | Made, case: str) -> None:
    whole = Broken(file, case).decode()
    for name in Broken(file, case).names():
        source = Broken(file, case)
        del source.tensors[name]
        if attempt(source.decode) is None:  # it was of no account
            found = source.decode()
            assert all(torch.equal(found[module], whole[module]) for module in found), name


VALUES: list[Any] = [
    None, -1, 0, 3, 2**64, float("nan"), "__import__('os').system('false')", [1, "a"], {"a": {"b": None}},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index of a configuration, outermost first."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    found = [(*path, key) for key in keys]
    return found + [deeper for key in keys for deeper in places(value[key], (*path, key))]


@pytest.mark.parametrize("value", VALUES, ids=[f"{index}-{str(value)[:12]}" for index, value in enumerate(VALUES)])
@pytest.mark.parametrize(("file", "case"), fixtures())
def test_broken_settings_are_refused_or_read(file: SafetensorsFile | Made, case: str, value: Any) -> None:
    for path in places(Broken(file, case).settings):
        source = Broken(file, case)
        inner: Any = source.settings
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        attempt(source.decode)


@pytest.mark.parametrize(("file", "case"), fixtures())
def test_settings_left_out(file: SafetensorsFile | Made, case: str) -> None:
    for path in places(Broken(file, case).settings):
        source = Broken(file, case)
        inner: Any = source.settings
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        attempt(source.decode)
