"""The page of `fewbits study bits`: which bit-width is best per total bit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from fewbits.report import bits_figures as figures
from fewbits.report.bits_figures import Results, bits_text, block_label, type_label
from fewbits.report.html import tile
from fewbits.report.study import Part, StudyPage
from fewbits.report.tables import table
from fewbits.report.words import DASH, MINUS, esc


def page(record: dict[str, Any]) -> StudyPage:
    results, settings = record["results"], record["settings"]
    sizes, points = results["sizes"], results["points"]
    several = len({(p["model"], p["depth"]) for p in sizes}) > 1
    parts = [
        Part(
            key="types",
            title="Data types",
            lead=f"{_largest(results)}, blocks of {block_label(results['grid']['base_block'])}. On the right the base "
            "type is the line at zero; below it a type loses less at as many bits. The base type's zero points cost "
            "a little storage that the others save.",
            draw=lambda canvas, wide: figures.data_types(canvas, wide, results),
            heights=(4.4, 8.2),
            description="KL divergence of each data type by bits, and relative to the base type",
        ),
        Part(
            key="blocks",
            title="Block sizes",
            lead=f"{_largest(results)}, {type_label(results['grid']['base_type'])}. Left: along a curve blocks shrink "
            "from left to right. Right: what a stored bit buys when it goes into smaller blocks, and when it goes into "
            "wider codes. A mark above the dashed line says that smaller blocks are the better buy.",
            draw=lambda canvas, wide: figures.block_sizes(canvas, wide, results),
            heights=(4.6, 9.0),
            description="KL divergence against bits per weight by block size, and halvings of the KL per stored bit",
        ),
        Part(
            key="pareto",
            title="What a weight should cost",
            lead=f"Every format on {_largest(results, inside=True)}. The line joins the formats that nothing as cheap "
            "betters.",
            draw=lambda canvas, wide: figures.pareto(canvas, wide, results),
            heights=(4.4, 5.6),
            description="KL divergence against bits per weight of every format",
            table=_widths(results),
        ),
    ]
    if several:
        parts.insert(0, _scaling(results, settings))
    if results["truncations"]:
        parts.append(_truncations(results))
    return StudyPage(
        title="Which bit-width is best per total bit",
        verdict=_verdict(results, several),
        chips=(
            f"{len(sizes)} {'sizes' if len(sizes) > 1 else 'size'}",
            f"{len({p['format'] for p in points})} formats",
            f"{len(points)} evaluations",
            settings["windows"].split(",")[0].replace(" of ", " windows of ", 1),
        ),
        tiles=_tiles(results, several),
        parts=parts,
    )


def _scaling(results: Results, settings: Mapping[str, Any]) -> Part:
    truncated = bool(results["truncations"])
    caveat = (
        " The smaller sizes are truncations that nobody trained on: they are worse than models made at their size, "
        "which counts in favour of keeping blocks and giving up bits."
        if truncated
        else ""
    )
    return Part(
        key="scaling",
        title="Quality against total bits",
        lead=f"One curve for each bit-width ({settings['base']}), one mark for each size. At a given number of bits "
        f"the lowest curve is the best bit-width. Embeddings and norms count 16 bits each.{caveat}",
        draw=lambda canvas, wide: figures.scaling(canvas, wide, results),
        heights=(4.8, 8.8),
        description="Negative log-likelihood against the bits of the model and of its blocks, a curve per bit-width",
        table=_pairs(results) + _front(results),
    )


def _truncations(results: Results) -> Part:
    trained = results["trained"]
    return Part(
        key="truncations",
        title="How far a truncated model is a small model",
        lead="Left: unquantized. Models trained at their size follow a power law of their parameters (Kaplan et al. "
        f"2020: exponent {trained['exponent']}); blocks left out of a trained model cost far more. Right: the same "
        "comparison at equal bits had every size been trained as it is, with what quantization adds to the largest "
        f"one: an estimate, by which {_either(trained['as_good'])} bits are best. Bit-widths far above are left out.",
        draw=lambda canvas, wide: figures.truncations(canvas, wide, results),
        heights=(4.2, 7.8),
        description="Likelihood of the unquantized model by the blocks left, and of bit-widths by a power law",
    )


# ---- words


def _largest(results: Results, inside: bool = False) -> str:
    size = _size(results, results["largest"])
    text = f"{short(size['model'])} with all its {size['of']} blocks"
    return text if inside else text[0].upper() + text[1:]


def short(name: str) -> str:
    """The last part of a path: what a reader calls the model."""
    return name.rstrip("/").rpartition("/")[2] or name


def _size(results: Results, key: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(size for size in results["sizes"] if size["key"] == key)
    return found


def _verdict(results: Results, several: bool) -> str:
    said = []
    best = results["best"]["total_bits"]
    if several and best["bits"] is not None:
        against = [
            f"{_nats(best[side], sign)} ahead of {width}"
            for side, sign, width in (("below", 1, _below(results, best)), ("above", -1, _above(results, best)))
            if best[side]
        ]
        sure = "" if best["sure"] else ", within the error"
        said.append(f"Per total bit, {best['bits']} bits are best: at equal bits {' and '.join(against)}{sure}.")
        inside = results["best"]["block_bits"]["bits"]
        if inside is not None and inside != best["bits"]:
            said.append(f"Counting the blocks alone, {inside} bits are.")
        if results["trained"]:
            said[0] = f"Of one model with blocks left out: {said[0][0].lower()}{said[0][1:]}"
            estimate = _either(results["trained"]["as_good"])
            said.append(f"Had smaller ones been trained at their size, an estimate says {estimate}.")
    elif several:
        said.append("The sizes are too far apart for two bit-widths to meet at equal bits.")
    said.append(_blocks_said(results))
    said.append(_types_said(results))
    return " ".join(part for part in said if part)


def _below(results: Results, best: Mapping[str, Any]) -> int | None:
    return next((p["low"] for p in results["equal_bits"]["total_bits"] if p["high"] == best["bits"]), None)


def _above(results: Results, best: Mapping[str, Any]) -> int | None:
    return next((p["high"] for p in results["equal_bits"]["total_bits"] if p["low"] == best["bits"]), None)


def _nats(gap: Mapping[str, Any], sign: int = 1) -> str:
    error = "" if gap["stderr"] is None else f" ± {gap['stderr']:.2f}"
    return f"{sign * gap['mean']:.2f}{error} nats".replace("-", MINUS)


def _better_blocks(results: Results, block: str) -> list[int]:
    """Bit-widths at which the next smaller block buys surely more per stored bit than another bit does."""
    found = []
    for entry in results["blocks"]:
        if entry["block"] != block or not entry["smaller"] or not entry["wider"]:
            continue
        one, other = entry["smaller"]["per_bit"], entry["wider"]["per_bit"]
        if None in (one["mean"], other["mean"], one["stderr"], other["stderr"]):
            continue
        if one["mean"] - other["mean"] > 2 * (one["stderr"] ** 2 + other["stderr"] ** 2) ** 0.5:
            found.append(entry["bits"])
    return found


def _blocks_said(results: Results) -> str:
    """Per step from a block to the next smaller: where it is a better buy than wider codes."""
    blocks = results["grid"]["blocks"]
    said = []
    for finer, block in itertools.pairwise(blocks):
        if not any(e["block"] == block and e["smaller"] and e["wider"] for e in results["blocks"]):
            continue
        widths = _better_blocks(results, block)
        step = f"from {_blocks_of(block)} to {_blocks_of(finer)}"
        said.append(f"{step} at {_listed(widths)} bits" if widths else f"{step} at no bit-width")
    if not said:
        return ""
    return f"Smaller blocks buy more per stored bit than wider codes do {'; '.join(reversed(said))}."


def _blocks_of(block: str) -> str:
    return {"channel": "rows", "tensor": "tensors"}.get(block, f"blocks of {block}")


def _types_said(results: Results) -> str:
    """The data types that lose least at 3 and 4 bits, or the fewest there are."""
    widths = sorted({entry["bits"] for entry in results["types"]})
    shown = [bits for bits in (3, 4) if bits in widths] or widths[:1]
    if len({entry["type"] for entry in results["types"]}) < 2:
        return ""
    first = [f"{_best_type(results, bits)['format']} at {bits} bits" for bits in shown]
    return f"Of the data types, {' and '.join(first)} {'lose' if len(first) > 1 else 'loses'} least."


def _best_type(results: Results, bits: int) -> Mapping[str, Any]:
    found: Mapping[str, Any] = min(
        (entry for entry in results["types"] if entry["bits"] == bits), key=lambda entry: entry["kl"]["mean"]
    )
    return found


def _listed(values: Sequence[int], last: str = "and") -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" {last} " + words[-1]


def _either(values: Sequence[int]) -> str:
    return _listed(values, "or")


# ---- tiles and tables


def _tiles(results: Results, several: bool) -> list[str]:
    tiles = []
    for measure, name in (("total_bits", "Bits of the model"), ("block_bits", "Bits of its blocks")):
        best = results["best"][measure]
        if several and best["bits"] is not None:
            ahead = [sign * best[side]["mean"] for side, sign in (("below", 1), ("above", -1)) if best[side]]
            note = f"{min(ahead):.2f} nats ahead of its nearest neighbour at equal bits."
            tiles.append(tile(name, str(best["bits"]), "bits", note if best["sure"] else f"{note} Within the error."))
    for entry in results["widths"]:
        if entry["bits"] == 4:
            note = f"nats per token added by {entry['format']}, the best at 4 bits; KL {entry['kl']['mean']:.3f}."
            tiles.append(tile("4 bits cost", plus_minus_of(entry["added_nll"]), "", note))
    entry = next((e for e in results["blocks"] if e["bits"] == 4 and e["block"] == results["grid"]["base_block"]), None)
    if entry and entry["smaller"] and entry["wider"]:
        one, other = entry["smaller"]["per_bit"]["mean"], entry["wider"]["per_bit"]["mean"]
        note = f"halvings of the KL per stored bit, from 4 bits to {entry['smaller']['to']}; wider codes {other:.2f}."
        tiles.append(tile("Smaller blocks buy", f"{one:.2f}".replace("-", MINUS), "", note))
    return tiles


def plus_minus_of(value: Mapping[str, Any], digits: int = 3) -> str:
    """HTML of an estimate of a record."""
    error = "" if value.get("stderr") is None else f' <span class="pm">± {value["stderr"]:.{digits}f}</span>'
    return f"{value['mean']:.{digits}f}".replace("-", MINUS) + error


def _pairs(results: Results) -> str:
    rows = []
    for model, blocks in zip(results["equal_bits"]["total_bits"], results["equal_bits"]["block_bits"], strict=True):
        cells = []
        for pair in (model, blocks):
            gap = pair["difference"]
            reach = DASH if gap is None else f"{bits_text(pair['from'])} to {bits_text(pair['to'])}"
            cells += [reach, DASH if gap is None else plus_minus_of(gap, 2)]
        rows.append([f"{model['low']} against {model['high']}", *cells])
    heads = ["Bits", "Model", "NLL, fewer less more", "Blocks", "NLL, fewer less more"]
    note = (
        "Neighbouring bit-widths where both reach the same number of bits, in nats per token. Above zero, more bits "
        "in a smaller model are better; below, fewer bits in a larger one. Paired by window."
    )
    return table(heads, rows) + f'<p class="note">{note}</p>'


def _front(results: Results) -> str:
    names = {size["model"] for size in results["sizes"]}
    rows = [
        [
            (f"{esc(short(point['model']))}, " if len(names) > 1 else "") + f"{point['depth']} blocks",
            str(point["bits"]),
            bits_text(point["total_bits"]),
            bits_text(point["block_bits"]),
            plus_minus_of(point["nll"], 2),
        ]
        for point in results["front"]["total_bits"]
    ]
    note = "What to choose as the budget grows: each is the best of all that cost no more."
    heads = ["Size", "Bits", "Model", "Blocks", "NLL"]
    return table(heads, rows) + f'<p class="note">{note}</p>'


def _widths(results: Results) -> str:
    rows = [
        [
            str(entry["bits"]),
            esc(entry["format"]),
            f"{entry['bits_per_weight']:.2f}",
            bits_text(entry["total_bits"]),
            plus_minus_of(entry["kl"], 4),
            plus_minus_of(entry["added_nll"]),
            plus_minus_of({key: _percent(value) for key, value in entry["top1"].items()}, 1) + " %",
        ]
        for entry in results["widths"]
    ]
    heads = ["Bits", "Best format", "Bits per weight", "Model", "KL", "NLL added", "Same likeliest token"]
    return table(heads, rows) + '<p class="note">The format of least KL at each bit-width.</p>'


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
