"""Checkpoint formats of quantized models: one file each, one line in `CODECS`.

A codec turns what a file stores for a linear into a `Stored`: one of our formats and its canonical tensors, the
codes still packed. Writing goes the other way. So n formats need n codecs and not n x n converters, and a conversion
is exact whenever reader and writer speak of the same format. What none of our formats can say comes as `Dense`, with
a note on how it was rounded; what a codec cannot write it refuses with the reason.

Codecs read through a `Source`, tensor by tensor. They take shapes from tensors, not from JSON, wherever the tensors
tell; what JSON alone tells is checked against them.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.fused_experts import Fused
from fewbits.core.errors import BadInput, FewbitsError, Unsupported
from fewbits.core.registry import Registry
from fewbits.formats import Format, Quantized, hadamard
from fewbits.formats import bits as packing
from fewbits.formats.low_rank import LowRank, LowRankSpec
from fewbits.formats.mix import Mix, Mixed, part_state
from fewbits.formats.outliers import Outliers, OutlierSpec
from fewbits.formats.scales import State

CODECS = Registry(
    "checkpoint format",
    {
        "native": "fewbits.checkpoints.native:CODEC",
        "compressed-tensors": "fewbits.checkpoints.compressed_tensors:CODEC",
        "gptq": "fewbits.checkpoints.gptq:V1",
        "gptq_v2": "fewbits.checkpoints.gptq:V2",
        "awq": "fewbits.checkpoints.awq:CODEC",
        "bitsandbytes": "fewbits.checkpoints.bitsandbytes:CODEC",
        "fp8": "fewbits.checkpoints.fp8:CODEC",
        "mlx": "fewbits.checkpoints.mlx:CODEC",
        "modelopt": "fewbits.checkpoints.modelopt:CODEC",
        "mxfp4": "fewbits.checkpoints.mxfp4:CODEC",
        "hqq": "fewbits.checkpoints.hqq:CODEC",
        "exl2": "fewbits.checkpoints.exl2:CODEC",
        "exl3": "fewbits.checkpoints.exl3:CODEC",
    },
)


T = TypeVar("T")
_ONLY_READ = "fewbits reads this format and does not write it"
# What numbers and settings that lie make of torch's and Python's operations. Other errors (a failed assertion, a disk
# that cannot be read) say nothing of the file.
_STUMBLES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stored:
    """A quantized weight [out, in] as canonical tensors (`Quantized.to_state`), and what its input goes through.

    activations: the format the input is rounded to as the model runs.  order: int64 [in], the input channel that each
    column of the weight multiplies; None: they are in order.  input_hadamard: see formats/hadamard.py.
    residual: added to what the codes stand for.  outliers: columns that stay in 16 bits.
    inputs: what static activations are rounded with (formats/rows.py).
    note: what of the file is not here, to be told to the user.
    """

    format: Format
    shape: tuple[int, int]
    state: State
    activations: Format | None = None
    order: Tensor | None = None
    input_hadamard: tuple[int, ...] = ()
    residual: LowRank | None = None
    outliers: Outliers | None = None
    inputs: State = dataclasses.field(default_factory=dict)
    note: str = ""

    def quantized(self) -> Quantized:
        """The weight with its codes unpacked; its columns are in `order`."""
        return Quantized.from_state(self.format, self.shape, self.state)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that multiplies the input as it comes, untransformed and in order."""
        value = self.quantized().dequantize()
        if self.residual is not None:
            value = value + self.residual.dense()
        if self.outliers is not None:
            value = self.outliers.dense(value)
        if self.input_hadamard:
            value = hadamard.transform(value, self.input_hadamard, inverse=True)
        if self.order is not None:
            value = torch.empty_like(value).index_copy_(1, self.order, value)
        return value.to(dtype)

    @property
    def layer(self) -> Layer:
        return Layer(format=self.format, shape=self.shape, activations=self.activations,
                     ordered=self.order is not None, input_hadamard=self.input_hadamard,
                     residual=None if self.residual is None else self.residual.spec,
                     outliers=None if self.outliers is None else self.outliers.spec)  # fmt: skip

    @property
    def plain(self) -> bool:
        """Whether the codes alone say what the layer does to its input."""
        ordinary = self.activations is None and self.order is None and not self.input_hadamard
        return ordinary and self.residual is None and self.outliers is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A weight that none of our formats can say exactly: decoded. note: why, and how it was rounded."""

    value: Tensor
    note: str

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.value.to(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredMix:
    """A weight [out, in] whose input channels are of several formats, as canonical tensors (`Mixed.to_state`).

    Of the checkpoint formats only the native one says so; to the others it is what `Dense` is to them.
    """

    mix: Mix
    shape: tuple[int, int]
    state: State

    @property
    def note(self) -> str:
        return f"its input channels are of several formats ({self.mix.name})"

    def quantized(self) -> Mixed:
        """The weight with its codes unpacked."""
        return Mixed.from_state(self.mix, self.shape, self.state)

    def parts(self) -> list[Stored]:
        """The columns of each format, as if it were a weight of its own."""
        sizes = zip(self.mix.formats, self.mix.columns(self.shape[1]), strict=True)
        return [
            Stored(format=format, shape=(self.shape[0], columns), state=part_state(self.state, index))
            for index, (format, columns) in enumerate(sizes)
        ]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.quantized().dequantize().to(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What a configuration says of one quantized linear."""

    format: Format
    shape: tuple[int, int]
    activations: Format | None = None
    ordered: bool = False
    input_hadamard: tuple[int, ...] = ()
    residual: LowRankSpec | None = None
    outliers: OutlierSpec | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A quantized matrix found in a source. parts: the tensors it consists of.  about: what its codec needs to know.

    tensor: the name of the dense tensor that the model has in its place.
    """

    tensor: str
    parts: tuple[str, ...]
    about: Any = None


class Codec(ABC):
    """One checkpoint format. A codec that only reads leaves the second half as it is here."""

    holds = ""  # a line for `fewbits list checkpoints`
    writes = False

    @abstractmethod
    def claims(self, quantization: dict[str, Any]) -> bool:
        """Whether a `quantization_config` is of this format."""

    @abstractmethod
    def entries(self, source: Source) -> dict[str, Entry]:
        """Module name -> its entry, for every quantized matrix of `source`; reads no weights."""

    @abstractmethod
    def read(self, source: Source, module: str, entry: Entry) -> Stored | StoredMix | Dense:
        """The matrix of `entry`, without a change to its numbers where one of our formats has them."""

    def refuses_model(self, config: Mapping[str, Any]) -> str | None:
        """Why no model of this config.json can be written, or None."""
        return None

    def takes(self, module: str) -> bool:
        """Whether a module of this name is quantized in this format; what is not stays dense."""
        return True

    def refuses(self, stored: Stored) -> str | None:
        """Why this format cannot hold `stored` exactly, or None if it can."""
        return _ONLY_READ

    def nearest(self, layer: Layer) -> Format:
        """The format to round a weight to that this codec cannot hold as it is. Unsupported if there is none."""
        raise Unsupported(_ONLY_READ)

    def encode(self, stored: Stored) -> dict[str, Tensor]:
        """The tensors of one linear, by suffix of the module's name."""
        raise Unsupported(_ONLY_READ)

    def fused(self, config: Mapping[str, Any], modules: Collection[str]) -> list[Fused]:
        """What this format has of quantized `modules` in one tensor for all experts. BadInput where one is missing."""
        return []

    def fuse(self, fused: Fused, encoded: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of such a part, of what `encode` gave for each of its linears."""
        raise Unsupported(_ONLY_READ)

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What the runtimes of this format want config.json to say in another way than it does."""
        return {}

    def quantization(self, layers: Mapping[str, Layer], dense: Iterable[str]) -> dict[str, Any]:
        """What to add to config.json for these quantized linears and those left dense."""
        raise Unsupported(_ONLY_READ)


def find_codec(source: Source) -> tuple[str, Codec] | None:
    """(name, codec) of a quantized source; None for a dense one, Unsupported for a format fewbits does not read."""
    config = source.config()
    quantization = config.get("quantization_config") or config.get("quantization")
    if not quantization:
        return None
    if not isinstance(quantization, dict):
        raise BadInput(f"{source.path}: quantization_config is a {type(quantization).__name__}; an object is expected")
    for name, codec in CODECS.items():
        if codec.claims(quantization):
            return name, codec
    raise Unsupported(
        f"{source.path}: quant_method {quantization.get('quant_method')!r} is not read by fewbits (it reads "
        f"{', '.join(CODECS)}); load it with transformers, or pass the original model"
    )


class QuantizedModules:
    """The quantized matrices of a checkpoint, whichever format they are stored in, read one at a time."""

    def __init__(self, source: Source, name: str | None = None, codec: Codec | None = None) -> None:
        self.source, self.name, self._codec = source, name, codec
        self.entries: dict[str, Entry] = {}
        if codec is not None:
            damaged = f"{source.path}: its quantization settings are damaged, or of a layout fewbits does not know"
            self.entries = _read_by(lambda: codec.entries(source), damaged)
        self.notes: list[str] = []  # what the modules read so far left behind

    def read(self, module: str) -> Stored | StoredMix | Dense:
        """Module `module` as its file holds it; BadInput with its name where the file is damaged."""
        try:
            found = _read_by(lambda: self._read(module), "damaged, or of a layout fewbits does not know")
            if not isinstance(found, StoredMix) and found.note and found.note not in self.notes:
                self.notes.append(found.note)
        except BadInput as error:
            if module in str(error):
                raise
            raise type(error)(f"{self.source.path}: {module}: {error}") from error
        return found

    def _read(self, module: str) -> Stored | StoredMix | Dense:
        assert self._codec is not None
        found = self._codec.read(self.source, module, self.entries[module])
        if isinstance(found, Stored):
            _check(found)
        elif isinstance(found, StoredMix):
            found.quantized()
            for part in found.parts():
                _check(part)
        elif not finite(found.value):
            raise BadInput("holds values that are NaN or infinite: the checkpoint is damaged")
        return found

    def dense(self, module: str) -> Tensor:
        """The weight of `module` for its input as it is, float32."""
        return self.read(module).dense()


def _read_by(reader: Callable[[], T], damaged: str) -> T:
    """What `reader` gives; BadInput that starts with `damaged` for what it stumbles over, having forgotten to check."""
    try:
        return reader()
    except FewbitsError:
        raise
    except _STUMBLES as error:
        raise BadInput(f"{damaged}: {type(error).__name__}: {' '.join(str(error).split())[:500]}") from error


def quantized_modules(source: Source) -> QuantizedModules:
    """What `source` has quantized; empty for a dense one. Unsupported for a method fewbits does not read."""
    found = find_codec(source)
    return QuantizedModules(source) if found is None else QuantizedModules(source, *found)


def finite(tensor: Tensor) -> bool:
    """Whether the floating-point `tensor` holds no NaN and nothing infinite."""
    tensor = tensor if tensor.itemsize > 1 else tensor.float()
    # Both would show in the sum. It alone, in one pass, settles nearly every tensor; it may also just overflow.
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.isfinite().all())


