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

gpt-oss's experts are read one by one; where the target is gpt-oss's own layout (mxfp4, dense) they are put together.

Memory is two shards and the temporaries of one layer. Shards go into a hidden directory beside the output, which is
renamed when it is complete: there is never half an output. A killed run continues after its last whole shard
(shards.py); GGUF, which is one file, is written anew.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from fewbits.checkpoints.base import Source, read_json
from fewbits.checkpoints.codecs import CODECS, QuantizedModules, quantized_modules
from fewbits.checkpoints.gguf_codec import NAME as GGUF
from fewbits.checkpoints.gguf_codec import gguf_modules
from fewbits.checkpoints.gguf_source import GGUFSource
from fewbits.checkpoints.source import DemoSource, open_source
from fewbits.core.errors import BadInput, FewbitsError, unknown
from fewbits.core.progress import OnProgress, Progress
from fewbits.core.record import environment, versions, write_json
from fewbits.pipeline import convert_gguf
from fewbits.pipeline.convert_layers import DENSE, LARGEST_DB, Converted, LayerConversion
from fewbits.pipeline.journal import check_output
from fewbits.pipeline.output import check_companions
from fewbits.pipeline.shards import Shards

SHARD_BYTES = 512 << 20
RECORD = "conversion.json"


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

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Conversion:
        """The inverse of `to_dict`; other keys are passed over."""
        fields = {field.name: record[field.name] for field in dataclasses.fields(cls)}
        layers = tuple(Converted(**layer) for layer in record["layers"])
        return cls(**{**fields, "layers": layers, "notes": tuple(record["notes"])})


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
    restart: bool = False,
    progress: OnProgress = lambda event: None,
    shard_bytes: int = SHARD_BYTES,
) -> Conversion:
    """Writes the quantized checkpoint `model` as `to` into the new directory `out`.

    dtype: of what becomes dense; default: the source's own. A run that was interrupted continues when it is repeated
    (restart: begins anew) and refuses to with another source or other arguments; a finished `out` is never replaced.
    BadInput, before anything is in place, for a layer that `to` cannot hold unless `requantize`.
    """
    if to not in targets():
        raise unknown("checkpoint format to convert to", to, targets())
    target, began = Path(out), time.monotonic()
    if not (target / RECORD).is_file():
        check_output(target)
    source = open_source(model, allow_quantized=True)
    from_gguf = isinstance(source, GGUFSource) and not isinstance(source, DemoSource)
    packed = gguf_modules(source) if from_gguf else quantized_modules(source)
    if packed.name is None or not packed.entries:
        raise BadInput(f"{source.path}: nothing in it is quantized; `fewbits quantize` makes a quantized model of it")
    if to != GGUF:
        check_companions(source)
    dtype = dtype or source.dtype
    shards = Shards(
        target.absolute(),
        {
            "conversion": versions().get("fewbits", "unknown"),
            "source": source.identity,
            "to": to,
            "requantize": requantize,
            "dtype": str(dtype),
            "shard_bytes": shard_bytes,
        },
        shard_bytes,
    )
    record = read_json(target / RECORD) if (target / RECORD).is_file() else {}
    before = record.get("fingerprint")
    if before == shards.fingerprint:
        shards.discard()  # what a run that was killed after its last rename left
        progress(Progress("done", 1, 1, f"{target} is already complete"))
        return Conversion.from_dict(record)
    check_output(target, before, shards.fingerprint)
    with shards.open(restart=restart):
        try:
            conversion = _write(source, packed, to, target, shards, requantize, dtype, began, progress)
        except BadInput:
            shards.discard()  # the input itself is at fault: nothing here could be continued
            raise
        except OSError as error:
            raise FewbitsError(
                f"{target}: {error.strerror or error}; whole shards are kept, repeat the command to continue"
            ) from error
    return conversion


def _write(
    source: Source, packed: QuantizedModules, to: str, target: Path, shards: Shards, requantize: bool,
    dtype: torch.dtype, began: float, progress: OnProgress,
) -> Conversion:  # fmt: skip
    if to == GGUF:
        shutil.rmtree(shards.final, ignore_errors=True)
        shards.final.mkdir()
        outcomes, notes, total = convert_gguf.write(
            source, packed, shards.final, target.name, requantize=requantize, dtype=dtype, progress=progress
        )
        account = [_of_gguf(each) for each in outcomes]
    else:
        run = LayerConversion(source, packed, to, requantize, dtype)
        run.run(shards, progress)
        total = run.finish(shards)
        account, notes = run.account, list(run.notes)
    conversion = Conversion(
        source=source.path, format=str(packed.name), to=to, out=str(target), layers=tuple(account), notes=tuple(notes),
        seconds=time.monotonic() - began, bytes=total,
    )  # fmt: skip
    record = {**conversion.to_dict(), "fingerprint": shards.fingerprint, "environment": environment()}
    write_json(shards.final / RECORD, record)
    shards.publish()
    return conversion


def _of_gguf(each: convert_gguf.Outcome) -> Converted:
    action, error = ("lossless", None) if each.sqnr_db is None else ("requantized", max(each.sqnr_db, -LARGEST_DB))
    return Converted(
        name=each.name, before=each.before, after=each.after, action=action, reason=each.reason, sqnr_db=error
    )
