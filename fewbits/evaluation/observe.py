"""What flows through a model on a text: the channels, tokens and positions that hold large values, in one pass.

Two kinds of places are watched, and they are not the same:

    hidden   the residual stream: the embeddings and what leaves every block. Nobody multiplies it by a weight;
             the norm of the next block reads it first.
    inputs   what linears read, and what an 8-bit product would have to round. Behind a norm (q, k, v; gate, up)
             they number their channels as the residual stream does, so that "the same dimension in many layers"
             makes sense; inputs of o_proj and down_proj number theirs block by block.

Outlier features are LLM.int8()'s (Dettmers et al. 2022, arXiv 2208.07339; `calibration.activations`), looked for
among the inputs behind norms, as in the paper, and in the stream: at magnitude 6, and at 6 times the token's rms.

Massive activations are those of Sun et al. 2024 (arXiv 2402.17762): single values of the residual stream above 100 and
above 1000 times the median magnitude of its layer and window. They found them on the first token and on the first
delimiter, in one or two dimensions; so tokens come in three classes: the first of a window, delimiters (punctuation
that ends a clause, line breaks, special tokens), and the others.

Memory is O(channels) a place; no activation is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.calibration.activations import (
    LAYER_SHARE,
    THRESHOLD,
    TOKEN_SHARE,
    ChannelStats,
    outlier_dimensions,
    watched,
)
from fewbits.calibration.collect import Ref, input_stages
from fewbits.core.progress import OnProgress, Progress
from fewbits.models.topology import Topology
from fewbits.models.walk import blocks, linears

CLASSES = ("first", "delimiter", "other")
MASSIVE, MASSIVE_RATIO = 100.0, 1000.0
LISTED = 64  # massive values kept of one layer and window
_DELIMITERS = frozenset(".,;:!?")
_WRITERS = ("o_proj", "out_proj", "down_proj", "fc2")  # their inputs are not numbered as the residual stream
_PROBE_TOKENS = 8


class Place(ChannelStats):
    """Statistics of one place. block: the block it is in, or -1 for the embeddings; kind: "hidden" or a linear's.

    class_absmax [3, channels]: the largest magnitude among first tokens, delimiters and others.
    low, high [channels]: smallest and largest value. residual: whether channels are those of the residual stream.
    """

    def __init__(self, name: str, block: int, kind: str, channels: int, *, residual: bool = True) -> None:
        super().__init__(channels)
        self.name, self.block, self.kind, self.residual = name, block, kind, residual
        self.class_absmax = torch.zeros(len(CLASSES), channels)
        self.low, self.high = torch.zeros(channels), torch.zeros(channels)
        self.medians: list[float] = []

    def see(self, x: Tensor, classes: Tensor) -> None:
        """Adds activations [1, T, channels], or rows [n, channels]; `classes` [T] are those of the window's tokens."""
        self.add(x)
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        self.low = torch.minimum(self.low, rows.amin(dim=0).cpu())
        self.high = torch.maximum(self.high, rows.amax(dim=0).cpu())
        self.medians.append(float(rows.abs().median()))
        if len(rows) != len(classes):
            return  # rows of experts: which token each belongs to is not known here
        for number in range(len(CLASSES)):
            chosen = rows[(classes == number).to(rows.device)]
            if len(chosen):
                largest = torch.maximum(self.class_absmax[number], chosen.abs().amax(dim=0).cpu())
                self.class_absmax[number] = largest

    @property
    def median(self) -> float:
        """The median magnitude, averaged over windows."""
        return sum(self.medians) / max(len(self.medians), 1)

    @property
    def rms(self) -> float:
        return float(self.mean_square.mean().sqrt())


@dataclass(frozen=True, kw_only=True)
class Massive:
    """One massive activation: `value` at `dimension` of token `token` (its id), in `block`'s output."""

    block: int
    window: int
    position: int
    dimension: int
    token: int
    value: float
    ratio: float  # of the magnitude to the median

    @property
    def where(self) -> tuple[int, int]:
        return self.window, self.position


@dataclass(kw_only=True)
class Observed:
    """What `observe` saw. hidden: the embeddings, then every block's output; inputs: by block, in order of use."""

    ids: Tensor  # int64 [windows, length]
    classes: Tensor  # int64 [windows, length], indices into CLASSES
    hidden: list[Place] = field(default_factory=list)
    inputs: list[Place] = field(default_factory=list)
    massive: list[Massive] = field(default_factory=list)

    @property
    def read(self) -> list[Place]:
        """The inputs whose channels are the residual stream's."""
        return [place for place in self.inputs if place.residual]

    def outliers(self, where: str = "inputs", *, relative: bool = False) -> list[int]:
        """The outlier features of the "inputs" behind norms or of the "hidden" states, strongest first."""
        return outlier_dimensions(self.read if where == "inputs" else self.hidden, relative=relative)


