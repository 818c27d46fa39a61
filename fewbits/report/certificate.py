"""certificate.json as the report reads it: checked once, here, so that the rest can trust it.

A certificate may come from anyone's disk. Fields the page cannot do without are required, with their types;
whatever else is absent or malformed reads as "not recorded", and its section is left out.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fewbits.core.errors import BadInput

NAME = "certificate.json"
_MAX_BYTES = 512 << 20
_BINS_MAX = 4096
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Value:
    """mean ± stderr; stderr is None where one block gave no error bar."""

    mean: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Layer:
    name: str
    kind: str
    block: int
    format: str
    bits: float | None
    parameters: int
    error: float | None
    rtn_error: float | None
    sqnr_db: float | None
    of_outputs: bool
    notes: tuple[str, ...]
    block_loss: tuple[float, float] | None = None  # of the block's output, before and after learning


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """counts over edges (one more), and the grid's levels at the median scale."""

    name: str
    edges: tuple[float, ...]
    counts: tuple[float, ...]
    levels: tuple[float, ...]
    error: float | None


@dataclass(frozen=True, kw_only=True)
class Position:
    start: int
    end: int
    mean: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One evaluation."""

    what: str
    text: str
    text_hash: str
    method: str
    perplexity: Value | None
    reference_perplexity: Value | None = None
    kl: Value | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    top1: Value | None = None
    positions: tuple[Position, ...] = ()
    tokens: int | None = None
    sequence_length: int | None = None
    bytes: float | None = None
    bits_per_weight: float | None = None
    tokens_per_second: float | None = None

    @property
    def key(self) -> str:
        """What was measured: "original", "rtn" or a method's name, however the label spells it."""
        name = self.what.lower()
        return "rtn" if name == "round-to-nearest" else name


@dataclass(frozen=True, kw_only=True)
class Sample:
    prompt: str
    original: str
    quantized: str


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """raw: the JSON object, for the record at the end of the page."""

    raw: dict[str, Any]
    model: str
    scheme: str
    weights: str
    activations: str | None
    ignore: tuple[str, ...]
    method: str
    method_options: dict[str, Any]
    bytes: float
    source_bytes: float
    source_dtype: str
    bits_per_weight: float
    bits_per_weight_model: float | None
    layers: tuple[Layer, ...]
    actions: tuple[tuple[str, str, int, float], ...]  # (action, reason, tensors, bytes)
    distributions: tuple[Distribution, ...]
    fallbacks: tuple[str, ...]
    rows: tuple[Row, ...]
    samples: tuple[Sample, ...]
    native: bool

    @property
    def main(self) -> Row | None:
        """The evaluation the headline tells of: this method's, on the baseline's text if there is one."""
        own = [row for row in self.rows if row.kl and row.key == self.method.lower()]
        own = own or [row for row in self.rows if row.kl and row.key not in ("rtn", "original")]
        shared = [row for row in own if self.baseline_of(row)]
        return next(iter(reversed(shared or own)), None)

    def baseline_of(self, row: Row) -> Row | None:
        """Round-to-nearest on the same tokens, if measured and not the method itself."""
        if row.key == "rtn":
            return None
        same_text = (other for other in reversed(self.rows) if other.text_hash == row.text_hash)
        return next((other for other in same_text if other.key == "rtn" and other.kl), None)


def read_certificate(directory: Path) -> Certificate:
    """The certificate of a quantized `directory`; `BadInput` when it is missing or not a certificate."""
    path = directory / NAME
    if not path.is_file():
        raise BadInput(f"'{directory}' has no {NAME}; pass a directory that `fewbits quantize` wrote")
    if path.stat().st_size > _MAX_BYTES:
        raise BadInput(f"'{path}' has {path.stat().st_size} bytes: no certificate is that large")
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"'{path}' is not valid JSON ({error}); quantize again") from error
    if not isinstance(raw, dict):
        raise BadInput(f"'{path}' holds a {type(raw).__name__}, not an object; quantize again")
    return _certificate(raw, path)


def _certificate(raw: dict[str, Any], path: Path) -> Certificate:
    def need(section: str, key: str, check: Callable[[Any], T | None]) -> T:
        value = check(_object(raw.get(section)).get(key))
        if value is None:
            raise BadInput(f"'{path}' has no usable '{section}.{key}'; quantize again with this version of fewbits")
        return value

    if not isinstance(raw.get("layers"), list):
        raise BadInput(f"'{path}' has no list 'layers'; quantize again with this version of fewbits")
    size, source, scheme = _object(raw.get("size")), _object(raw.get("source")), _object(raw.get("scheme"))
    method = _object(raw.get("method"))
    return Certificate(
        raw=raw,
        model=Path(need("source", "path", text)).name or need("source", "path", text),
        scheme=need("scheme", "name", text),
        weights=text(scheme.get("weights")) or need("scheme", "name", text),
        activations=text(scheme.get("activations")),
        ignore=tuple(map(str, _list(scheme.get("ignore")))),
        method=need("method", "name", text),
        method_options={key: value for key, value in method.items() if key != "name"},
        bytes=need("size", "bytes", positive),
        # Sizes compare with 16-bit weights: a source may itself be a quantized file.
        source_bytes=positive(size.get("source_bytes_16bit")) or need("size", "source_bytes", positive),
        source_dtype="16-bit" if positive(size.get("source_bytes_16bit")) else text(source.get("dtype")) or "source",
        bits_per_weight=need("size", "bits_per_weight", positive),
        bits_per_weight_model=positive(size.get("bits_per_weight_model")),
        layers=_parsed(raw["layers"], _layer),
        actions=_actions(_list(raw.get("tensors"))),
        distributions=_parsed(_list(raw.get("distributions")), _distribution),
        fallbacks=tuple(map(str, _list(raw.get("fallbacks")))),
        rows=_parsed(_list(raw.get("evaluations")), _row),
        samples=_parsed(_list(raw.get("samples")), _sample),
        native=raw.get("checkpoint_format") == "fewbits",
    )


