"""`convert` to a directory of safetensors, by items: a layer, a tensor that stays, a parameter of all experts.

What became of an item is one value, `Item`. It changes the state of the run in one place (`LayerConversion._note`),
whether it was computed just now or comes from the notes of a run that was killed: so the two end in the same files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fewbits.checkpoints import native
from fewbits.checkpoints.base import Source
from fewbits.checkpoints.codecs import CODECS, Codec, Dense, Layer, QuantizedModules, Stored, StoredMix
from fewbits.checkpoints.fused_experts import GPT_OSS, Fused, bias_names, gpt_oss_parameters
from fewbits.core.errors import BadInput, Unsupported
from fewbits.core.progress import OnProgress, Progress
from fewbits.core.record import write_json
from fewbits.formats.parse import parse_format
from fewbits.formats.scales import DividedScale, FloatScale, PlainScale
from fewbits.metrics.error import sqnr_db
from fewbits.models.topology import find_topology
from fewbits.pipeline.output import write_companions
from fewbits.pipeline.shards import Note, Shards

DENSE = "dense"
_KEEPS_EMBEDDINGS = ("mlx", "native")
_KV_SCALES = ("k_scale", "v_scale", "q_scale")
LARGEST_DB = 999.0


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
class Item:
    """tensors: what goes out.  layers: what config.json is to say of them.  dense: modules that are not quantized."""

    tensors: dict[str, Tensor]
    account: tuple[Converted, ...] = ()
    layers: dict[str, Layer] = dataclasses.field(default_factory=dict)
    dense: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def note(self) -> Note:
        """All but the tensors, as JSON."""
        return {
            "account": [dataclasses.asdict(each) for each in self.account],
            "layers": {name: native.layer_entry(layer) for name, layer in self.layers.items()},
            "dense": list(self.dense),
            "notes": list(self.notes),
        }

    @classmethod
    def of_note(cls, note: Note) -> Item:
        return cls(
            tensors={},
            account=tuple(Converted(**each) for each in note["account"]),
            layers={name: native.read_layer(name, entry) for name, entry in note["layers"].items()},
            dense=tuple(note["dense"]),
            notes=tuple(note["notes"]),
        )


class LayerConversion:
    """One conversion while it goes on."""

    def __init__(self, source: Source, packed: QuantizedModules, to: str, requantize: bool, dtype: torch.dtype) -> None:
        self.source, self.packed, self.to = source, packed, to
        self.requantize, self.dtype = requantize, dtype
        self.codec: Codec | None = None if to == DENSE else CODECS.get(to)
        topology = find_topology(source.config())
        self.embeddings = topology.embeddings if topology else "model.embed_tokens"
        self.head = topology.head if topology else "lm_head"
        self.account: list[Converted] = []
        self.layers: dict[str, Layer] = {}
        self.dense: set[str] = set()
        self.notes: dict[str, None] = {}

    def run(self, shards: Shards, progress: OnProgress) -> None:
        """Everything of the source, in the order of names; what `shards` has already is not done again."""
        work = self._work()
        before = shards.resume()
        for note in before:
            self._note(Item.of_note(note))
        told = f"resumed after {len(before)} tensors and layers" if before else ""
        progress(Progress(f"to {self.to}", len(before), len(work), told))
        for done, (name, act) in enumerate(work[len(before) :], len(before) + 1):
            item = act()
            left = tuple(note for note in self.packed.notes if note not in self.notes)
            item = dataclasses.replace(item, notes=(*item.notes, *left))
            shards.add(item.tensors, item.note())
            self._note(item)
            progress(Progress(f"to {self.to}", done, len(work), name))

    def _note(self, item: Item) -> None:
        self.account += item.account
        self.layers |= item.layers
        self.dense |= set(item.dense)
        self.notes |= dict.fromkeys(item.notes)

    def _work(self) -> list[tuple[str, Callable[[], Item]]]:
        fused = self._fused_parameters()
        together = {module for each in fused for module in each.modules}
        names = self.source.names()
        parts = {part for entry in self.packed.entries.values() for part in entry.parts}
        parts |= {f"{module}.bias" for module in together}
        work: list[tuple[str, Callable[[], Item]]] = [
            *((name, partial(self._layer, name)) for name in self.packed.entries if name not in together),
            *((name, partial(self._plain, name)) for name in names if name not in parts),
            *((each.name, partial(self._experts, each, names)) for each in fused),
        ]
        return sorted(work, key=lambda item: item[0])

    def _fused_parameters(self) -> list[Fused]:
        """What the target has of several linears in one tensor."""
        config = self.source.config()
        if self.codec is None:
            return gpt_oss_parameters(self.packed.entries) if config.get("model_type") == GPT_OSS else []
        reason = self.codec.refuses_model(config)
        if reason is not None:
            raise Unsupported(f"{self.source.path} cannot become {self.to}: {reason}; choose another format")
        return self.codec.fused(config, self.packed.entries)

    def finish(self, shards: Shards) -> int:
        """Index, configuration and companions beside the shards; the bytes of tensor data."""
        config = self.source.config()
        for key in ("quantization_config", "quantization"):
            config.pop(key, None)
        if self.codec is not None:
            if not self.layers:
                raise BadInput(f"{self.source.path}: no layer is left to be written as {self.to}")
            left = {self.head, *self.dense} - set(self.layers)
            config |= self.codec.settings(config) | self.codec.quantization(self.layers, sorted(left))
        else:
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        total = shards.finish()
        write_companions(shards.final, self.source)
        write_json(shards.final / "config.json", config)
        return total

    def _plain(self, name: str) -> Item:
        module, _, leaf = name.rpartition(".")
        if leaf in _KV_SCALES and self.to != self.packed.name:
            note = "scales of keys and values are left out: the target has them elsewhere or not at all"
            return Item(tensors={}, notes=(note,))
        value = self.source.tensor(name)
        if self.codec is not None and not self.codec.takes(module) and value.dim() == 3:
            raise Unsupported(f"{name} is dense, and {self.to} is for checkpoints whose experts are all quantized")
        matrix = leaf == "weight" and value.dim() == 2 and module != self.embeddings
        return Item(tensors={name: value}, dense=(module,) if matrix else ())

    def _layer(self, name: str) -> Item:
        found = self.packed.read(name)
        embedding = name == self.embeddings and self.to not in _KEEPS_EMBEDDINGS
        entry = self.packed.entries[name]
        if self.codec is None or embedding or not entry.tensor.endswith(".weight") or not self.codec.takes(name):
            value, converted = self._decoded(name, found)
            placed = self.codec is None or self.codec.takes(name)
            if not placed and converted.sqnr_db is not None and not self.requantize:
                raise Unsupported(
                    f"{name}: {self.to} has it dense, and {self.dtype} cannot hold its values. --dtype float32 keeps "
                    f"them, --requantize rounds them and states the error"
                )
            dense = () if name == self.embeddings else (name,)
            return Item(tensors={entry.tensor: value}, account=(converted,), dense=dense)
        written, converted, notes = self._fitted(name, found)
        tensors = {f"{name}.{suffix}": tensor for suffix, tensor in self.codec.encode(written).items()}
        return Item(tensors=tensors, account=(converted,), layers={name: written.layer}, notes=notes)

    def _experts(self, fused: Fused, names: list[str]) -> Item:
        if self.codec is None:
            account: list[Converted] = []

            def dense(module: str) -> Tensor:
                value, converted = self._decoded(module, self.packed.read(module))
                account.append(converted)
                return value

            found = Item(tensors={fused.name: fused.join(dense, transposed=True)}, account=tuple(account))
        else:
            fitted = {module: self._fitted(module, self.packed.read(module)) for module in fused.modules}
            encoded = {module: self.codec.encode(written) for module, (written, _, _) in fitted.items()}
            found = Item(
                tensors=self.codec.fuse(fused, encoded),
                account=tuple(converted for _, converted, _ in fitted.values()),
                layers={fused.name: fitted[fused.modules[0]][0].layer},
                notes=tuple(dict.fromkeys(note for _, _, notes in fitted.values() for note in notes)),
            )
        if bias_names(fused, set(names)):
            found.tensors[fused.bias] = fused.join(lambda module: self.source.tensor(f"{module}.bias"))
        return found

    def _decoded(self, name: str, found: Stored | StoredMix | Dense) -> tuple[Tensor, Converted]:
        value = found.dense()
        kept = value.to(self.dtype)
        if not bool(torch.isfinite(kept).all()):
            raise BadInput(f"{name}: values overflow {self.dtype}; choose --dtype bfloat16 or float32")
        return kept, Converted(
            name=name, before=_format_name(found), after=str(self.dtype).removeprefix("torch."), action="decoded",
            sqnr_db=_error(value, kept.float()),
        )  # fmt: skip

    def _fitted(self, name: str, found: Stored | StoredMix | Dense) -> tuple[Stored, Converted, tuple[str, ...]]:
        """(what the target can hold, its account, notes on what was left out)."""
        written, action, reason, error = self._fit(name, found)
        notes = ()
        if isinstance(found, Stored) and found.activations is not None and written.activations is None:
            notes = (f"activations are no longer rounded to {found.activations.name}",)
        return written, Converted(
            name=name, before=_format_name(found), after=written.format.name, action=action, reason=reason,
            sqnr_db=error,
        ), notes  # fmt: skip

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
        if fitting is not None:
            error = _error(found.dense(), fitting.dense())
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
        return new, "requantized", reason, _error(dense, new.dense())


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


def _error(before: Tensor, after: Tensor) -> float | None:
    """In decibels; None where the two are equal. JSON has no infinity, which a weight that became zero would be."""
    return None if torch.equal(before, after) else min(max(sqnr_db(before, after), -LARGEST_DB), LARGEST_DB)


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