def observe(
    model: nn.Module,
    ids: Tensor,
    *,
    tokenizer: Any = None,
    topology: Topology | None = None,
    on_progress: OnProgress | None = None,
) -> Observed:
    """Runs the body of `model`, in eval mode, once over the windows `ids` [windows, length] and says what it saw.

    tokenizer: to tell delimiters; without it every token but the first is "other". topology: the family's table, to
    find the blocks; without it they are looked for. Raises FewbitsError naming the place of a NaN or an infinity.
    """
    body: Any = getattr(model, "base_model", None) or model
    device = next(model.parameters()).device
    classes = token_classes(ids, tokenizer)
    observed = Observed(ids=ids, classes=classes)
    found = blocks(model, topology)
    with torch.inference_mode():
        stages = stages_of(body, found, ids[:1, :_PROBE_TOKENS].to(device), topology)
        run = _Pass(observed, found, stages, body.get_input_embeddings().weight.shape[1])
        with run.opened():
            for window in range(len(ids)):
                run.window = window
                body(input_ids=ids[window : window + 1].to(device), use_cache=False)
                if on_progress is not None:
                    on_progress(Progress("observe", window + 1, len(ids)))
    for place in (*observed.hidden, *observed.inputs):
        place.check(place.name)
    return observed


def token_classes(ids: Tensor, tokenizer: Any = None) -> Tensor:
    """Index into CLASSES of every token of `ids` [windows, length]."""
    classes = torch.full_like(ids, CLASSES.index("other"))
    if tokenizer is not None:
        special = set(getattr(tokenizer, "all_special_ids", ()))
        delimiters = [token for token in ids.unique().tolist() if token in special or _delimits(tokenizer, token)]
        classes[torch.isin(ids, torch.tensor(delimiters, dtype=ids.dtype))] = CLASSES.index("delimiter")
    classes[:, 0] = CLASSES.index("first")
    return classes


def _delimits(tokenizer: Any, token: int) -> bool:
    text = tokenizer.decode([token]).strip(" \t")
    return bool(text) and (text in _DELIMITERS or not text.strip("\r\n"))


def stages_of(
    body: Any, found: Sequence[tuple[str, nn.Module]], probe: Tensor, topology: Topology | None
) -> list[tuple[int, list[Ref]]]:
    """(block, linears that receive one tensor), all with their names in the model.

    body: a model without its head. probe: ids [1, T] to send through it. topology: of the family, or None.
    """
    named: list[Ref] = []
    owner: dict[str, int] = {}
    for number, (prefix, block) in enumerate(found):
        for ref in linears(block, topology):
            name = f"{prefix}.{ref.name}"
            named.append(dataclasses.replace(ref, name=name))
            owner[name] = number
    stages = input_stages(named, lambda: body(input_ids=probe, use_cache=False))
    return [(owner[members[0].name], members) for members in stages]


