"""Text out of a model, piece by piece, with the clock running.

    text = stream(model, tokenizer, "The capital of France is", max_new_tokens=20)
    for piece in text:
        print(piece, end="")
    print(text.stats.decode_rate, "tokens/s", text.runner)

A prompt that is a list of messages goes through the tokenizer's chat template. Models of the llama shape run
on the decode engine (engine.py); any other on the transformers model itself, one forward pass a token with
its cache, and `Stream.runner` says why. So does every model whose keys and values are to be stored in few bits
(`kv`, nn/kv_cache.py): the engine's cache is float32.

Rates leave out what they should not hold: reading the prompt is its own figure, and the first token, which
comes with it, is not in the decode rate.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewbits.core.errors import BadInput
from fewbits.formats.kv import KVFormat, parse_kv
from fewbits.kernels import No
from fewbits.runtime.engine import Engine, engine_for
from fewbits.runtime.sampler import Sampling

Prompt = str | Sequence[dict[str, str]] | Sequence[int]


@dataclass(kw_only=True)
class Stats:
    """Counts and seconds of one generation, growing while it runs."""

    prompt_tokens: int = 0
    read_tokens: int = 0  # of the prompt, less what the cache already held
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    stopped: str = ""  # "end of text", "length" or "context"

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens read per second."""
        return self.read_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second after the first; None for fewer than two."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "prefill_rate": self.prefill_rate, "decode_rate": self.decode_rate}


@dataclass
class Stream:
    """Iterate for pieces of text; `stats`, `ids` (new tokens) and `text` are current throughout."""

    runner: str
    _pieces: Iterator[str]
    stats: Stats
    ids: list[int] = field(default_factory=list)
    text: str = ""

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            self.text += piece
            yield piece


def stream(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    ignore_eos: bool = False,
    engine: bool = True,
    kv: str | None = None,
) -> Stream:
    """Continues `prompt` (text, chat messages, or token ids).

    Ends at the model's end-of-text tokens (unless `ignore_eos`), after `max_new_tokens`, or when the context
    is full. `engine=False` keeps to the transformers model. kv: how keys and values are stored, e.g. "int4" (see
    formats/kv.py); None leaves them in floating point. Raises BadInput for an empty or too long prompt
    and for sampling parameters out of range, before anything is generated.
    """
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens {max_new_tokens}: at least 1")
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    cache = None if kv is None else parse_kv(kv)
    ids = encode(tokenizer, prompt)
    steps, runner = _runner(model, engine) if cache is None else _with_cache(model, cache)
    if not ids:
        raise BadInput("the prompt is empty: there is nothing to continue")
    if len(ids) > steps.limit:
        raise BadInput(f"the prompt has {len(ids)} tokens; the model reads {steps.limit} at most")
    stats, new = Stats(prompt_tokens=len(ids)), []
    stop = frozenset() if ignore_eos else end_tokens(model, tokenizer)
    tokens = _tokens(steps, ids, sampling, max_new_tokens, stop, stats, new)
    return Stream(runner, _pieces(tokenizer, tokens, new), stats, new)


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt. BadInput for messages where the tokenizer has no chat template."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt).input_ids)
    if prompt and isinstance(prompt[0], int):
        return [int(token) for token in prompt]  # type: ignore[call-overload]
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput("this model's tokenizer has no chat template: pass the prompt as text")
    text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def end_tokens(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a text: the generation config's and the tokenizer's."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*found, tokenizer.eos_token_id] if token is not None)


class _Steps(Protocol):
    tokens: list[int]
    limit: int

    def prefill(self, ids: Sequence[int]) -> Tensor: ...

    def step(self, token: int) -> Tensor: ...


class ModelSteps:
    """The engine's interface over a transformers model and its own cache, or one in few bits."""

    def __init__(self, model: nn.Module, kv: KVFormat | None = None) -> None:
        self._model: Any = model
        self._kv = kv
        self._cache: Any = None
        self.tokens: list[int] = []
        self.limit: int = getattr(self._model.config, "max_position_embeddings", None) or 1 << 31

    def prefill(self, ids: Sequence[int]) -> Tensor:
        self._cache, self.tokens = None, []
        if self._kv is not None:
            from fewbits.nn.kv_cache import QuantizedKVCache  # transformers is loaded only where it is used

            self._cache = QuantizedKVCache(self._model.config, self._kv)
        return self._forward(list(ids))

    def step(self, token: int) -> Tensor:
        return self._forward([token])

    @torch.inference_mode()
    def _forward(self, ids: list[int]) -> Tensor:
        inputs = torch.tensor([ids], device=self._model.device)
        # `logits_to_keep`: a long prompt needs the head for its last token only.
        output = self._model(inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        self.tokens.extend(ids)
        return output.logits[0, -1].float()


def _with_cache(model: nn.Module, kv: KVFormat) -> tuple[_Steps, str]:
    return ModelSteps(model, kv), f"transformers model, key-value cache {kv.name}"


def _runner(model: nn.Module, wanted: bool) -> tuple[_Steps, str]:
    if not wanted:
        return ModelSteps(model), "transformers model, as asked"
    found: Engine | No = engine_for(model)
    if isinstance(found, No):
        return ModelSteps(model), f"transformers model, since the decode engine said no: {found.reason}"
    return found, "fewbits decode engine"


def _tokens(
    steps: _Steps,
    ids: list[int],
    sampling: Sampling,
    limit: int,
    stop: frozenset[int],
    stats: Stats,
    new: list[int],
) -> Iterator[int]:
    """New tokens, also appended to `new`, with `stats` kept."""
    generator = sampling.generator()
    start = time.perf_counter()
    held = _common(steps.tokens, ids)
    logits = steps.prefill(ids)
    token = sampling.pick(logits, generator)
    first = time.perf_counter()
    stats.read_tokens = len(ids) - (held if isinstance(steps, Engine) else 0)
    stats.prefill_seconds = first - start
    waited = 0.0  # in whoever reads the stream, between two of our tokens
    while True:
        if token in stop:
            stats.stopped = "end of text"
            return
        new.append(token)
        stats.new_tokens += 1
        paused = time.perf_counter()
        stats.decode_seconds = paused - first - waited
        yield token
        waited += time.perf_counter() - paused
        if len(new) >= limit:
            stats.stopped = "length"
            return
        if len(steps.tokens) >= steps.limit:
            stats.stopped = "context"
            return
        token = sampling.pick(steps.step(token), generator)


def _common(held: list[int], ids: list[int]) -> int:
    """Prompt tokens that need not be read again (the last always is)."""
    count = 0
    while count < min(len(held), len(ids) - 1) and held[count] == ids[count]:
        count += 1
    return count


def _pieces(tokenizer: Any, tokens: Iterator[int], new: list[int]) -> Iterator[str]:
    """Text as it becomes certain: a token may end inside a character, so a piece waits for whole ones.

    Only a window of tokens is decoded again each time. Its first part gives the context that spaces depend
    on.
    """
    begin, done = 0, 0
    for _ in tokens:
        before = tokenizer.decode(new[begin:done], skip_special_tokens=True)
        now = tokenizer.decode(new[begin:], skip_special_tokens=True)
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            begin, done = done, len(new)
    before = tokenizer.decode(new[begin:done], skip_special_tokens=True)
    rest = tokenizer.decode(new[begin:], skip_special_tokens=True)[len(before) :]
    if rest:
        yield rest