# ---- one entry at a time; None for what cannot be shown


def _layer(entry: dict[str, Any]) -> Layer | None:
    name, block = text(entry.get("name")), number(entry.get("block"))
    if name is None or block is None:
        return None
    return Layer(
        name=name,
        kind=text(entry.get("kind")) or name.rpartition(".")[2],
        block=int(block),
        format=(text(entry.get("format")) or "?") + _beside(_object(entry.get("residual"))),
        bits=positive(entry.get("bits")),
        parameters=int(number(entry.get("parameters")) or 0),
        error=number(entry.get("relative_error")),
        rtn_error=number(entry.get("rtn_relative_error")),
        sqnr_db=number(entry.get("weight_sqnr_db")),
        of_outputs=entry.get("error_of", "outputs") == "outputs",
        notes=tuple(map(str, _list(entry.get("notes")))),
        block_loss=_before_after(_object(entry.get("block_loss"))),
    )


def _beside(residual: dict[str, Any]) -> str:
    """What is named after a format where a residual goes beside the codes."""
    rank = number(residual.get("rank"))
    return "" if rank is None else f" + rank {rank:.0f}"


def _before_after(entry: dict[str, Any]) -> tuple[float, float] | None:
    before, after = positive(entry.get("before")), positive(entry.get("after"))
    return None if before is None or after is None else (before, after)


def _distribution(entry: dict[str, Any]) -> Distribution | None:
    edges, counts, levels = (_numbers(entry.get(key)) for key in ("edges", "counts", "levels"))
    rising = all(a < b for a, b in itertools.pairwise(edges))
    if not 1 <= len(counts) <= _BINS_MAX or len(edges) != len(counts) + 1 or not rising or len(levels) > 256:
        return None
    return Distribution(
        name=text(entry.get("name")) or "?",
        edges=edges,
        counts=counts,
        levels=levels,
        error=number(entry.get("relative_error")),
    )


def _row(entry: dict[str, Any]) -> Row | None:
    used, kl = _object(entry.get("text")), _object(entry.get("kl"))
    tokens, length = number(used.get("tokens")), number(used.get("sequence_length"))
    return Row(
        what=text(entry.get("what")) or text(entry.get("model")) or "model",
        perplexity=_value(entry.get("perplexity")),
        reference_perplexity=_value(entry.get("reference_perplexity")),
        kl=_value(entry.get("kl")),
        kl_median=number(kl.get("median")),
        kl_p99=number(kl.get("p99")),
        top1=_value(entry.get("top1")),
        positions=_parsed(_list(entry.get("kl_by_position")), _position),
        text=text(used.get("description")) or "a text that was not recorded",
        text_hash=text(used.get("sha256")) or "",
        tokens=None if tokens is None else int(tokens),
        sequence_length=None if length is None else int(length),
        method=text(entry.get("method")) or "",
        bytes=positive(entry.get("bytes")),
        bits_per_weight=positive(entry.get("bits_per_weight")),
        tokens_per_second=positive(entry.get("tokens_per_second")),
    )


def _position(entry: dict[str, Any]) -> Position | None:
    start, end, mean = (number(entry.get(key)) for key in ("start", "end", "mean"))
    if start is None or end is None or mean is None:
        return None
    return Position(start=int(start), end=int(end), mean=mean, stderr=number(entry.get("stderr")))


def _sample(entry: dict[str, Any]) -> Sample | None:
    texts = [entry.get(key) for key in ("prompt", "original", "quantized")]
    if not all(isinstance(value, str) for value in texts):
        return None
    return Sample(prompt=str(texts[0]), original=str(texts[1]), quantized=str(texts[2]))


def _value(entry: Any) -> Value | None:
    mean = number(_object(entry).get("mean"))
    return None if mean is None else Value(mean=mean, stderr=number(_object(entry).get("stderr")))


def _actions(tensors: list[Any]) -> tuple[tuple[str, str, int, float], ...]:
    """Tensors counted by what became of them and why."""
    totals: dict[tuple[str, str], list[float]] = {}
    for entry in map(_object, tensors):
        key = (text(entry.get("action")) or "?", text(entry.get("reason")) or "")
        count = totals.setdefault(key, [0, 0.0])
        count[0] += 1
        count[1] += number(entry.get("bytes")) or 0.0
    return tuple((*key, int(count), size) for key, (count, size) in totals.items())


# ---- JSON values by type


def _parsed(entries: Iterable[Any], parse: Callable[[dict[str, Any]], T | None]) -> tuple[T, ...]:
    parsed = (parse(entry) for entry in entries if isinstance(entry, dict))
    return tuple(entry for entry in parsed if entry is not None)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _numbers(value: Any) -> tuple[float, ...]:
    found = [number(item) for item in _list(value)]
    return () if None in found else tuple(item for item in found if item is not None)


def text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Past 1e300 an integer of JSON may not fit a float; nothing that large is a measurement.
    return float(value) if abs(value) < 1e300 and math.isfinite(value) else None


def positive(value: Any) -> float | None:
    found = number(value)
    return found if found is not None and found > 0 else None
