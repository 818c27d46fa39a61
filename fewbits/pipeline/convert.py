"""`convert`: a quantized checkpoint in another checkpoint format, layer by layer, without building the model.

    codes and scales of SRC  ->  canonical tensors  ->  codes and scales of the target's layout

Where the target can say the very numbers of a layer nothing is rounded, and the layer is *lossless*: decoded, both
files give the same float32 values. Where it cannot, the run stops with the layer's name and the reason; `requantize`
allows three ways on, with the error stated:

- *rescaled*: the codes stay and only the scales are rounded, to float16 or to the reciprocal that NVFP4 has in
  compressed-tensors. The loss is in the last bits of the scale.
- *weights only*: the weights stay as they are and activations are no longer rounded.
- *requantized*: the layer is decoded and rounded to nearest in the target's format most like its own, which adds to
  what the first quantization lost. Quantizing the original again is better where there is one.

What the target has no word for beside the codes (rounded activations, key-value scales) is left out with a note.
Embeddings that a file quantized (MLX does) become dense unless the target is MLX or native. `to="dense"` decodes
everything into one float type.

Memory is a shard and the temporaries of one layer. Shards go into a hidden directory beside the output, which is
renamed when it is complete: there is never half an output.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import (
    CODECS,
    Codec,
    Dense,
    Layer,
    QuantizedModules,
    Stored,
    StoredMix,
    quantized_modules,
)
from fewbits.checkpoints.gguf_codec import NAME as GGUF
from fewbits.checkpoints.gguf_codec import gguf_modules
from fewbits.checkpoints.gguf_source import GGUFSource
from fewbits.checkpoints.safetensors_file import write_stream
from fewbits.checkpoints.source import DemoSource, open_source
from fewbits.core.errors import BadInput, Unsupported, unknown
from fewbits.core.progress import OnProgress, Progress
from fewbits.core.record import environment, write_json
from fewbits.formats.parse import parse_format
from fewbits.formats.scales import DividedScale, FloatScale, PlainScale
from fewbits.metrics.error import sqnr_db
from fewbits.models.topology import find_topology
from fewbits.pipeline import convert_gguf
from fewbits.pipeline.output import write_companions

DENSE = "dense"
SHARD_BYTES = 512 << 20
RECORD = "conversion.json"
_KEEPS_EMBEDDINGS = ("mlx", "native")
_KV_SCALES = ("k_scale", "v_scale", "q_scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """What became of one layer. sqnr_db: of the new values against those of the source; None where they are equal."""

    name: str
    before: str
    after: str
    action: str  # lossless, weights only, rescaled, requantized or decoded
    reason: str = ""
    sqnr_db: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """The account of a conversion; `conversion.json` holds it too."""

    source: str
    format: str  # of the source's checkpoint
    to: str
    out: str
    layers: tuple[Converted, ...]
    notes: tuple[str, ...]
    seconds: float
    bytes: int

    @property
    def actions(self) -> Counter[str]:
        return Counter(layer.action for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "actions": dict(self.actions)}


def targets() -> list[str]:
    """What `convert` writes."""
    return [*(name for name, codec in CODECS.items() if codec.writes), GGUF, DENSE]


def convert(
    model: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    requantize: bool = False,
    dtype: torch.dtype | None = None,
    progress: OnProgress = lambda event: None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Writes the quantized checkpoint `model` as `to` into the new directory `out`.

    dtype: of what becomes dense; default: the source's own. BadInput, before anything is in place, for a layer that
    `to` cannot hold unless `requantize`.
    """
    if to not in targets():
        raise unknown("checkpoint format to convert to", to, targets())
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BadInput(f"{target} exists and holds something else; choose another output, or remove it first")
    source = open_source(model, allow_quantized=True)
    from_gguf = isinstance(source, GGUFSource) and not isinstance(source, DemoSource)
    packed = gguf_modules(source) if from_gguf else quantized_modules(source)
    if packed.name is None or not packed.entries:
        raise BadInput(f"{source.path}: nothing in it is quantized; `fewbits quantize` makes a quantized model of it")
    began, work = time.monotonic(), target.with_name(f".{target.name}.converting")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        account: Sequence[Converted]
        if to == GGUF:
            outcomes, notes, total = convert_gguf.write(
                source, packed, work, target.name, requantize=requantize, dtype=dtype or source.dtype, progress=progress
            )
            account = [_of_gguf(each) for each in outcomes]
        else:
            run = _Run(source, packed, to, requantize, dtype or source.dtype, _Shards(work, shard_bytes))
            run.layers_and_tensors(progress)
            total = run.finish()
            account, notes = run.account, list(run.notes)
        conversion = Conversion(
            source=source.path, format=packed.name, to=to, out=str(target), layers=tuple(account), notes=tuple(notes),
            seconds=time.monotonic() - began, bytes=total,
        )  # fmt: skip
        write_json(work / RECORD, {**_finite(conversion.to_dict()), "environment": environment()})
        if target.exists():
            target.rmdir()
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return conversion


