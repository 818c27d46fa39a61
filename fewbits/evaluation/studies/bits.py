"""How many bits a weight should have when the bits of the whole model are what counts.

    total bits = sum over quantized linears of numel * bits per weight   (codes, scales, zero points)
               + 16 * everything else                                    (embeddings, norms, biases)

A fixed number of bits buys a large model with few bits per weight or a small one with many. Dettmers and
Zettlemoyer (2022) quantize models of several sizes to 3 ... 16 bits, round-to-nearest in absmax blocks with 16-bit
scales, no calibration, and plot quality against total bits, one curve per bit-width. Where the curve of b bits lies
lowest, b bits are best: 4 for nearly every family from 19M to 176B parameters. Smaller blocks and better data types
lift the curves of few bits and do nothing from 6 bits on.

Here the same grid over the models that are passed, or over one model and truncations of it (depth.py), quantized in
memory and put back bit for bit. Quality is the negative log-likelihood of held-out text, comparable across sizes,
and the KL divergence from the unquantized model of the same size.

Two totals are given: of the model, and of its blocks alone. The smaller a model, the more of it is embedding table,
which stays at 16 bits and pulls all bit-widths together.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.calibration.data import TextSpec
from fewbits.core.errors import BadInput, Unsupported, unknown
from fewbits.core.progress import OnProgress, Progress
from fewbits.evaluation.evaluate import Model, Opened, Scores, opened, score, windows
from fewbits.evaluation.forward import Forward, check_ids
from fewbits.evaluation.reference import Reference
from fewbits.evaluation.studies import depth as depths_of
from fewbits.evaluation.studies.bits_analysis import analyse
from fewbits.evaluation.studies.bits_grid import BITS, BLOCK_SIZES, TYPES_SHOWN, Cell, Grid, grid_of
from fewbits.evaluation.studies.record import Record, record
from fewbits.metrics import block_estimate, perplexity
from fewbits.metrics.result import divergence
from fewbits.models.topology import find_topology
from fewbits.models.walk import Ref, blocks, linears

SAMPLES, SEQUENCE_LENGTH = 8, 96
COMPARED_DRAWS = 3  # random truncations, unquantized, beside those by importance
SOURCES = (
    "Dettmers and Zettlemoyer 2022, The case for 4-bit precision: k-bit inference scaling laws, arXiv 2212.09720",
    "Men et al. 2024, ShortGPT: Layers in large language models are more redundant than you expect, arXiv 2403.03853",
    "Kaplan et al. 2020, Scaling laws for neural language models, arXiv 2001.08361",
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model to quantize: the blocks `kept` of `model`. draw: which random truncation, 0 where there is one."""

    model: str
    depth: int
    kept: tuple[int, ...]
    draw: int = 0

    @property
    def key(self) -> str:
        return f"{self.model}/{self.depth}" + (f"/{self.draw}" if self.draw else "")


class Subject:
    """A loaded model, its blocks and matrices, and the weights to put back."""

    def __init__(self, loaded: Opened) -> None:
        self.name, self.model, self.tokenizer = loaded.name, loaded.model, loaded.tokenizer
        config: Any = getattr(loaded.model, "config", None)
        topology = find_topology(config.to_dict()) if config is not None else None
        self.blocks = [block for _, block in blocks(loaded.model, topology)]
        self.refs: list[list[Ref]] = [linears(block, topology) for block in self.blocks]
        if not any(self.refs):
            raise Unsupported(f"{self.name}: no linear in its blocks to quantize; pass the original, unquantized model")
        self.forward = Forward(loaded.model, loaded.name)
        self._tuples: bool | None = None

    def smaller(self, size: Size) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has the blocks of `size` only."""
        if len(size.kept) == len(self.blocks):
            return contextlib.nullcontext()
        if self._tuples is None:
            self._tuples = depths_of.returns_tuples(self.forward, self.blocks[0])
        return depths_of.truncated(self.blocks, size.kept, self._tuples)

    @contextlib.contextmanager
    def quantized(self, cell: Cell, size: Size) -> Iterator[None]:
        """Inside, the linears of `size` hold what `cell`'s format makes of them; afterwards their old values."""
        before: list[tuple[Ref, Tensor]] = []
        try:
            for index in size.kept:
                for ref in self.refs[index]:
                    weight = ref.weight.clone()
                    before.append((ref, weight))
                    name = f"{self.name}: block {index}, {ref.name}"
                    ref.write(cell.format.quantize(weight, name).dequantize(weight.dtype))
            yield
        finally:
            for ref, weight in before:
                ref.write(weight)

    def count(self, size: Size, cell: Cell | None = None) -> dict[str, int]:
        """Bits of the model `size` and of its blocks; all at 16 bits without a cell."""
        inside = sum(p.numel() for index in size.kept for p in self.blocks[index].parameters())
        everywhere = sum(p.numel() for p in self.model.parameters())  # tied tensors once
        outside = everywhere - sum(p.numel() for block in self.blocks for p in block.parameters())
        saved = 0
        if cell is not None:
            for ref in (ref for index in size.kept for ref in self.refs[index]):
                count = ref.shape[0] * ref.shape[1]
                saved += 16 * count - round(cell.format.bits_per_weight(ref.shape) * count)
        return {"total_bits": 16 * (inside + outside) - saved, "block_bits": 16 * inside - saved}

    def bits_per_weight(self, size: Size, cell: Cell) -> float:
        refs = [ref for index in size.kept for ref in self.refs[index]]
        counts = [ref.shape[0] * ref.shape[1] for ref in refs]
        bits = sum(cell.format.bits_per_weight(ref.shape) * n for ref, n in zip(refs, counts, strict=True))
        return bits / sum(counts)