class _Pass:
    """The hooks of one pass; `window` is the one under way."""

    def __init__(
        self,
        observed: Observed,
        found: Sequence[tuple[str, nn.Module]],
        stages: list[tuple[int, list[Ref]]],
        width: int,
    ) -> None:
        self.observed, self.found, self.stages, self.window = observed, found, stages, 0
        self.places: dict[str, Place] = {}
        for block, members in stages:
            head = members[0]
            residual = reads_stream(head, width)
            self.places[head.name] = Place(head.name, block, head.kind, head.shape[1], residual=residual)
        observed.inputs.extend(self.places.values())

    def opened(self) -> contextlib.ExitStack:
        """A context in which the hooks are in place."""
        stack = contextlib.ExitStack()
        stack.enter_context(watched([members for _, members in self.stages], self._input))
        first = self.found[0][1].register_forward_pre_hook(self._embeddings, with_kwargs=True)
        stack.callback(first.remove)
        for number, (name, block) in enumerate(self.found):
            stack.callback(block.register_forward_hook(self._output(number, name)).remove)
        return stack

    def _input(self, name: str, x: Tensor) -> None:
        self.places[name].see(x, self.observed.classes[self.window])

    def _embeddings(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden(-1, "embeddings", args[0] if args else kwargs["hidden_states"])

    def _output(self, number: int, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._hidden(number, name, output[0] if isinstance(output, tuple) else output)

        return hook

    def _hidden(self, block: int, name: str, x: Tensor) -> None:
        index = block + 1
        if index == len(self.observed.hidden):
            self.observed.hidden.append(Place(name, block, "hidden", x.shape[-1]))
        place = self.observed.hidden[index]
        place.see(x, self.observed.classes[self.window])
        self.observed.massive += massive_values(block, self.window, self.observed.ids[self.window], x[0], place)


def reads_stream(ref: Ref, width: int) -> bool:
    """Whether the channels that `ref` reads are those of a residual stream of `width`."""
    return ref.kind not in _WRITERS and ref.shape[1] == width


def massive_values(block: int, window: int, ids: Tensor, x: Tensor, place: Place) -> list[Massive]:
    """The massive activations among hidden states [T, channels] of a window of `ids` [T] that `place` has just seen."""
    x, median = x.float(), max(place.medians[-1], torch.finfo(torch.float32).tiny)
    magnitude = x.abs()
    large = (magnitude > max(MASSIVE, MASSIVE_RATIO * median)).nonzero()
    order = magnitude[large[:, 0], large[:, 1]].argsort(descending=True)[:LISTED]
    return [
        Massive(
            block=block,
            window=window,
            position=position,
            dimension=dimension,
            token=int(ids[position]),
            value=float(x[position, dimension]),
            ratio=abs(float(x[position, dimension])) / median,
        )
        for position, dimension in large[order].tolist()
    ]


# ---- what was seen, in JSON


def summary(observed: Observed, tokenizer: Any = None, *, top: int = 8) -> dict[str, Any]:
    """JSON-ready account of `observed`; of every place its `top` largest channels. tokenizer: to show tokens."""
    return {
        "windows": observed.ids.shape[0],
        "sequence_length": observed.ids.shape[1],
        "tokens": observed.ids.numel(),
        "classes": {name: int((observed.classes == index).sum()) for index, name in enumerate(CLASSES)},
        "hidden": [_place(place, top) for place in observed.hidden],
        "inputs": [_place(place, top) for place in observed.inputs],
        "outliers": {
            "threshold": THRESHOLD,
            "token_share": TOKEN_SHARE,
            "layer_share": LAYER_SHARE,
            "relative_to": "rms of the token",
            **{
                f"{where}{'_relative' if relative else ''}": outlier_features(observed, where, relative=relative)
                for where in ("inputs", "hidden")
                for relative in (False, True)
            },
        },
        "massive": {
            "magnitude": MASSIVE,
            "ratio": MASSIVE_RATIO,
            "found": massive_activations(observed, tokenizer),
        },
    }


def outlier_features(observed: Observed, where: str = "inputs", *, relative: bool = False) -> list[dict[str, Any]]:
    """The outlier features, strongest first: shares of layers and tokens, range of values."""
    places = observed.read if where == "inputs" else observed.hidden
    found = observed.outliers(where, relative=relative)
    shares = torch.stack([place.relative_share if relative else place.large_share for place in places])
    return [
        {
            "dimension": dimension,
            "layers": float((shares[:, dimension] >= TOKEN_SHARE).double().mean()),
            "tokens": float(shares[:, dimension].mean()),
            "absmax": max(float(place.absmax[dimension]) for place in places),
            "low": min(float(place.low[dimension]) for place in places),
            "high": max(float(place.high[dimension]) for place in places),
        }
        for dimension in found
    ]


def massive_activations(observed: Observed, tokenizer: Any = None) -> list[dict[str, Any]]:
    """Massive activations by dimension and token, largest first: in which blocks, how large, how often.

    The first token of every window is one entry, whatever token it is. `windows` counts windows that have any.
    """
    groups: dict[tuple[int, int | None], list[Massive]] = {}
    for each in observed.massive:
        groups.setdefault((each.dimension, each.token if each.position else None), []).append(each)
    entries = []
    for (dimension, token), members in groups.items():
        largest = max(members, key=lambda each: abs(each.value))
        text = None if token is None or tokenizer is None else tokenizer.decode([token])
        entries.append(
            {
                "dimension": dimension,
                "class": CLASSES[int(observed.classes[largest.where])],
                "token": token,
                "text": text,
                "blocks": sorted({each.block for each in members}),
                "windows": len({each.window for each in members}),
                "value": largest.value,
                "ratio": largest.ratio,
            }
        )
    return sorted(entries, key=lambda entry: -abs(entry["value"]))


def _place(place: Place, top: int) -> dict[str, Any]:
    largest = place.absmax.argsort(descending=True)[:top].tolist()
    of_classes = place.class_absmax.amax(dim=1).tolist() if len(place.positions) else [None] * len(CLASSES)
    return {
        "name": place.name,
        "block": place.block,
        "kind": place.kind,
        "channels": len(place.absmax),
        "residual": place.residual,
        "tokens": place.tokens,
        "median": place.median,
        "rms": place.rms,
        "absmax": float(place.absmax.max()),
        "absmax_of": dict(zip(CLASSES, of_classes, strict=True)),
        "large_channels": int((place.large_share >= TOKEN_SHARE).sum()),
        "relative_channels": int((place.relative_share >= TOKEN_SHARE).sum()),
        "top": [
            {
                "dimension": channel,
                "absmax": float(place.absmax[channel]),
                "rms": float(place.mean_square[channel].sqrt()),
                "tokens": float(place.large_share[channel]),
                "tokens_relative": float(place.relative_share[channel]),
            }
            for channel in largest
        ],
    }
