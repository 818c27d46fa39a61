"""Streaming text: the same tokens as transformers, whole characters, honest clocks, clear refusals."""

from __future__ import annotations

import pytest
import torch
from tiny_runtime_models import byte_tokenizer, quantize_in_place, tiny_llama

from fewbits.core.errors import BadInput
from fewbits.runtime.chat import Chat
from fewbits.runtime.generate import encode, end_tokens, stream
from fewbits.runtime.sampler import Sampling

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.mark.parametrize("engine", [True, False])
def test_greedy_is_what_transformers_generates(model, engine: bool) -> None:
    inputs = TOKENIZER("hello world", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=257)
    text = stream(model, TOKENIZER, "hello world", max_new_tokens=20, ignore_eos=True, engine=engine)
    pieces = list(text)
    assert text.ids == out[0, inputs.input_ids.shape[1] :].tolist()
    assert "".join(pieces) == text.text == TOKENIZER.decode(text.ids, skip_special_tokens=True)
    assert text.runner.startswith("fewbits decode engine" if engine else "transformers model")
    assert text.stats.prompt_tokens == text.stats.read_tokens == 11
    assert text.stats.new_tokens == 20 and text.stats.stopped == "length"
    assert text.stats.decode_rate > 0 and text.stats.prefill_rate > 0
    assert set(text.stats.to_dict()) >= {"decode_rate", "prefill_rate", "new_tokens"}


def test_the_reason_for_not_using_the_engine_is_shown() -> None:
    text = stream(tiny_llama(model_type="olmo2"), TOKENIZER, "abc", max_new_tokens=3, ignore_eos=True)
    list(text)
    assert "olmo2" in text.runner and text.stats.new_tokens == 3


def scripted(monkeypatch, said: list[int], limit: int = 1000):
    class Steps:
        def __init__(self) -> None:
            self.tokens, self.limit, self.left = [], limit, list(said)

        def _next(self):
            logits = torch.zeros(258)
            logits[self.left.pop(0) if self.left else 257] = 1
            return logits

        def prefill(self, ids):
            self.tokens += ids
            return self._next()

        def step(self, token):
            self.tokens.append(token)
            return self._next()

    monkeypatch.setattr("fewbits.runtime.generate._runner", lambda model, engine: (Steps(), "scripted"))
    return torch.nn.Module()


def test_characters_of_several_tokens_come_whole(monkeypatch) -> None:
    said = "naïve 漢字 😀!"
    ids = TOKENIZER(said).input_ids
    assert len(ids) > len(said)
    text = stream(scripted(monkeypatch, ids), TOKENIZER, "x")
    pieces = list(text)
    assert "".join(pieces) == said and all("\ufffd" not in piece for piece in pieces)
    assert "😀" in pieces
    assert text.stats.stopped == "end of text" and text.stats.new_tokens == len(ids)


def test_a_broken_character_at_the_end_is_not_swallowed(monkeypatch) -> None:
    ids = TOKENIZER("é").input_ids[:1]
    assert list(stream(scripted(monkeypatch, ids), TOKENIZER, "x")) == ["\ufffd"]


def test_the_context_ends_the_text(monkeypatch) -> None:
    ids = TOKENIZER("abcdefgh").input_ids
    text = stream(scripted(monkeypatch, ids, limit=5), TOKENIZER, "xyz")
    assert "".join(text) == "abc" and text.stats.stopped == "context"


def test_the_readers_time_is_not_in_the_rate(monkeypatch) -> None:
    import time

    text = stream(scripted(monkeypatch, TOKENIZER("abcdef").input_ids), TOKENIZER, "x")
    for _ in text:
        time.sleep(0.02)
    assert text.stats.decode_seconds < 0.05


def test_a_seed_repeats(model) -> None:
    def draw(seed: int | None) -> list[int]:
        text = stream(model, TOKENIZER, "ab", max_new_tokens=12, temperature=1.5, top_p=0.9, seed=seed, ignore_eos=True)
        list(text)
        return text.ids

    assert draw(1) == draw(1) != draw(2)


def test_nucleus_keeps_the_fewest_tokens_that_reach_top_p() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    picks = {Sampling(temperature=1, top_p=0.7).pick(logits, generator) for _ in range(200)}
    assert picks == {0, 1}
    assert {Sampling(temperature=1, top_p=0.01).pick(logits, generator) for _ in range(20)} == {0}
    assert Sampling().pick(logits, generator) == 0
    counts = torch.bincount(
        torch.tensor([Sampling(temperature=1).pick(logits, generator) for _ in range(2000)]), minlength=4
    )
    torch.testing.assert_close(counts / 2000, logits.exp(), atol=0.04, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_an_error(temperature: float) -> None:
    logits = torch.tensor([1.0, float("nan"), 0.0])
    with pytest.raises(BadInput, match="NaN"):
        Sampling(temperature=temperature).pick(logits, torch.Generator())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": "x" * 300}, "256 at most"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"top_p": 0.0}, "top_p 0"),
        ({"top_p": 1.5}, "top_p 1.5"),
    ],
)
def test_bad_input_before_anything_runs(model, options: dict, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        stream(model, TOKENIZER, **{"prompt": "abc", **options})


def test_prompts(model) -> None:
    assert encode(TOKENIZER, [5, 6]) == [5, 6]
    messages = [{"role": "user", "content": "hi"}]
    assert TOKENIZER.decode(encode(TOKENIZER, messages)) == "user: hi\nassistant: "
    plain = byte_tokenizer()
    plain.chat_template = None
    with pytest.raises(BadInput, match="chat template"):
        encode(plain, messages)
    with pytest.raises(BadInput, match="chat template"):
        Chat(model, plain)
    assert 257 in end_tokens(model, TOKENIZER)


def test_a_conversation() -> None:
    model = quantize_in_place(tiny_llama(max_position_embeddings=1024), "int4-asym-g32")
    chat = Chat(model, TOKENIZER, system="be brief", max_new_tokens=8)
    first = "".join(chat.say("one"))
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    assert chat.messages[-1]["content"] == first.strip()
    list(chat.say("two"))
    assert len(chat.messages) == 5
    assert chat.last.stats.read_tokens < chat.last.stats.prompt_tokens, "its own history is not read again"


def test_a_broken_off_answer_stays_as_far_as_it_came(model) -> None:
    chat = Chat(model, TOKENIZER, max_new_tokens=30)
    answer = chat.say("hello")
    piece = next(answer)
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": piece.strip()}