def _check(stored: Stored) -> None:
    if min(stored.shape) < 1:
        raise BadInput(f"a weight of {stored.shape[0]} x {stored.shape[1]}: the checkpoint is damaged")
    for name, (shape, dtype) in stored.format.layout(stored.shape).items():
        if name not in stored.state:
            raise BadInput(f"{name} is missing: the checkpoint is damaged")
        tensor = stored.state[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise BadInput(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; {stored.format.name} on {stored.shape} has "
                f"{dtype} {shape}: the checkpoint is damaged"
            )
        if tensor.is_floating_point() and not finite(tensor):
            raise BadInput(f"{name} holds NaN or infinite values: the checkpoint is damaged")
    scale, _ = stored.format.unsettle(stored.shape, stored.state)
    largest = max(map(abs, stored.format.grid.levels))
    if not float(scale.float().abs().max()) * largest <= _LARGEST:
        raise BadInput("a scale is NaN, or so large that values overflow float32: the checkpoint is damaged")
    order = stored.order
    if order is not None and not torch.equal(order.sort().values, torch.arange(stored.shape[1])):
        raise BadInput(f"the order of its input channels is no permutation of {stored.shape[1]}")


def group_name(width: int, columns: int) -> str:
    """The part of a format's name that says which columns share a scale."""
    return "channel" if width >= columns else f"g{width}"


def reorder_columns(packed: Tensor, bits: int, order: Tensor) -> Tensor:
    """Canonical rows with column c taken from column order[c]."""
    return packing.pack(packing.unpack(packed, bits, len(order)).index_select(1, order), bits)


def tensor_named(source: Source, name: str, rank: int, *dtypes: torch.dtype) -> Tensor:
    """Tensor `name`; BadInput unless it has `rank` dimensions and one of `dtypes`."""
    tensor = source.tensor(name)
    if tensor.dim() != rank or tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise BadInput(f"{name}: {tensor.dtype} {tuple(tensor.shape)}; {allowed} of {rank} dimensions is expected")
    return tensor


_LARGEST = torch.finfo(torch.float32).max
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def entries_with(source: Source, mark: str, parts: Iterable[str], about: Any = None) -> dict[str, Entry]:
    """The modules that have a tensor called `mark`, each with those of `parts` that it has."""
    names = source.names()
    present, parts = set(names), tuple(parts)
    return {
        module: Entry(
            tensor=f"{module}.weight",
            parts=tuple(name for part in parts if (name := f"{module}.{part}") in present),
            about=about,
        )
        for module in modules_with(names, mark)
    }


def modules_with(names: Iterable[str], suffix: str) -> list[str]:
    """The modules that have a tensor called `suffix`."""
    return [name.removesuffix(f".{suffix}") for name in names if name.endswith(f".{suffix}")]
