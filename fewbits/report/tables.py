"""The tables of the report: certificate in, HTML out. Every text goes through `esc`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fewbits.core.units import bytes_text, duration_text
from fewbits.report.certificate import Certificate, Layer, Row, number
from fewbits.report.words import DASH, change, esc, percent, plus_minus

_MAX_LAYER_ROWS = 1000


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers_from: int = 1,
    numbers_to: int | None = None,
    marked: int | None = None,
) -> str:
    """A table that scrolls sideways when the page is narrow. Cells are HTML; heads are text.

    numbers_from: columns from here on, up to but not `numbers_to`, are right-aligned. marked: the row to set off.
    """
    marks = ("", ' class="num"')

    def cell(tag: str, index: int, content: str) -> str:
        number = numbers_from <= index < (len(heads) if numbers_to is None else numbers_to)
        return f"<{tag}{marks[number]}>{content}</{tag}>"

    head = "".join(cell("th", index, esc(name)) for index, name in enumerate(heads))
    body = "".join(
        ('<tr class="marked">' if number == marked else "<tr>")
        + "".join(cell("td", index, content) for index, content in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def accuracy(certificate: Certificate) -> str:
    """One line per model measured: the original, round-to-nearest, the method."""
    main = certificate.main
    order = {"original": 0, "rtn": 1}
    measured = sorted(certificate.rows, key=lambda row: order.get(row.key, 2))
    texts = list(dict.fromkeys(row.text_hash for row in measured))
    rows: list[list[str]] = []
    marked = None
    if main is not None and not any(row.key == "original" for row in measured):
        rows.append(_accuracy_row(certificate, _original(certificate, main), texts))
    for row in measured:
        if row is main:
            marked = len(rows)
        rows.append(_accuracy_row(certificate, row, texts))
    heads = [
        "Model",
        "Size",
        "Bits per weight",
        "Perplexity",
        "KL, nats per token",
        "KL median",
        "KL p99",
        "Same top token",
    ]
    if any(row.tokens_per_second for row in measured):
        heads.append("Tokens per second")
    else:
        rows = [row[:8] for row in rows]
    notes = []
    for index, used in enumerate(texts):
        note = _text_note(next(row for row in measured if row.text_hash == used))
        notes.append(f"Text {index + 1}: {note}" if len(texts) > 1 else note)
    if not rows:
        # Nothing was measured: the sizes are still worth a table.
        rows = [
            [
                esc(certificate.method.upper()),
                bytes_text(certificate.bytes),
                f"{certificate.bits_per_weight:.2f}",
            ]
        ]
        heads = heads[:3]
        notes = ["Accuracy was not measured: run `fewbits eval` with `--against` and `--certify`."]
    return table(heads, rows, marked=marked) + "".join(f'<p class="note">{esc(note)}</p>' for note in notes)


def _original(certificate: Certificate, main: Row) -> Row:
    """The original as the reference pass of `main` measured it."""
    return Row(
        what="original",
        perplexity=main.reference_perplexity,
        text=main.text,
        text_hash=main.text_hash,
        method=main.method,
    )


def _accuracy_row(certificate: Certificate, row: Row, texts: Sequence[str]) -> list[str]:
    what = row.key
    size, bits = row.bytes, row.bits_per_weight
    if what == certificate.method.lower():
        size, bits = size or certificate.bytes, bits or certificate.bits_per_weight
    label = {"original": f"Original, {certificate.source_dtype}", "rtn": "Round-to-nearest"}.get(what, row.what.upper())
    if what == "original":
        size = size or certificate.source_bytes
    if len(texts) > 1:
        label += f", text {texts.index(row.text_hash) + 1}"
    return [
        esc(label),
        _size(size, certificate.source_bytes) if size else DASH,
        f"{bits:.2f}" if bits else DASH,
        plus_minus(row.perplexity),
        plus_minus(row.kl, 4),
        DASH if row.kl_median is None else f"{row.kl_median:.4f}",
        DASH if row.kl_p99 is None else f"{row.kl_p99:.3f}",
        plus_minus(row.top1, 1, 100, " %"),
        f"{row.tokens_per_second:.1f}" if row.tokens_per_second else DASH,
    ]


def _size(size: float, whole: float) -> str:
    share = min(100.0, 100 * size / whole)
    return f'<span class="bar" style="--share:{share:.1f}%">{esc(bytes_text(size))}</span>'


def _text_note(row: Row) -> str:
    parts = [row.text]
    if row.tokens:
        parts.append(f"{row.tokens:,} tokens")
    if row.sequence_length:
        parts.append(f"windows of {row.sequence_length}")
    return f"Measured on {', '.join(parts)}. {row.method[:1].upper()}{row.method[1:]}".rstrip(". ") + "."


def formats(certificate: Certificate) -> str:
    """How many layers and weights went into each format."""
    groups: dict[str, list[Layer]] = {}
    for layer in certificate.layers:
        groups.setdefault(layer.format, []).append(layer)
    rows = []
    for name, layers in groups.items():
        parameters = sum(layer.parameters for layer in layers)
        known = [layer for layer in layers if layer.bits is not None and layer.parameters]
        weights = sum(layer.parameters for layer in known)
        bits = sum((layer.bits or 0.0) * layer.parameters for layer in known) / weights if weights else None
        rows.append(
            [
                f"<code>{esc(name)}</code>",
                f"{len(layers):,}",
                f"{parameters:,}",
                f"{bits:.3f}" if bits else DASH,
            ]
        )
    return table(["Format", "Layers", "Weights", "Bits per weight"], rows)


def layers(certificate: Certificate) -> str:
    """Every layer, worst first."""
    ordered = sorted(certificate.layers, key=lambda layer: -(layer.error if layer.error is not None else -1.0))
    rows = [
        [
            f"<code>{esc(layer.name)}</code>"
            + "".join(f'<br><span class="warn">{esc(note)}</span>' for note in layer.notes),
            f"<code>{esc(layer.format)}</code>",
            DASH if layer.error is None else percent(layer.error),
            DASH if layer.rtn_error is None else percent(layer.rtn_error),
            DASH if layer.sqnr_db is None else f"{layer.sqnr_db:.1f} dB",
        ]
        for layer in ordered[:_MAX_LAYER_ROWS]
    ]
    shown = table(["Layer", "Format", "Error", "Round-to-nearest", "Weight SQNR"], rows, numbers_from=2)
    left = len(ordered) - len(rows)
    rest = f'<p class="note">{left:,} more layers, with smaller errors, are in the certificate.</p>' if left else ""
    summary = f"All {len(ordered):,} layers, worst first"
    return f"<details><summary>{summary}</summary>{shown}{rest}</details>"


def learned(certificate: Certificate) -> str:
    """What learning did for each block's output; nothing for methods that learn nothing."""
    losses = {layer.block: layer.block_loss for layer in certificate.layers if layer.block_loss is not None}
    rows = [
        [str(block), percent(before), percent(after), change(after / before)]
        for block, (before, after) in sorted(losses.items())
    ]
    return table(["Block", "Before", "After", "Change"], rows) if rows else ""


