"""Outlier features and massive activations of a model: where they are, what rounding pays for them, what they carry.

Four questions of the literature, asked of any model on the user's own text:

1. *Are there emergent features?* LLM.int8() (Dettmers et al. 2022): one dimension at magnitude 6 or more in 6 % of the
   tokens of 25 % of the layers. Counted where the paper counts, in the inputs of attention and MLP, and in the residual
   stream; and once more with 6 times the token's rms for 6, since a model's scale is its own affair.
2. *Are there massive activations?* Sun et al. 2024: values above 100 and 1000 times the median, on the first token and
   on delimiters.
3. *Which dimensions carry the error of 8-bit activations?* The share that goes when one is kept in 16 bits, by layer;
   and how much is left with the k worst kept, on text that did not choose them, against k random ones.
4. *Does the model need them?* Perplexity and the probability of the first choice with those dimensions zeroed, against
   as many random ones; massive activations set to zero and to their mean, where they emerge.

Observed on calibration text, measured on held-out text. Without outlier features, the dimensions with the largest rms
stand in for them in 4, and the record says so.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.calibration.activations import watched
from fewbits.calibration.collect import Ref
from fewbits.calibration.data import TextSpec, TokenSet, pack, read_texts
from fewbits.core.errors import BadInput
from fewbits.core.progress import OnProgress, Progress
from fewbits.evaluation.activation_error import SCALINGS, InputError, error_without
from fewbits.evaluation.forward import Forward, check_ids
from fewbits.evaluation.observe import Observed, observe, reads_stream, stages_of, summary
from fewbits.evaluation.removal import Plan, massive_replaced, massive_spared, measured, zeroed
from fewbits.evaluation.studies.record import Record, record
from fewbits.models.topology import Topology, find_topology
from fewbits.models.walk import LinearRef, blocks
from fewbits.runtime.load import load

SAMPLES, SEQUENCE_LENGTH = 8, 256
KEPT = (0, 1, 2, 4, 8, 16, 32)  # dimensions kept exact
RANDOM_SETS = 5
RANDOM_TOKENS = 3  # draws beside massive activations
CURVE_WINDOWS = 4  # rounding anew for every set takes as long as the forward pass
SHOWN = 12  # dimensions of the heat maps
STAND_IN = 6  # dimensions zeroed when none is an outlier feature, as many as LLM.int8() found in a 6.7B model
SOURCES = (
    "Dettmers et al. 2022, LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, arXiv 2208.07339",
    "Sun et al. 2024, Massive Activations in Large Language Models, arXiv 2402.17762",
    "Puccetti et al. 2022, Outlier Dimensions that Disrupt Transformers Are Driven by Frequency, arXiv 2205.11380",
    "Chen et al. 2024, PrefixQuant: Eliminating Outliers by Prefixed Tokens, arXiv 2410.05265",
)


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """The model under study. stages: (block, linears that read one tensor); stream: linears that read the residual
    stream behind a norm."""

    name: str
    model: nn.Module
    tokenizer: Any
    topology: Topology | None
    body: Any
    stages: list[tuple[int, list[Ref]]]
    width: int

    @property
    def stream(self) -> list[Ref]:
        return [ref for _, members in self.stages for ref in members if reads_stream(ref, self.width)]


def study(
    model: Any = "demo",
    *,
    text: TextSpec = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Record:
    """The record of `model`: a path, "demo", a hub id, or the pair (model, tokenizer).

    text: a file, of which half the windows are observed and half measured; default the built-in splits. samples:
    windows of each; sequence_length: tokens a window. seed: chooses windows and random dimensions.
    """
    started = time.monotonic()
    say = on_progress or (lambda progress: None)
    subject = _subject(model)
    observing, measuring = _texts(subject, text, samples or SAMPLES, sequence_length or SEQUENCE_LENGTH, seed)
    seen = observe(
        subject.model, observing.ids, tokenizer=subject.tokenizer, topology=subject.topology, on_progress=say
    )
    errors = _errors(subject, observing.ids, say)
    results = {
        "texts": {"observed": observing.description, "measured": measuring.description},
        "observed": summary(seen, subject.tokenizer),
        "maps": {where: _map(seen, where) for where in ("hidden", "inputs")},
        "error": _error_account(errors),
        "curve": _curve(subject, measuring.ids[:CURVE_WINDOWS], _carriers(errors), seen, seed, say),
        "removal": _removal(subject, measuring.ids, seen, seed, say),
    }
    settings = {
        "model": subject.name,
        "observed_on": _text(observing),
        "measured_on": _text(measuring),
        "seed": seed,
        "error": f"absmax INT8, scales per token or per window; sets of channels on {CURVE_WINDOWS} held-out windows",
        "random_sets": RANDOM_SETS,
    }
    seconds = time.monotonic() - started
    return record("outliers", settings=settings, sources=SOURCES, results=results, seconds=seconds)


# ---- what was passed, made ready


def _subject(model: Any) -> _Subject:
    if isinstance(model, tuple):
        module, tokenizer = model
        name = getattr(module.config, "name_or_path", "") or type(module).__name__
    else:
        module, tokenizer = load(model, dtype=torch.float32)
        name = str(model)
    topology = find_topology(module.config.to_dict())
    body = module.base_model
    width = body.get_input_embeddings().weight.shape[1]
    with torch.inference_mode():
        stages = stages_of(body, blocks(module, topology), torch.zeros(1, 8, dtype=torch.int64), topology)
    subject = _Subject(
        name=name, model=module, tokenizer=tokenizer, topology=topology, body=body, stages=stages, width=width
    )
    if not subject.stream:
        raise BadInput(f"{name} has no dense linears behind its norms; pass the original of a quantized model")
    return subject


def _texts(
    subject: _Subject, text: TextSpec, samples: int, sequence_length: int, seed: int
) -> tuple[TokenSet, TokenSet]:
    """(windows to observe, windows to measure on)."""

    def packed(split: str, count: int) -> TokenSet:
        documents, description = read_texts(text, split=split)
        limit = getattr(subject.model.config, "max_position_embeddings", None)
        found = pack(
            documents,
            subject.tokenizer,
            sequence_length=sequence_length,
            samples=count,
            seed=seed,
            max_length=limit,
            description=description,
        )
        check_ids(found.ids, subject.body.get_input_embeddings().weight.shape[0], subject.name)
        return found

    if text is None:
        return packed("calibration", samples), packed("evaluation", samples)
    both = packed("evaluation", 2 * samples)
    first, second = (
        dataclasses.replace(
            both, ids=both.ids[half::2], description={**both.description, "samples": samples, "windows": which}
        )
        for half, which in enumerate(("even", "odd"))
    )
    return first, second


def _text(tokens: TokenSet) -> str:
    count, length = tokens.ids.shape
    return f"{tokens.description['description']}, {count} windows of {length} tokens, sha256 {tokens.sha256[:16]}"


# ---- where they are


def _map(seen: Observed, where: str) -> dict[str, Any]:
    """Absmax by place and dimension, of first tokens and of all others, for the dimensions that stand out most.

    A dimension stands out by its mean over places of absmax over the place's rms without the largest value.
    """
    places = seen.hidden if where == "hidden" else seen.read
    absmax = torch.stack([place.absmax for place in places])
    typical = absmax.median(dim=1, keepdim=True).values.clamp(min=torch.finfo(torch.float32).tiny)
    chosen = (absmax / typical).mean(dim=0).argsort(descending=True)[:SHOWN].tolist()
    return {
        "dimensions": chosen,
        "places": [{"name": place.name, "block": place.block, "kind": place.kind} for place in places],
        "first": [place.class_absmax[0, chosen].tolist() for place in places],
        "others": [place.class_absmax[1:, chosen].amax(dim=0).tolist() for place in places],
    }


# ---- what rounding pays for them


def _errors(subject: _Subject, ids: Tensor, say: OnProgress) -> list[InputError]:
    """The error of every input that a linear module reads, summed over the windows `ids`."""
    plain = [(block, members) for block, members in subject.stages if isinstance(members[0], LinearRef)]
    found = {
        members[0].name: InputError(
            name=members[0].name,
            block=block,
            kind=members[0].kind,
            residual=reads_stream(members[0], subject.width),
        )
        for block, members in plain
    }
    _watch(
        subject,
        ids,
        [members for _, members in plain],
        lambda name, x: found[name].add(x),
        lambda n: say(Progress("rounding", n, len(ids))),
    )
    return list(found.values())


def _watch(
    subject: _Subject,
    ids: Tensor,
    stages: Sequence[Sequence[Ref]],
    see: Callable[[str, Tensor], None],
    done: Callable[[int], None],
) -> None:
    """Sends `ids` through the body; see(name, rows [T, C]) for every stage and window."""
    with torch.inference_mode(), watched(stages, lambda name, x: see(name, x.reshape(-1, x.shape[-1]).float())):
        for window in range(len(ids)):
            subject.body(input_ids=ids[window : window + 1], use_cache=False)
            done(window + 1)


def _carriers(errors: Sequence[InputError]) -> dict[str, Tensor]:
    """Mean over the inputs behind norms of the share each dimension carries, by scaling."""
    return {
        scaling: torch.stack([each.carried(scaling) for each in errors if each.residual]).mean(dim=0)
        for scaling in SCALINGS
    }


def _error_account(errors: Sequence[InputError]) -> dict[str, Any]:
    means = _carriers(errors)
    read = [each for each in errors if each.residual]
    account: dict[str, Any] = {"places": [_place(each) for each in errors], "dimensions": {}}
    for scaling, mean in means.items():
        chosen = mean.argsort(descending=True)[:SHOWN].tolist()
        account["dimensions"][scaling] = {
            "dimensions": chosen,
            "mean": mean[chosen].tolist(),
            "by_place": [each.carried(scaling)[chosen].tolist() for each in read],
        }
    account["read"] = [{"name": each.name, "block": each.block, "kind": each.kind} for each in read]
    return account


def _place(each: InputError) -> dict[str, Any]:
    signal = each.signal or 1.0
    worst = {}
    for scaling in SCALINGS:
        carried = each.carried(scaling)
        dimension = int(carried.argmax())
        worst[scaling] = {"dimension": dimension, "carried": float(carried[dimension])}
    return {
        "name": each.name,
        "block": each.block,
        "kind": each.kind,
        "residual": each.residual,
        "error": {scaling: each.error[scaling] / signal for scaling in SCALINGS},
        "others": {scaling: error / (each.others_signal or 1.0) for scaling, error in each.others.items()},
        "worst": worst,
    }


def _curve(
    subject: _Subject, ids: Tensor, carriers: dict[str, Tensor], seen: Observed, seed: int, say: OnProgress
) -> dict[str, Any]:
    """Share of the error left with sets of dimensions kept exact: the worst, random ones, the outlier features."""
    stages = [
        members
        for _, members in subject.stages
        if isinstance(members[0], LinearRef) and reads_stream(members[0], subject.width)
    ]
    kept = [count for count in KEPT if count < subject.width]
    orders = [random.Random(seed + index).sample(range(subject.width), kept[-1]) for index in range(RANDOM_SETS)]
    features = {
        "magnitude": seen.outliers(),
        "relative": seen.outliers(relative=True),
    }
    grams = {members[0].name: _gram(members) for members in stages}
    sums: dict[tuple[str, str], Tensor] = {}
    sets: dict[str, list[Sequence[int]]] = {}
    for scaling in SCALINGS:
        worst = carriers[scaling].argsort(descending=True).tolist()
        sets[scaling] = [
            *(worst[:count] for count in kept),
            *features.values(),
            *(order[:count] for order in orders for count in kept),
        ]
    weighed = len(kept) + len(features)  # sets whose effect on the outputs is worth a product

    def see(name: str, x: Tensor) -> None:
        for scaling in SCALINGS:
            found = torch.tensor(
                [
                    error_without(x, chosen, scaling, grams[name] if index < weighed else None)
                    for index, chosen in enumerate(sets[scaling])
                ]
            )
            sums[name, scaling] = sums.get((name, scaling), 0) + found.double()

    _watch(subject, ids, stages, see, lambda n: say(Progress("sets of dimensions", n, len(ids))))
    result: dict[str, Any] = {"kept": kept, "features": features}
    for scaling in SCALINGS:
        left = torch.stack([sums[name, scaling] / sums[name, scaling][0] for name in grams]).mean(dim=0)
        drawn = left[weighed:, 0].reshape(RANDOM_SETS, len(kept))
        result[scaling] = {
            of: {
                "worst": left[: len(kept), index].tolist(),
                **dict(zip(features, left[len(kept) : weighed, index].tolist(), strict=True)),
            }
            for index, of in enumerate(("inputs", "outputs"))
        }
        result[scaling]["inputs"] |= {"random": drawn.mean(dim=0).tolist(), "random_std": drawn.std(dim=0).tolist()}
    return result


def _gram(members: Sequence[Ref]) -> Tensor:
    """W^T W [C, C] of the linears that read one input."""
    weight = torch.cat([ref.weight.float() for ref in members])
    return weight.T @ weight


# ---- what the model loses without them


def _removal(subject: _Subject, ids: Tensor, seen: Observed, seed: int, say: OnProgress) -> dict[str, Any]:
    forward = Forward(subject.model, subject.name)
    magnitude, relative = seen.outliers(), seen.outliers(relative=True)
    rms = torch.stack([place.mean_square / place.mean_square.mean() for place in seen.read]).mean(dim=0)
    largest = rms.argsort(descending=True)[: len(magnitude or relative) or min(STAND_IN, subject.width // 2)].tolist()
    chosen = {"magnitude": magnitude, "relative": relative, "largest": [] if magnitude or relative else largest}
    main = next(key for key, dimensions in chosen.items() if dimensions)
    dimensions = chosen[main]
    sets = {frozenset(found): key for key, found in reversed(chosen.items()) if found}  # each set once
    plans: list[Plan] = [
        (key, chosen[key], zeroed(subject.stream, chosen[key])) for key in chosen if key in sets.values()
    ]
    plans += [(f"only {dimension}", [dimension], zeroed(subject.stream, [dimension])) for dimension in dimensions[:6]]
    pool = [dimension for dimension in range(subject.width) if dimension not in {*magnitude, *relative, *largest}]
    for index in range(RANDOM_SETS):
        drawn = random.Random(seed + index).sample(pool, min(len(dimensions), len(pool)))
        plans.append(("random", drawn, zeroed(subject.stream, drawn)))
    plans += _massive_plans(subject, seen, seed)
    return {"main": main, **measured(forward, ids, plans, say)}


def _massive_plans(subject: _Subject, seen: Observed, seed: int) -> list[Plan]:
    """Massive activations set to zero, to their mean, and as many others of the same tokens set to zero.

    They emerge in the first block after which most windows have one; single values that reach the threshold elsewhere
    are left alone.
    """
    count = len(seen.ids)
    windows: dict[int, set[int]] = {}
    for each in seen.massive:
        windows.setdefault(each.block, set()).add(each.window)
    emerged = [number for number, members in windows.items() if number >= 0 and 2 * len(members) > count]
    if not emerged:
        return []
    first = min(emerged)
    values: dict[int, list[float]] = {}
    for each in seen.massive:
        if each.block == first:
            values.setdefault(each.dimension, []).append(each.value)
    dimensions = list(values)
    means = torch.zeros(subject.width)
    for dimension, members in values.items():
        means[dimension] = statistics.fmean(members)
    block = blocks(subject.model, subject.topology)[first][1]
    plans: list[Plan] = [
        ("massive zero", dimensions, massive_replaced(block, dimensions, torch.zeros(subject.width))),
        ("massive mean", dimensions, massive_replaced(block, dimensions, means)),
    ]
    pool = [dimension for dimension in range(subject.width) if dimension not in values]
    for index in range(RANDOM_TOKENS):
        chosen = random.Random(seed + index).sample(pool, min(len(dimensions), len(pool)))
        plans.append(("massive random", chosen, massive_spared(block, dimensions, chosen)))
    return plans
