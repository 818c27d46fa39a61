"""The operands of a network's matrix products: every weight, and a bounded sample of every activation.

Weights are read one at a time, and of a large one whole rows, evenly drawn by seed. Activations are caught while text
runs through the model, a window at a time: the inputs of each group of linears that share one, the same positions of
each window in all of them. The first token of a window is kept apart: it is where attention sinks, and in some blocks
it is a thousand times as large as any other (massive activations, Sun et al. 2024, arXiv 2402.17762).

A convolution is a matrix product as well: its weight as [out, in * height * width]; of its input each pixel is a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.calibration.activations import watched
from fewbits.calibration.collect import Ref, input_stages
from fewbits.calibration.data import TextSpec, TokenSet, pack, read_texts
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.core.progress import OnProgress, Progress
from fewbits.models.topology import find_topology
from fewbits.models.walk import ExpertRef, LinearRef, blocks, linears

GAUSSIAN = "gaussian"  # names `gaussian_network`
WEIGHT_VALUES = 1 << 20  # of a weight, at most: outliers are rare, and a small sample would miss them
TOKENS, ACTIVATION_VALUES = 1024, 1 << 19  # of an activation, at most
_PROBE = 8  # tokens that show which linears share an input


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight [out, in]: `read` gives it. block: how deep it lies, from 0."""

    name: str
    kind: str
    block: int
    read: Callable[[], Tensor]

    def rows(self, seed: int) -> Tensor:
        """Whole rows of at most WEIGHT_VALUES values, float32, in their order; FewbitsError where not finite."""
        matrix = self.read()
        kept = max(1, WEIGHT_VALUES // matrix.shape[1])
        if kept < len(matrix):
            generator = torch.Generator().manual_seed(seed)
            matrix = matrix[torch.randperm(len(matrix), generator=generator)[:kept].sort().values.to(matrix.device)]
        return _finite(matrix.float().cpu(), self.name)


@dataclass(kw_only=True)
class Activation:
    """What flows into the linears of one stage: sampled rows [tokens, channels]. `seen` counts what they stand for."""

    name: str
    kind: str
    block: int
    first_rows: list[Tensor] = field(default_factory=list)
    rest_rows: list[Tensor] = field(default_factory=list)
    seen: int = 0  # rows that came by, first tokens not counted

    @property
    def first(self) -> Tensor | None:
        """The first token of every window; None where rows are no tokens in order (pixels, an expert's share)."""
        return _finite(torch.cat(self.first_rows), self.name) if self.first_rows else None

    @property
    def rest(self) -> Tensor:
        """A sample of all others."""
        return _finite(torch.cat(self.rest_rows), self.name)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network's operands, and what to say of it."""

    name: str
    about: str
    weights: Sequence[Weight]
    activations: Sequence[Activation]
    text: dict[str, Any] | None = None  # what was shown to it, as `TokenSet.description`


def _finite(values: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise FewbitsError(f"{name}: it has NaN or infinite values; repair the source, or run in float32")
    return values


def rows_kept(channels: int) -> int:
    """How many rows of an activation of that many channels are sampled."""
    return min(TOKENS, max(64, ACTIVATION_VALUES // channels))


def of_model(
    name: str,
    *,
    text: TextSpec = None,
    samples: int | None = None,
    sequence_length: int = 512,
    seed: int = 0,
    at_most: int = 8,
    on_progress: OnProgress | None = None,
) -> Network:
    """The operands of a language model (anything `fewbits.load` takes) or of a directory that holds an encoder.

    text, samples, sequence_length, seed: the windows shown, as `calibration.data` reads them. Raises BadInput for what
    is no model, and for one without dense linears.
    """
    encoder = _is_encoder(name)
    model, tokenizer = _load_encoder(name) if encoder else _load(name)
    texts, description = read_texts(text)
    tokens = pack(
        texts,
        tokenizer,
        sequence_length=sequence_length,
        samples=samples,
        seed=seed,
        at_most=at_most,
        max_length=getattr(model.config, "max_position_embeddings", None),
        description=description,
    )
    ids = _framed(tokens.ids, tokenizer) if encoder else tokens.ids
    found = _linears(model, name)
    activations = _activations(model, found, ids, seed, on_progress)
    weights = [
        Weight(name=each.ref.name, kind=each.kind, block=each.block, read=lambda ref=each.ref: ref.weight)
        for each in found
    ]
    kind = "encoder" if encoder else "language model"
    about = f"{kind} {model.config.model_type}, {len({each.block for each in found})} blocks, {len(found)} linears"
    return Network(
        name=Path(name).name if Path(name).is_dir() else name,
        about=about,
        weights=weights,
        activations=activations,
        text=_described(tokens, encoder),
    )


# ---- models


def check(name: str) -> None:
    """Raises BadInput where `name` is neither a model nor the Gaussian network, before anything long begins."""
    if name != GAUSSIAN and not _is_encoder(name):
        open_source(name, allow_quantized=True)


def _load(name: str) -> tuple[Any, Any]:
    from fewbits.runtime.load import load

    return load(name, dtype=torch.float32)


def _is_encoder(name: str) -> bool:
    """Whether `name` is a directory whose model is none that predicts the next token."""
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        architectures = config.get("architectures") or ["ForCausalLM"]
        return not any("CausalLM" in each or "LMHead" in each for each in architectures)
    except (OSError, ValueError, AttributeError, TypeError):
        return False  # whatever it is, `load` says what is wrong with it


def _load_encoder(path: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{path}: transformers cannot load it as an encoder (AutoModel): {error}") from error


def _framed(ids: Tensor, tokenizer: Any) -> Tensor:
    """Windows as an encoder is used to: [CLS] first and [SEP] last, where its tokenizer has them."""
    ids = ids.clone()
    for at, special in ((0, tokenizer.cls_token_id), (-1, tokenizer.sep_token_id)):
        if special is not None:
            ids[:, at] = special
    return ids


def _described(tokens: TokenSet, framed: bool) -> dict[str, Any]:
    return {**tokens.description, "framed": "first token [CLS], last [SEP]"} if framed else tokens.description


@dataclass(frozen=True, kw_only=True)
class _Linear:
    """A linear under its full name, and where it is. kind: its name in the block, as short as tells it apart."""

    ref: Ref
    block: int
    kind: str


def _linears(model: nn.Module, name: str) -> list[_Linear]:
    config: Any = model.config
    topology = find_topology(config.to_dict())
    found = []
    for index, (path, block) in enumerate(blocks(model, topology)):
        refs = linears(block, topology)
        often = Counter(ref.kind for ref in refs if isinstance(ref, LinearRef))  # BERT has three that are called dense
        for ref in refs:
            kind = ref.name if isinstance(ref, LinearRef) and often[ref.kind] > 1 else ref.kind
            found.append(_Linear(ref=dataclasses.replace(ref, name=f"{path}.{ref.name}"), block=index, kind=kind))
    if not found:
        raise BadInput(f"{name}: no dense linears in its blocks; pass the original of a quantized model")
    return found


# ---- activations


def _activations(
    model: Any, places: Sequence[_Linear], ids: Tensor, seed: int, on_progress: OnProgress | None
) -> list[Activation]:
    """One window at a time through the model, the head left out."""
    body, device = getattr(model, "base_model", model), next(model.parameters()).device
    options = {"use_cache": False} if getattr(model.config, "is_decoder", True) else {}

    def forward(window: Tensor) -> None:
        with torch.inference_mode():
            body(input_ids=window[None].to(device), **options)

    stages = input_stages([each.ref for each in places], lambda: forward(ids[0, :_PROBE]))
    about = {each.ref.name: each for each in places}
    found = {
        members[0].name: Activation(
            name=members[0].name,
            kind=", ".join(dict.fromkeys(about[ref.name].kind for ref in members)),
            block=about[members[0].name].block,
        )
        for members in stages
    }
    in_order = {members[0].name: not _scattered(members[0]) for members in stages}
    for index, window in enumerate(ids):
        draw = torch.randperm(len(window) - 1, generator=torch.Generator().manual_seed(seed + index)) + 1

        def see(name: str, x: Tensor, draw: Tensor = draw) -> None:
            rows = x.reshape(-1, x.shape[-1])
            _keep(found[name], rows, draw if in_order[name] else None, len(ids))

        with watched(stages, see):
            forward(window)
        if on_progress:
            on_progress(Progress("activations", index + 1, len(ids), "windows"))
    return [activation for activation in found.values() if activation.rest_rows]


def _scattered(ref: Ref) -> bool:
    """Whether the rows come expert by expert and not in the order of the tokens."""
    return isinstance(ref, ExpertRef) and ref.part == "down_proj"


def _keep(activation: Activation, rows: Tensor, draw: Tensor | None, windows: int) -> None:
    """Adds one window's share of the sample. draw: positions after the first, shuffled; None: rows in no order."""
    share = -(-rows_kept(rows.shape[-1]) // windows)
    if draw is None:
        at = torch.arange(0, len(rows), max(1, len(rows) // share))[:share]
        activation.seen += len(rows)
    else:
        at = draw[:share].sort().values
        activation.seen += len(rows) - 1
        activation.first_rows.append(rows[:1].detach().float().cpu().clone())
    if len(at):
        activation.rest_rows.append(rows[at.to(rows.device)].detach().float().cpu())


@contextlib.contextmanager
def _caught(modules: dict[str, nn.Conv2d], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---- a network without outliers


def gaussian_network(seed: int = 0, *, images: int = 16, side: int = 96) -> Network:
    """A ResNet-18 as it is drawn before training: Gaussian weights (He et al. 2015), and noise for pictures.

    The pictures have the spectrum of photographs, amplitudes falling as 1 / frequency; normalization layers hold the
    statistics of these pictures, as a trained network's hold those of its own.
    """
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNetModel(config)
    pictures = pink_noise(images, side, seed)
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    found = {
        name: Activation(name=name, kind=_convolution(name, module), block=index)
        for index, (name, module) in enumerate(convolutions.items())
    }
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the running statistics become those of the one batch that follows

    def see(name: str, x: Tensor) -> None:
        rows = x.movedim(1, -1).flatten(0, -2)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        found[name].seen = len(rows)
        found[name].rest_rows.append(rows[order[: rows_kept(rows.shape[-1])].sort().values])

    with torch.inference_mode():
        model.train()(pictures)
        with _caught(convolutions, see):
            model.eval()(pictures)
    weights = [
        Weight(
            name=name,
            kind=found[name].kind,
            block=found[name].block,
            read=lambda module=module: module.weight.detach().flatten(1),
        )
        for name, module in convolutions.items()
    ]
    about = f"ResNet-18 with Gaussian weights, seed {seed}, on {images} pictures of 1/f noise, {side} x {side}"
    return Network(name="Gaussian ResNet", about=about, weights=weights, activations=list(found.values()))


def _convolution(name: str, module: nn.Conv2d) -> str:
    return "shortcut" if "shortcut" in name else "x".join(map(str, module.kernel_size))


def pink_noise(images: int, side: int, seed: int) -> Tensor:
    """[images, 3, side, side]: noise of amplitude 1 / frequency, mean 0 and variance 1 a channel."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.fft2(torch.randn(images, 3, side, side, generator=generator))
    across, down = torch.fft.fftfreq(side), torch.fft.fftfreq(side)
    frequency = torch.hypot(across[None, :], down[:, None])
    frequency[0, 0] = torch.inf  # no mean
    pictures = torch.fft.ifft2(spectrum / frequency).real
    return pictures / pictures.std(dim=(-2, -1), keepdim=True)