@dataclass(frozen=True, kw_only=True)
class _Options:
    grid: Grid
    depths: tuple[int, ...] | None
    truncate: str
    draws: int
    text: TextSpec
    samples: int | None
    sequence_length: int | None
    seed: int


def study(
    models: Sequence[Model] = ("demo",),
    *,
    bits: Sequence[int] = BITS,
    types: Sequence[str] = TYPES_SHOWN,
    block_sizes: Sequence[str] = BLOCK_SIZES,
    formats: Sequence[str] = (),
    depths: Sequence[int] | None = None,
    truncate: str = "importance",
    draws: int | None = None,
    text: TextSpec = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    full: bool = False,
    on_progress: OnProgress | None = None,
) -> Record:
    """The record: every cell of the grid on every size, and what is best per total bit.

    models: paths, "demo" or hub ids, or pairs (model, tokenizer); several must share a tokenizer.
    bits, types, block_sizes: the grid. The first type with the block nearest 64 is measured on all sizes; the other
    types and blocks on the largest only, unless `full`. formats: further formats by name, on the largest.
    depths: blocks kept, of a single model; by default all, 0.9, 0.8 and two thirds. truncate: which blocks go,
    "importance" or "random" (then `draws` truncations of each depth, 3 by default).
    text, samples, sequence_length, seed: as for `evaluate`; 8 windows of 96 tokens by default.
    """
    started = time.monotonic()
    if not models:
        raise BadInput("no model; name one or more, such as demo")
    if truncate not in depths_of.TRUNCATIONS:
        raise unknown("truncation", truncate, depths_of.TRUNCATIONS)
    if depths is not None and len(models) > 1:
        raise BadInput(f"depths are of one model, and {len(models)} are named; leave --depths out or name one model")
    draws = draws if draws is not None else 3 if truncate == "random" else 1
    if draws < 1 or (truncate == "importance" and draws != 1):
        raise BadInput(f"draws {draws}: truncating at random takes 1 or more, by importance there is only one")
    options = _Options(
        grid=grid_of(bits, types, block_sizes, formats, full=full),
        depths=None if depths is None else tuple(depths),
        truncate=truncate,
        draws=draws,
        text=text,
        samples=SAMPLES if samples is None else samples,
        sequence_length=SEQUENCE_LENGTH if sequence_length is None else sequence_length,
        seed=seed,
    )
    found: dict[str, Any] = {"sizes": [], "points": [], "truncations": []}
    used: dict[str, Any] = {}
    for number, model in enumerate(models):
        part = _one(model, options, number, len(models), used, on_progress)
        for key, values in part.items():
            found[key] += values
        gc.collect()
    settings = {
        "models": [size["model"] for size in found["sizes"] if size["depth"] == size["of"]],
        "method": "round-to-nearest by block absmax or min-max, no calibration; scales 16 bits; linears of the blocks",
        "base": f"{options.grid.base_type}, block {options.grid.base_block}",
        "truncation": f"by {truncate}" if len(models) == 1 else "none",
        "windows": f"{used['samples']} of {used['sequence_length']} tokens, {used['description']}",
        "windows_sha256": used["sha256"],
        "seed": seed,
    }
    found |= {"grid": options.grid.described()} | analyse(found, options.grid)
    seconds = time.monotonic() - started
    return record("bits", settings=settings, sources=SOURCES, results=found, seconds=seconds)