def account(certificate: Certificate) -> str:
    """What became of the source's tensors."""
    rows = [
        [f"{esc(action)}", esc(reason) or DASH, f"{count:,}", esc(bytes_text(size)) if size else DASH]
        for action, reason, count, size in certificate.actions
    ]
    return table(["Tensors", "Why", "Count", "Bytes in the source"], rows, numbers_from=2) if rows else ""


def record(certificate: Certificate) -> str:
    """What a reader needs to repeat the run."""
    raw = certificate.raw
    environment = _object(raw.get("environment"))
    versions = _object(environment.get("versions"))
    calibration, source = _object(raw.get("calibration")), _object(raw.get("source"))
    seconds, memory = number(raw.get("seconds")), number(raw.get("peak_rss_bytes"))
    used = " · ".join(
        f"{calibration[key]} {label}"
        for key, label in (("samples", "samples"), ("sequence_length", "tokens each"))
        if calibration.get(key) is not None
    )
    entries = [
        ("Command", _code(raw.get("command"))),
        ("Created", _plain(raw.get("created"))),
        ("Machine", _plain(", ".join(str(v) for v in (environment.get("cpu"), _cores(environment)) if v))),
        ("Platform", _plain(environment.get("platform"))),
        ("Versions", _plain(", ".join(f"{name} {version}" for name, version in versions.items()))),
        ("Source", _plain(source.get("path"))),
        ("Source identity", _code(source.get("identity"))),
        ("Method", _plain(_options(certificate))),
        ("Kept in full", _plain(", ".join(certificate.ignore))),
        ("Calibration", _plain(calibration.get("description"))),
        ("", _plain(used)),
        ("Calibration seed", _plain(calibration.get("seed"))),
        ("Calibration sha256", _code(calibration.get("sha256"))),
        ("Evaluation sha256", _code(certificate.main.text_hash if certificate.main else None)),
        ("Time", _plain(None if seconds is None else duration_text(seconds))),
        ("Peak memory", _plain(None if memory is None else bytes_text(memory))),
    ]
    return "<dl>" + "".join(f"<dt>{esc(name)}</dt><dd>{value}</dd>" for name, value in entries if value) + "</dl>"


def _options(certificate: Certificate) -> str:
    options = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in _flat(certificate.method_options).items()
        if value is not None
    ]
    return f"{certificate.method} ({', '.join(options)})" if options else certificate.method


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options side by side: {"search": {"steps": 20}} -> {"search steps": 20}."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _cores(environment: dict[str, Any]) -> str | None:
    cores = environment.get("cores")
    return None if cores is None else f"{cores} cores"


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _plain(value: Any) -> str:
    return "" if value is None or value == "" else esc(value)


def _code(value: Any) -> str:
    return "" if value is None or value == "" else f"<code>{esc(value)}</code>"
