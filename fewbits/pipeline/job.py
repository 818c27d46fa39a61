"""What a quantization run is, checked before any work is done: `prepare` turns arguments into a `Job`."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.algorithms import input_ranges
from fewbits.algorithms.compose import Recipe, compose
from fewbits.calibration.coverage import POLICIES
from fewbits.calibration.data import TextSpec, TokenSet, pack, read_texts
from fewbits.checkpoints import mxfp4
from fewbits.checkpoints.base import Source
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import BadInput, Unsupported, nearest_first, unknown
from fewbits.formats import Format, Scheme, parse_scheme
from fewbits.formats.low_rank import LowRankSpec
from fewbits.formats.mix import Mix, Weights, parse_weights
from fewbits.pipeline.output import check_companions
from fewbits.planner import auto
from fewbits.planner.plan import Plan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEARNED_TEXT = 3  # times the windows, by default, for methods that learn
_ONE_FORMAT = ("rewrite", "residual", "learn")  # roles of steps that take no linear of several formats
CHECKPOINT_FORMATS = ("auto", "compressed-tensors", "native", "gguf", "mxfp4")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides the bytes of the output, checked before any work is done.

    plan: formats by layer; `scheme.weights` is then the one that most weights have. question: of `--method auto`;
    `recipe` is the widest it may take until `choice`, the answer, is there (`answered`).
    """

    source: Source
    out: Path
    scheme: Scheme
    recipe: Recipe
    sequential: bool
    ignore: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    checkpoint_format: str
    calibration: TokenSet | None
    probe: TokenSet | None
    seed: int
    experts: str
    input_hadamard: dict[str, tuple[int, ...]]  # module on disk -> orders of the transform of its input
    notes: tuple[str, ...]  # of steps that concern the whole model
    plan: Plan | None = None
    act_range: str | None = None  # estimator of static activations' ranges; None where they are dynamic
    question: auto.Question | None = None
    choice: dict[str, Any] | None = None

    def answered(self, choice: dict[str, Any]) -> Job:
        """The job with the composition that `choice` names."""
        assert self.question is not None
        found = auto.candidate_called(self.question, choice.get("chosen"))
        text = self.calibration if found.recipe.statistics or self.act_range is not None else None
        if text is not None and not found.recipe.learners:
            text = text.every(self.question.thin)
        return dataclasses.replace(
            self, choice=choice, recipe=found.recipe, sequential=found.sequential, calibration=text
        )

    def weights(self, name: str, columns: int) -> Weights:
        """The format of the linear called `name` in the model, with so many inputs."""
        if self.plan is None:
            return self.scheme.weights.fitting(columns)
        return parse_weights(self.plan.layers[name]).with_scale_dtype(self.dtype).fitting(columns)

    def residual(self, shape: tuple[int, int]) -> LowRankSpec | None:
        """What a linear of `shape` (out, in) gets beside its codes."""
        return None if self.recipe.residual is None else self.recipe.residual.spec(shape)

    def fingerprint(self) -> dict[str, Any]:
        """JSON that two runs share exactly when they compute the same tensors.

        Of `--method auto` it holds the question, not the answer: the journal keeps that (`Journal.choose`).
        """
        method = [self.recipe.name, repr(self.recipe), self.sequential]
        return {
            "journal": 1,
            "source": self.source.identity,
            "scheme": [self.scheme.weights.name, self.scheme.activations and self.scheme.activations.name],
            **({} if self.plan is None else {"plan": self.plan.digest}),
            **({} if self.act_range is None else {"act_range": self.act_range}),
            "method": method if self.question is None else [auto.NAME, repr(self.question)],
            "experts": self.experts,
            "ignore": list(self.ignore),
            "dtype": str(self.dtype),
            "device": self.device.type,
            "checkpoint_format": self.checkpoint_format,
            "calibration": self.calibration and self.calibration.sha256,
            "evaluation": self.probe and self.probe.sha256,
        }