def _one(
    model: Model, options: _Options, number: int, of: int, used: dict[str, Any], on_progress: OnProgress | None
) -> dict[str, list[dict[str, Any]]]:
    """Sizes, points and truncations of one model."""
    with opened(model) as loaded:
        subject = Subject(loaded)
        tokens = windows(loaded, options.text, options.samples, options.sequence_length, options.seed)
        check_ids(tokens.ids, subject.forward.vocabulary, subject.name)
        if used and used["sha256"] != tokens.sha256:
            raise BadInput(
                f"{subject.name} cuts the text into other tokens than the models before it, and likelihoods of "
                "different tokens cannot be compared; name models that share a tokenizer"
            )
        used.update(tokens.description)
        sizes, compared = _sizes(subject, options, single=of == 1, loaded=loaded)
        work = [(size, options.grid.cells(largest=size.depth == len(subject.blocks))) for size in sizes]
        total = sum(size.depth * (1 + len(cells)) for size, cells in work) + sum(size.depth for size in compared)
        stage, done = "blocks evaluated" if of == 1 else f"model {number + 1}/{of}, blocks evaluated", 0

        def tell(size: Size, what: str) -> None:
            nonlocal done
            done += size.depth
            if on_progress:
                on_progress(Progress(stage, done, total, f"{what}, {size.depth} blocks"))

        found: dict[str, list[dict[str, Any]]] = {"sizes": [], "points": [], "truncations": []}
        for size, cells in work:
            with subject.smaller(size), Reference(subject.forward, subject.tokenizer, tokens) as reference:
                found["sizes"].append(_described(subject, size, reference.nll))
                tell(size, "unquantized")
                for cell in cells:
                    with subject.quantized(cell, size):
                        scores = score(subject.forward, tokens.ids, reference)
                    found["points"].append(_point(subject, size, cell, scores))
                    tell(size, cell.format.name)
        if len(sizes) > 1:
            found["truncations"] = [
                {"how": options.truncate, "depth": each["depth"], "draw": each["draw"], "nll": each["nll"]}
                for each in found["sizes"]
            ]
        for size in compared:
            with subject.smaller(size):
                nll = score(subject.forward, tokens.ids).nll
            found["truncations"].append(
                {"how": "random", "depth": size.depth, "draw": size.draw, "nll": block_estimate(nll).to_dict()}
            )
            tell(size, "unquantized, random")
        return found


def _sizes(subject: Subject, options: _Options, *, single: bool, loaded: Opened) -> tuple[list[Size], list[Size]]:
    """The sizes to quantize, largest first, and random ones to compare truncations by importance with."""
    count = len(subject.blocks)
    everything = (count,) if not single else depths_of.default_depths(count)
    found = depths_of.check_depths(options.depths or everything, count, subject.name)

    def size(order: Sequence[int], depth: int, draw: int) -> Size:
        return Size(model=subject.name, depth=depth, kept=depths_of.kept(order, count, depth), draw=draw)

    drawn = [depths_of.by_chance(count, options.seed, draw) for draw in range(max(options.draws, COMPARED_DRAWS))]
    if options.truncate == "random":
        return [size(drawn[d], n, d) for n in found for d in range(options.draws if n < count else 1)], []
    if found == (count,):
        return [size([], count, 0)], []
    tokens = windows(loaded, None, None, options.sequence_length, options.seed, split="calibration")
    values = depths_of.importances(subject.forward, subject.blocks, tokens.ids[: options.samples])
    order = depths_of.by_importance(values)
    random = [size(drawn[d], n, d) for n in found if n < count for d in range(COMPARED_DRAWS)]
    return [size(order, n, 0) for n in found], random


def _described(subject: Subject, size: Size, nll: Tensor) -> dict[str, Any]:
    parameters = {key.replace("bits", "parameters"): bits // 16 for key, bits in subject.count(size).items()}
    return {
        "key": size.key,
        "model": size.model,
        "depth": size.depth,
        "of": len(subject.blocks),
        "draw": size.draw,
        "kept": list(size.kept),
        **parameters,
        **subject.count(size),
        "nll": block_estimate(nll).to_dict(),
        "perplexity": perplexity(block_estimate(nll)).to_dict(),
        "nll_by_window": _by_window(nll),
    }


def _point(subject: Subject, size: Size, cell: Cell, scores: Scores) -> dict[str, Any]:
    nll = block_estimate(scores.nll)
    return {
        "size": size.key,
        "depth": size.depth,
        "draw": size.draw,
        "format": cell.format.name,
        "type": cell.type,
        "bits": cell.bits,
        "block": cell.block,
        "bits_per_weight": subject.bits_per_weight(size, cell),
        **subject.count(size, cell),
        "nll": nll.to_dict(),
        "perplexity": perplexity(nll).to_dict(),
        "kl": divergence(scores.kl).to_dict(),
        "top1": block_estimate(scores.top1).to_dict(),
        "nll_by_window": _by_window(scores.nll),
        "kl_by_window": _by_window(scores.kl),
    }


def _by_window(values: torch.Tensor) -> list[float]:
    """Means by window: what differences between two formats are paired by."""
    return [float(f"{value:.7g}") for value in values.double().mean(1).tolist()]
