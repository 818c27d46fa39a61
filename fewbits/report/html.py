"""The report: one HTML page that answers "what did I lose?" from the certificate of a checkpoint.

Self-contained: style and figures are in the page, nothing is fetched, nothing runs. It can be mailed,
archived beside the weights, or opened from a disk ten years on. Whatever the certificate says is escaped;
whatever it does not say is left out rather than guessed.
"""

from __future__ import annotations

import importlib.resources
import itertools
import os
from pathlib import Path

from fewbits.core.errors import BadInput
from fewbits.core.record import atomic_path
from fewbits.core.units import bytes_text
from fewbits.report import choice, plots, rounding, tables
from fewbits.report.certificate import Certificate, Row, Sample, read_certificate
from fewbits.report.loading import ways_to_load
from fewbits.report.words import TIMES, change, esc, plus_minus

NAME = "report.html"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # enforced by the browser: nothing runs or is fetched


def write_report(directory: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Writes the page for the quantized checkpoint in `directory` and returns its path.

    out: the file to write; `directory`/report.html by default. Raises `BadInput` when there is no usable
    certificate or `out` cannot be written, `MissingExtra` without matplotlib.
    """
    directory = Path(directory)
    certificate = read_certificate(directory)
    target = directory / NAME if out is None else Path(out)
    if target.is_dir():
        raise BadInput(f"'{target}' is a directory; name the file to write, such as '{target / NAME}'")
    if not target.parent.is_dir():
        raise BadInput(f"no directory '{target.parent}' to write the report to; make it first")
    text = page(certificate, directory)
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def page(certificate: Certificate, directory: Path) -> str:
    """The whole document."""
    sections = [
        section("Size and accuracy", "", tables.accuracy(certificate)),
        section(
            "How the method was chosen",
            choice.lead(certificate),
            choice.chart(certificate),
            choice.candidates(certificate),
        ),
        section("Error by layer", _error_lead(certificate), plots.error_by_layer(certificate)),
        section(
            "Error by type of layer",
            "The mean over the blocks. The number after the error is the change from round-to-nearest."
            if any(layer.rtn_error for layer in certificate.layers) and certificate.method.lower() != "rtn"
            else "The mean over the blocks.",
            plots.error_by_kind(certificate),
            tables.layers(certificate) if certificate.layers else "",
        ),
        section("What rounding the inputs costs", rounding.lead(certificate), rounding.layers(certificate)),
        section(
            "Learned blocks",
            "How far each block's output is from the original's, as a share of its square and the mean over tokens, on "
            "calibration text: with the codes of the solver, and with what was learned. On other text less is gained.",
            tables.learned(certificate),
        ),
        section(
            "Bits by layer",
            "What one weight takes, its share of scales and zero points included.",
            plots.bits_by_layer(certificate),
            tables.formats(certificate) if certificate.layers else "",
        ),
        section(
            "The worst layers' weights",
            "How many weights take which value, on a logarithmic scale; the lines are the values that the "
            "format can express at the median scale of the layer. Where groups have scales of their own, "
            "weights beyond the outer lines are reached with larger ones.",
            plots.distributions(certificate),
        ),
        section(
            "KL divergence by position",
            "Mean over the windows, with a band of one standard error. A rise to the right would mean that "
            "the error grows as the context does.",
            plots.kl_by_position(_compared(certificate)),
        ),
        section("Completions side by side", _SAMPLES_LEAD, "".join(map(_sample, certificate.samples))),
        section("Notes", "", _notes(certificate)),
        section("Loading it", "", ways_to_load(certificate, directory)),
        section("Where every tensor went", "", tables.account(certificate)),
        section("Record", "What it takes to repeat the run.", tables.record(certificate)),
    ]
    title = f"{certificate.model} in {certificate.bits_per_weight:.2f} bits"
    made = f"Made by fewbits {esc(certificate.raw.get('fewbits', ''))} from certificate.json."
    return document(title, _header(certificate), "".join(sections), made)


def document(title: str, header: str, sections: str, footer: str) -> str:
    """A self-contained page in the style of all our pages. `title` is text, the rest HTML."""
    style = importlib.resources.files("fewbits.report").joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{esc(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{header}\n<main>\n{sections}</main>\n"
        f"<footer>{footer}</footer>\n"
        "</body>\n</html>\n"
    )


def section(title: str, lead: str, *parts: str) -> str:
    """A titled section, or nothing when it has no content."""
    content = "".join(parts)
    if not content:
        return ""
    lead = f'<p class="lead">{esc(lead)}</p>' if lead else ""
    return f"<section>\n<h2>{esc(title)}</h2>\n{lead}{content}\n</section>\n"


# ---- the top of the page


def _header(certificate: Certificate) -> str:
    weights = certificate.weights
    if certificate.activations:
        weights += f", activations {certificate.activations}"
    facts = [certificate.scheme] if certificate.scheme != certificate.weights else []
    facts += [weights, certificate.method.upper()]
    chips = "".join(f"<li>{esc(fact)}</li>" for fact in facts)
    return (
        f'<header>\n<p class="brand">fewbits report</p>\n<h1>{esc(certificate.model)}</h1>\n'
        f'<ul class="chips">{chips}</ul>\n<p class="verdict">{_verdict(certificate)}</p>\n'
        f'<div class="tiles">{"".join(_tiles(certificate))}</div>\n</header>'
    )


def _verdict(certificate: Certificate) -> str:
    """What was lost, in words."""
    smaller = certificate.source_bytes / certificate.bytes
    original = f"the {esc(certificate.source_dtype)} original"
    size = f"{bytes_text(certificate.bytes)}, {smaller:.1f} times smaller than {original}"
    main = certificate.main
    if main is None or main.kl is None:
        return f"<b>{size}.</b> What it lost was not measured."
    sentences = [f"<b>{size}.</b>"]
    if main.top1:
        sentences.append(f"It picks the original's next token {100 * main.top1.mean:.1f} % of the time.")
    baseline = certificate.baseline_of(main)
    if baseline and baseline.kl and baseline.kl.mean > 0 and certificate.method.lower() != "rtn":
        ratio = main.kl.mean / baseline.kl.mean
        less = f"{100 * (1 - ratio):.0f} % less than" if ratio < 1 else f"{100 * (ratio - 1):.0f} % more than"
        sentences.append(f"Its predictions diverge {less} those of plain rounding to nearest.")
    return " ".join(sentences)


def _tiles(certificate: Certificate) -> list[str]:
    bits = f"{certificate.bits_per_weight:.2f} bits per quantized weight"
    if certificate.bits_per_weight_model:
        bits += f", {certificate.bits_per_weight_model:.2f} over the whole model"
    smaller = certificate.source_bytes / certificate.bytes
    sizes = f"{bytes_text(certificate.source_bytes)} → {bytes_text(certificate.bytes)}"
    tiles = [tile("Size", f"{smaller:.1f}{TIMES}", "smaller", f"{sizes}. {bits}.")]
    main = certificate.main
    if main is None or main.kl is None:
        return tiles
    baseline = certificate.baseline_of(main)
    rest = f"Round-to-nearest: {baseline.kl.mean:.3f}. " if baseline and baseline.kl else ""
    tiles.append(tile("KL divergence", plus_minus(main.kl, 3), "", f"{rest}Nats per token, 0 is no loss."))
    if main.perplexity and main.reference_perplexity:
        moved = change(main.perplexity.mean / main.reference_perplexity.mean, 1)
        from_to = f"{main.reference_perplexity.mean:.2f} → {main.perplexity.mean:.2f}"
        tiles.append(tile("Perplexity", esc(moved), "", f"{from_to}."))
    if main.top1:
        rest = f"Round-to-nearest: {100 * baseline.top1.mean:.1f} %." if baseline and baseline.top1 else ""
        tiles.append(tile("Same top token", plus_minus(main.top1, 1, 100, " %"), "", rest))
    return tiles


def tile(name: str, figure: str, unit: str, note: str) -> str:
    """figure is HTML, the rest text."""
    small = f" <small>{esc(unit)}</small>" if unit else ""
    return f'<div class="tile"><h3>{esc(name)}</h3><p class="figure-text">{figure}{small}</p><p>{esc(note)}</p></div>'


# ---- smaller pieces


def _error_lead(certificate: Certificate) -> str:
    outputs = any(layer.of_outputs for layer in certificate.layers)
    what = "its outputs on the calibration text" if outputs else "its weights"
    return f"The share of the energy of {what} that quantization changed: ‖Δ‖² / ‖·‖², lower is better."


def _compared(certificate: Certificate) -> list[Row]:
    """The headline's evaluation and its baseline: curves are comparable on the same tokens only."""
    main = certificate.main
    if main is None:
        return []
    baseline = certificate.baseline_of(main)
    return [row for row in (baseline, main) if row is not None]


_SAMPLES_LEAD = "Greedy: at each step the most likely token. Marked from the first word that differs."


def _sample(sample: Sample) -> str:
    pairs = zip(sample.original, sample.quantized, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    same = sample.original == sample.quantized
    if not same:
        shared = sample.original.rfind(" ", 0, shared) + 1  # whole words are marked

    def text(value: str) -> str:
        rest = value[shared:]
        return esc(value[:shared]) + (f"<mark>{esc(rest)}</mark>" if rest and not same else "")

    verdict = '<p class="same">Word for word the same.</p>' if same else ""
    return (
        f'<article class="sample"><p class="prompt">{esc(sample.prompt)}</p><div class="pair">'
        f"<div><h4>Original</h4><p>{text(sample.original)}</p></div>"
        f"<div><h4>Quantized</h4><p>{text(sample.quantized)}</p></div></div>{verdict}</article>"
    )


def _notes(certificate: Certificate) -> str:
    if not certificate.fallbacks:
        return "<p>No fallback was needed: every layer was quantized as asked.</p>"
    items = "".join(f"<li>{esc(note)}</li>" for note in certificate.fallbacks)
    return f'<ul class="notes">{items}</ul>'