def _of_gguf(each: convert_gguf.Outcome) -> Converted:
    action = "lossless" if each.sqnr_db is None else "requantized"
    return Converted(
        name=each.name, before=each.before, after=each.after, action=action, reason=each.reason, sqnr_db=each.sqnr_db
    )


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no minus infinity, which the error of a weight that became zero would be."""
    layers = [{**layer, "sqnr_db": max(layer["sqnr_db"], -999.0)} if layer["sqnr_db"] else layer
              for layer in record["layers"]]  # fmt: skip
    return {**record, "layers": layers}


class _Run:
    """One conversion while it goes on."""

    def __init__(
        self, source: Source, packed: QuantizedModules, to: str, requantize: bool, dtype: torch.dtype, shards: _Shards
    ) -> None:
        self.source, self.packed, self.to = source, packed, to
        self.requantize, self.dtype, self.shards = requantize, dtype, shards
        self.codec: Codec | None = None if to == DENSE else CODECS.get(to)
        topology = find_topology(source.config())
        self.embeddings = topology.embeddings if topology else "model.embed_tokens"
        self.head = topology.head if topology else "lm_head"
        self.account: list[Converted] = []
        self.layers: dict[str, Layer] = {}
        self.dense: set[str] = set()
        self.notes: dict[str, None] = {}

    def layers_and_tensors(self, progress: OnProgress) -> None:
        """Everything of the source, in the order of names, so that a layer's tensors share a shard."""
        parts = {part for entry in self.packed.entries.values() for part in entry.parts}
        work: list[tuple[str, Callable[[str], None]]] = [(name, self._layer) for name in self.packed.entries]
        work += [(name, self._plain) for name in self.source.names() if name not in parts]
        work.sort(key=lambda item: item[0])
        for done, (name, act) in enumerate(work, 1):
            act(name)
            progress(Progress(f"to {self.to}", done, len(work), name))
        self.notes |= dict.fromkeys(self.packed.notes)

    def finish(self) -> int:
        """Index, configuration and companions; the bytes of tensor data."""
        total = self.shards.finish()
        write_companions(self.shards.directory, self.source)
        config = self.source.config()
        for key in ("quantization_config", "quantization"):
            config.pop(key, None)
        if self.codec is not None:
            if not self.layers:
                raise BadInput(f"{self.source.path}: no layer is left to be written as {self.to}")
            left = {self.head, *self.dense} - set(self.layers)
            config |= self.codec.quantization(self.layers, sorted(left))
        else:
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        write_json(self.shards.directory / "config.json", config)
        return total

    def _plain(self, name: str) -> None:
        module, _, leaf = name.rpartition(".")
        if leaf in _KV_SCALES and self.to != self.packed.name:
            self.notes["scales of keys and values are left out: the target has them elsewhere or not at all"] = None
            return
        value = self.source.tensor(name)
        if leaf == "weight" and value.dim() == 2 and module != self.embeddings:
            self.dense.add(module)
        self.shards.add(name, value)

    def _layer(self, name: str) -> None:
        found = self.packed.read(name)
        before = _format_name(found)
        embedding = name == self.embeddings and self.to not in _KEEPS_EMBEDDINGS
        entry = self.packed.entries[name]
        if self.codec is None or embedding or not entry.tensor.endswith(".weight"):
            self._decode(name, entry.tensor, found, before)
            return
        written, action, reason, error = self._fit(name, found)
        self.layers[name] = written.layer
        for suffix, tensor in self.codec.encode(written).items():
            self.shards.add(f"{name}.{suffix}", tensor)
        self.account.append(
            Converted(name=name, before=before, after=written.format.name, action=action, reason=reason, sqnr_db=error)
        )

    def _decode(self, name: str, tensor: str, found: Stored | StoredMix | Dense, before: str) -> None:
        value = found.dense()
        kept = value.to(self.dtype)
        if not bool(torch.isfinite(kept).all()):
            raise BadInput(f"{name}: values overflow {self.dtype}; choose --dtype bfloat16 or float32")
        self.shards.add(tensor, kept)
        exact = torch.equal(kept.float(), value)
        if name != self.embeddings:
            self.dense.add(name)
        self.account.append(
            Converted(name=name, before=before, after=str(self.dtype).removeprefix("torch."), action="decoded",
                      sqnr_db=None if exact else sqnr_db(value, kept.float()))
        )  # fmt: skip

    def _fit(self, name: str, found: Stored | StoredMix | Dense) -> tuple[Stored, str, str, float | None]:
        """(what the target can hold, action, reason, error): `found` itself where it can."""
        assert self.codec is not None
        reason = self.codec.refuses(found) if isinstance(found, Stored) else found.note
        if reason is None:
            assert isinstance(found, Stored)
            return found, "lossless", "", None
        candidates = _rescaled(found) if isinstance(found, Stored) else []
        fitting = next((each for each in candidates if self.codec.refuses(each) is None), None)
        if isinstance(found, Stored) and fitting is not None and _equal(found, fitting):
            return fitting, "lossless", "", None
        if not self.requantize:
            raise Unsupported(
                f"{name}: {self.to} cannot hold it as it is: {reason}. --requantize rounds such layers again "
                f"and states the error"
            )
        if isinstance(found, Stored) and fitting is not None:
            self._left_out(found, fitting)
            error = _error(found, fitting)
            return fitting, "weights only" if error is None else "rescaled", reason, error
        return self._rounded(name, found, reason)

    def _rounded(
        self, name: str, found: Stored | StoredMix | Dense, reason: str
    ) -> tuple[Stored, str, str, float | None]:
        assert self.codec is not None
        dense = found.dense()
        shape = (dense.shape[0], dense.shape[1])
        layer = found.layer if isinstance(found, Stored) else Layer(format=parse_format("int8-channel"), shape=shape)
        format = self.codec.nearest(layer)
        weight = format.quantize(dense, name)
        new = Stored(format=weight.format, shape=shape, state=weight.to_state())
        again = self.codec.refuses(new)
        if again is not None:
            raise Unsupported(f"{name}: {self.to} cannot hold it, nor what it would be rounded to: {again}")
        if isinstance(found, Stored):
            self._left_out(found, new)
        return new, "requantized", reason, sqnr_db(dense, new.dense())

    def _left_out(self, before: Stored, after: Stored) -> None:
        if before.activations is not None and after.activations is None:
            self.notes[f"activations are no longer rounded to {before.activations.name}"] = None