def prepare(
    out: Path, model: str | Path, scheme_name: str, group_size: int | None, method_name: str,
    options: dict[str, Any], text: TextSpec | TokenSet, samples: int | None, sequence_length: int | None, seed: int,
    ignore: tuple[str, ...], dtype_name: str | None, device_name: str | None, checkpoint_format: str,
    eval_samples: int | TokenSet, sequential: bool, experts: str, plan: Plan | None = None,
    minutes: float | None = None, act_range: str | None = None,
) -> Job:  # fmt: skip
    scheme = parse_scheme(scheme_name, group_size) if plan is None else Scheme(
        name="mixed", weights=main_format(parse_weights(Counter(plan.layers.values()).most_common(1)[0][0]))
    )  # fmt: skip
    act_range = _act_range(scheme, act_range)
    question = None
    thin = LEARNED_TEXT if samples is None and not isinstance(text, TokenSet) else 1
    if auto.NAME in [name.strip() for name in method_name.split(",")]:
        question = auto.ask(method_name.strip(), minutes, options, sequential=sequential, thin=thin)
    elif minutes is not None:
        raise BadInput(f"{minutes:g} minutes given with method {method_name}: they are for method auto, which chooses")
    recipe = compose(method_name, options) if question is None else question.recipe
    if recipe.keeps_outliers and scheme.activations is None:
        raise BadInput(
            f"method {method_name} keeps outlier channels of inputs in 16 bits, and {scheme.name} rounds no inputs: "
            "use it with scheme W8A8"
        )
    if experts not in POLICIES:
        raise unknown("policy for experts that saw few tokens", experts, POLICIES)
    if checkpoint_format not in CHECKPOINT_FORMATS:
        raise unknown("checkpoint format", checkpoint_format, CHECKPOINT_FORMATS)
    if isinstance(eval_samples, int) and eval_samples < 0:
        raise BadInput(f"{eval_samples} held-out windows to measure on; 1 or more, or 0 to leave the loss unmeasured")
    if dtype_name is not None and dtype_name not in DTYPES:
        raise unknown("dtype", dtype_name, DTYPES)
    device = choose_device(device_name)
    for pattern in ignore:
        compiled(pattern)
    source = open_source(model)
    if checkpoint_format == mxfp4.FORMAT and (reason := mxfp4.CODEC.refuses_model(source.config())):
        raise Unsupported(f"checkpoint format {mxfp4.FORMAT}: {reason}; compressed-tensors holds MXFP4 of other models")
    if checkpoint_format != "gguf":  # which carries its tokenizer in the file, and checks it there
        check_companions(source)
    dtype = DTYPES[dtype_name] if dtype_name else source.dtype
    scheme = dataclasses.replace(scheme, weights=scheme.weights.with_scale_dtype(dtype))
    if not ignored("lm_head", ignore) and "lm_head.weight" in source.tied():
        raise Unsupported(
            "lm_head shares its tensor with the embeddings, which stay dense; what is given as --ignore replaces the "
            "default, lm_head: add --ignore lm_head to it"
        )
    tokens = None
    if recipe.statistics or act_range is not None:
        tokens = calibration_tokens(source, text, samples, sequence_length, seed, learns=bool(recipe.learners))
    probe = eval_samples if isinstance(eval_samples, TokenSet) else None
    if isinstance(eval_samples, int) and eval_samples:
        texts, described = read_texts(None, split="evaluation")
        limit = source.config().get("max_position_embeddings")
        probe = pack(
            texts, source.load_tokenizer(), sequence_length=min(512, limit or 512), samples=None, at_most=eval_samples,
            description=described,
        )  # fmt: skip
    if plan is not None and question is None:  # auto does not try what a plan rules out
        _check_mixes(plan, recipe)
    source, input_hadamard, notes = _rewritten(source, recipe, ignore, scheme.activations is not None)
    return Job(
        source=source, input_hadamard=input_hadamard, notes=notes, out=out.absolute(), scheme=scheme, recipe=recipe,
        sequential=sequential, ignore=ignore, dtype=dtype, device=device, checkpoint_format=checkpoint_format,
        calibration=tokens, probe=probe, seed=seed, experts=experts, plan=plan,
        act_range=act_range, question=question,
    )  # fmt: skip


