"""Reading and writing safetensors, against the safetensors package."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewbits.checkpoints import safetensors_file
from fewbits.checkpoints.safetensors_file import DTYPES, SafetensorsFile, read_header, write_stream
from fewbits.core.errors import BadInput, FewbitsError

Item = tuple[str, torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]


def item(name: str, value: torch.Tensor) -> Item:
    return name, value.dtype, tuple(value.shape), lambda: value


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit (NaN included)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def test_the_package_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {f"t.{name}": random_tensor(dtype, (3, 5)) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "größe": torch.ones(1)}
    path = tmp_path / "m.safetensors"
    size = write_stream(path, [item(*pair) for pair in tensors.items()], {"format": "pt"})
    assert size == path.stat().st_size
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert sorted(opened.keys()) == sorted(tensors)
        assert all(same(opened.get_tensor(name), value) for name, value in tensors.items())


def test_we_read_what_the_package_writes(tmp_path: Path) -> None:
    tensors = {f"t.{name}": random_tensor(dtype, (3, 5)) for name, dtype in DTYPES.items()}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata={"a": "b"})
    opened = SafetensorsFile(path)
    assert opened.names() == sorted(tensors)
    assert opened.metadata == {"a": "b"}
    assert all(same(opened.tensor(name), value) for name, value in tensors.items())
    info = opened.info("t.BF16")
    assert (info.shape, info.dtype, info.nbytes, info.stored) == ((3, 5), torch.bfloat16, 30, "BF16")
    with pytest.raises(BadInput, match=r"no tensor named 't\.BF61'; nearest: t\.BF16"):
        opened.tensor("t.BF61")


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {name: random_tensor(dtype, tuple(shape)) for name, (dtype, shape) in shapes.items()}
    path = tmp_path_factory.mktemp("round") / "m.safetensors"
    write_stream(path, [item(*pair) for pair in tensors.items()])
    opened = SafetensorsFile(path)
    assert opened.names() == sorted(tensors)
    assert all(same(opened.tensor(name), value) for name, value in tensors.items())


def test_every_tensor_lies_aligned(tmp_path: Path) -> None:
    values = [("odd", torch.zeros(3, dtype=torch.uint8)), ("b", torch.zeros(1, dtype=torch.bfloat16))]
    values += [("d", torch.zeros(1, dtype=torch.float64)), ("f", torch.zeros(3))]
    write_stream(tmp_path / "m.safetensors", [item(*pair) for pair in values])
    assert all(info.start % info.dtype.itemsize == 0 for info in read_header(tmp_path / "m.safetensors").values())


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    highest = []

    def provide() -> torch.Tensor:
        value = torch.zeros(4)
        made.append(weakref.ref(value))
        highest.append(sum(tensor() is not None for tensor in made))
        return value

    write_stream(tmp_path / "m.safetensors", [(f"t{index}", torch.float32, (4,), provide) for index in range(5)])
    assert max(highest) == 1


def test_views_and_other_layouts_are_written_as_they_read(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4)
    path = tmp_path / "m.safetensors"
    write_stream(path, [item("t", value.T), item("s", value[:, 1:3]), item("p", torch.nn.Parameter(value))])
    loaded = load_file(path)
    assert torch.equal(loaded["t"], value.T)
    assert torch.equal(loaded["s"], value[:, 1:3])


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([item("a", torch.zeros(1)), item("a", torch.zeros(1))], BadInput, "'a' is taken"),
        ([item("__metadata__", torch.zeros(1))], BadInput, "is taken"),
        ([item("a", torch.zeros(1, dtype=torch.complex128))], BadInput, "no torch.complex128"),
        ([("a", torch.float32, (2,), lambda: torch.zeros(3))], FewbitsError, "was announced"),
        ([("a", torch.float32, (2,), lambda: torch.zeros(2).half())], FewbitsError, "was announced"),
    ],
)
def test_refused_writes_leave_nothing_behind(
    items: list[Item], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        write_stream(tmp_path / "m.safetensors", items)
    assert list(tmp_path.iterdir()) == []


def test_a_provider_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_stream(path, [item("a", torch.ones(2))])

    def fail() -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_stream(path, [item("b", torch.ones(9)), ("a", torch.float32, (2,), fail)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]
    assert torch.equal(SafetensorsFile(path).tensor("a"), torch.ones(2))


def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fewbits.core.record.os.fsync", full)
    with pytest.raises(FewbitsError, match=r"no space left while writing .*m\.safetensors") as caught:
        write_stream(tmp_path / "m.safetensors", [item("a", torch.ones(2))])
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_fresh_writable_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_stream(path, [item("a", torch.ones(4))])
    opened = SafetensorsFile(path)
    opened.tensor("a").zero_()
    assert torch.equal(opened.tensor("a"), torch.ones(4))


def test_an_unaligned_file_still_reads(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (3 - len(header) % 8)
    values = torch.tensor([1.5, -2.0])
    content = len(header).to_bytes(8, "little") + header + values.numpy().tobytes()
    (tmp_path / "m.safetensors").write_bytes(content)
    assert torch.equal(safetensors_file.SafetensorsFile(tmp_path / "m.safetensors").tensor("a"), values)