def _format_name(found: Stored | StoredMix | Dense) -> str:
    if isinstance(found, StoredMix):
        return found.mix.name
    return found.format.name if isinstance(found, Stored) else "decoded"


def _equal(before: Stored, after: Stored) -> bool:
    """Whether only the dtype of the scales differs, and not their values."""
    if before.state.keys() != after.state.keys() or before.activations != after.activations:
        return False
    scales = [name for name in ("scale", "minimum") if name in before.state]
    return all(torch.equal(before.state[name].float(), after.state[name].float()) for name in scales)


def _error(before: Stored, after: Stored) -> float | None:
    old, new = before.dense(), after.dense()
    return None if torch.equal(old, new) else sqnr_db(old, new)


def _rescaled(stored: Stored) -> list[Stored]:
    """`stored` with the same codes and scales of another dtype or form, and without rounded activations; best first."""
    found = [stored]
    store = stored.format.scaling.store
    if isinstance(store, PlainScale):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            if dtype == store.dtype:
                continue
            state = {name: tensor.to(dtype) if name in ("scale", "minimum") else tensor
                     for name, tensor in stored.state.items()}  # fmt: skip
            if all(bool(torch.isfinite(tensor.float()).all()) and bool((tensor != 0).any()) for name, tensor in
                   state.items() if name == "scale"):  # fmt: skip
                found.append(dataclasses.replace(stored, format=stored.format.with_scale_dtype(dtype), state=state))
    elif isinstance(store, FloatScale):
        divided = isinstance(store, DividedScale)
        old, new = ("scale_divisor", "scale_outer") if divided else ("scale_outer", "scale_divisor")
        state = {name: tensor for name, tensor in stored.state.items() if name != old}
        format = parse_format("nvfp4" if divided else "nvfp4_ct")
        if stored.format.scaling.group_size == format.scaling.group_size:
            found.append(dataclasses.replace(stored, format=format, state={**state, new: 1 / stored.state[old]}))
    return found[1:] + [dataclasses.replace(each, activations=None) for each in found if each.activations is not None]


class _Shards:
    """Tensors gathered until they fill a shard, then written; numbered once their count is known."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        self._held: dict[str, Tensor] = {}
        self._filled = self._total = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self._held and self._filled + tensor.nbytes > self.limit:
            self._flush()
        self._held[name] = tensor
        self._filled += tensor.nbytes

    def _flush(self) -> None:
        items = [(name, value.dtype, tuple(value.shape), lambda v=value: v) for name, value in self._held.items()]
        write_stream(self._part(len(self._written)), items, {"format": "pt"})
        self._written.append(list(self._held))
        self._total += self._filled
        self._held, self._filled = {}, 0

    def _part(self, number: int) -> Path:
        return self.directory / f"part-{number}.safetensors"

    def finish(self) -> int:
        """Gives the shards their names and writes the index; the bytes of all tensors."""
        if self._held:
            self._flush()
        count, weight_map = len(self._written), {}
        for number, names in enumerate(self._written):
            name = "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._part(number).rename(self.directory / name)
            weight_map.update(dict.fromkeys(names, name))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.directory / "model.safetensors.index.json", index)
        return self._total