def main_format(format: Weights) -> Format:
    """What the most columns of a linear are quantized to."""
    return format.main if isinstance(format, Mix) else format


def _check_mixes(plan: Plan, recipe: Recipe) -> None:
    """Unsupported where a step knows nothing of linears of several formats."""
    name, mix = next(((name, format) for name, format in plan.layers.items() if "+" in format), ("", ""))
    step = next((name for name, step in recipe.steps.items() if step.role in _ONE_FORMAT), None)
    if mix and step is not None:
        raise Unsupported(
            f"{name}: {mix} is several formats, and {step} knows linears of one: plan without --within, or leave "
            f"{step} out"
        )


def _act_range(scheme: Scheme, name: str | None) -> str | None:
    static = scheme.activations is not None and scheme.activations.scaling.static
    if name is not None and not static:
        raise BadInput(
            f"range of activations {name!r} given, but {scheme.name} does not fix their ranges by calibration: leave "
            "it out, or choose a static scheme such as W8A8_STATIC or FP8"
        )
    return input_ranges.estimator_called(name or "absmax") if static else None


def calibration_tokens(
    source: Source, text: TextSpec | TokenSet, samples: int | None, sequence_length: int | None, seed: int,
    *, learns: bool = False,
) -> TokenSet:  # fmt: skip
    """Windows of `text` for methods to learn from; None takes the defaults, which are more for one that `learns`."""
    if isinstance(text, TokenSet):
        return text
    limit = source.config().get("max_position_embeddings")
    length = min(512, limit or 512) if sequence_length is None else sequence_length
    texts, described = read_texts(text)
    return pack(
        texts, source.load_tokenizer(), sequence_length=length, seed=seed, max_length=limit, description=described,
        samples=_default_samples(source, length, learns) if samples is None else samples,
    )  # fmt: skip


def _rewritten(
    source: Source, recipe: Recipe, ignore: tuple[str, ...], rounded: bool
) -> tuple[Source, dict[str, tuple[int, ...]], tuple[str, ...]]:
    """The model as the recipe's rewrites leave it, the transforms of inputs they ask for, and their notes."""
    inputs: dict[str, tuple[int, ...]] = {}
    notes: list[str] = []
    for step in recipe.rewrites:
        done = step.rewrite(source, lambda module: ignored(module, ignore), rounded)
        source = done.source
        inputs.update(done.input_hadamard)
        notes += done.notes
    return source, inputs, tuple(notes)


def _default_samples(source: Source, sequence_length: int, learns: bool) -> int:
    """Four tokens for every input of the widest linear: fewer leave its Hessian poor, more change little.

    Three times as many for what fits a parameter to each weight: that goes on gaining (LOG.md).
    """
    sizes = ("hidden_size", "intermediate_size", "moe_intermediate_size")
    widest = max(int(source.config().get(name) or 0) for name in sizes)
    return (LEARNED_TEXT if learns else 1) * max(16, -(-4 * widest // sequence_length))


def choose_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BadInput(f"unknown device {name!r}; use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"device {name!r}: torch sees no GPU; use cpu, or install torch for your GPU")
    return device


def compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
    except re.error as error:
        raise BadInput(f"ignore pattern {pattern!r} is no regular expression: {error}") from error


def check_ignored(patterns: Iterable[str], names: Collection[str]) -> None:
    """BadInput for a pattern that matches none of `names`: a typo would quantize what was to be kept."""
    for pattern in patterns:
        if pattern != "lm_head" and not any(map(compiled(pattern).match, names)):  # the default, wherever the head is
            near = ", ".join(nearest_first(pattern, names)[:3])
            raise BadInput(f"ignore pattern {pattern!r} matches no layer of the model; nearest: {near}")


def ignored(name: str, patterns: Iterable[str]) -> bool:
    return any(compiled(pattern).match(name) for pattern in patterns)
