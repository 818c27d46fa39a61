"""Text and token windows: what is accepted, what is refused and how, and that both are reproducible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.calibration.data import builtin_split, builtin_text, ids_sha256, pack, read_texts
from fewbits.core.errors import BadInput


class WordTokenizer:
    """One id a word, grown as words come; optionally a BOS at the head of every sequence."""

    eos_token_id = 1

    def __init__(self, bos: bool = False) -> None:
        self.bos_token_id = 0 if bos else None
        self.words: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        ids = [self.words.setdefault(word, len(self.words) + 2) for word in text.split()]
        opening = [0] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": opening + ids}


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{index}" for index in range(start, start + count))


def shingles(documents: list[str], length: int = 13) -> set[tuple[str, ...]]:
    split = [document.split() for document in documents]
    return {tuple(w[i : i + length]) for w in split for i in range(len(w) - length + 1)}


# ---- the built-in text


def test_builtin_text_is_long_and_ordered_the_same_each_time() -> None:
    assert sum(map(len, builtin_text())) > 300_000
    assert builtin_text() == builtin_text()


def test_splits_are_disjoint_and_both_of_use() -> None:
    calibration, evaluation = builtin_split("calibration"), builtin_split("evaluation")
    assert sum(map(len, calibration)) > 200_000
    assert sum(map(len, evaluation)) > 40_000
    splits = (calibration, evaluation)
    first, second = ({" ".join(p.split()) for d in split for p in d.split("\n\n")} for split in splits)
    assert not first & second
    held_out = shingles(evaluation)
    # 13-word runs, the usual test for contamination: a stray sentence may recur, a passage may not.
    assert len(held_out & shingles(calibration)) < 0.005 * len(held_out)


def test_unknown_split_lists_the_known_ones() -> None:
    with pytest.raises(BadInput, match="known: calibration, evaluation"):
        builtin_split("calibraton")


# ---- what a user may pass as text


def test_reads_file_files_and_strings(tmp_path: Path) -> None:
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text("alpha", encoding="utf-8")
    b.write_text("\ufeffbeta é", encoding="utf-8")
    assert read_texts(a) == (["alpha"], "file a.txt")
    assert read_texts(str(b))[0] == ["beta é"]  # a byte-order mark is not text
    assert read_texts([a, b])[0] == ["alpha", "beta é"]
    assert read_texts([str(a), str(b)])[0] == ["alpha", "beta é"]
    assert read_texts(["one text", "", "two"]) == (["one text", "two"], "2 texts passed in")
    texts, description = read_texts(None)
    assert texts == builtin_split("calibration") and "built-in calibration" in description
    assert read_texts(None, split="evaluation")[0] == builtin_split("evaluation")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no text file at"),
        (b"", "holds no text"),
        (b" \n\t ", "holds no text"),
        (b"abc\x00def", "binary file"),
        (b"caf\xe9 au lait", r"not UTF-8 \(byte 0xe9 at 3\)"),
    ],
)
def test_bad_files_are_named_and_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read_texts(path)
    assert "text.txt" in str(caught.value) and "built-in text" in str(caught.value)


def test_bad_lists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a file"):
        read_texts(tmp_path)
    with pytest.raises(BadInput, match="list is empty"):
        read_texts([])
    with pytest.raises(BadInput, match="blank"):
        read_texts(["", "  "])
    with pytest.raises(BadInput, match="not int"):
        read_texts([3])  # type: ignore[list-item]


# ---- windows


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    sequence_length=st.integers(2, 12),
    bos=st.booleans(),
)
def test_all_windows_are_the_stream_cut_up(lengths: list[int], sequence_length: int, bos: bool) -> None:
    texts = [words(length, start=100 * index) for index, length in enumerate(lengths)]
    stream: list[int] = []
    tokenizer = WordTokenizer(bos)
    for text in texts:
        if text:
            stream += tokenizer(text, add_special_tokens=False)["input_ids"] + [1]
    tokenizer = WordTokenizer(bos)
    tokenizer("a")  # pack probes the tokenizer with this before it reads
    tokenizer.words.clear()
    width = sequence_length - bos
    if len(stream) < width:
        with pytest.raises(BadInput, match="too little text"):
            pack(texts, tokenizer, sequence_length=sequence_length, samples=None)
        return
    tokens = pack(texts, _Frozen(tokenizer, texts), sequence_length=sequence_length, samples=None)
    body = tokens.ids[:, 1:] if bos else tokens.ids
    assert body.reshape(-1).tolist() == stream[: len(stream) // width * width]
    if bos:
        assert (tokens.ids[:, 0] == 0).all()


class _Frozen:
    """A tokenizer whose ids were fixed beforehand, so that the order of calls does not matter."""

    def __init__(self, tokenizer: WordTokenizer, texts: list[str]) -> None:
        self.inner, self.eos_token_id, self.bos_token_id = tokenizer, 1, tokenizer.bos_token_id
        for text in texts:
            tokenizer(text)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        return self.inner(text, add_special_tokens)


def test_choice_is_seeded_and_hashed() -> None:
    def packed(seed: int, samples: int = 5) -> Any:
        return pack([words(1000)], WordTokenizer(), sequence_length=16, samples=samples, seed=seed)

    first, again, other = packed(0), packed(0), packed(1)
    assert torch.equal(first.ids, again.ids) and first.sha256 == again.sha256
    assert first.sha256 != other.sha256
    assert first.ids.shape == (5, 16) and first.ids.dtype == torch.int64 and first.tokens == 80
    assert len({tuple(row) for row in first.ids.tolist()}) == 5
    assert first.description["seed"] == 0 and first.description["tokens"] == 80
    assert first.description["tokens_available"] == 1001 and first.description["sha256"] == first.sha256


def test_the_choice_is_the_same_on_every_machine() -> None:
    tokens = pack([words(1000)], WordTokenizer(), sequence_length=16, samples=4, seed=7)
    assert [(row[0] - 3) // 16 for row in tokens.ids.tolist()] == [9, 20, 25, 60]


def test_hash_sees_the_shape() -> None:
    ids = torch.arange(6)
    assert ids_sha256(ids.view(2, 3)) != ids_sha256(ids.view(3, 2))


def test_at_most_caps_an_open_choice_only() -> None:
    tokenizer = WordTokenizer()
    assert pack([words(1000)], tokenizer, sequence_length=16, samples=None, at_most=3).ids.shape[0] == 3
    assert pack([words(40)], tokenizer, sequence_length=16, samples=None, at_most=30).ids.shape[0] == 2
    with pytest.raises(BadInput, match="samples must be 1 or more, not -1"):
        pack([words(40)], tokenizer, sequence_length=16, samples=None, at_most=-1)


@pytest.mark.parametrize(
    ("count", "samples", "sequence_length", "message"),
    [
        (0, 1, 8, "0 tokens make 0 windows of 8, and 1 are asked for"),
        (5, 1, 8, "6 tokens make 0 windows of 8.*--sequence-length of at most 6"),
        (100, 40, 8, r"101 tokens make 12 windows of 8, and 40 are asked for \(320 tokens\).*--samples 12"),
        (100, 0, 8, "samples must be 1 or more, not 0"),
        (100, -3, 8, "samples must be 1 or more"),
        (100, 1, 1, "sequence length must be 2 or more.*not 1"),
        (100, 1, 65, "more than the 64 positions"),
    ],
)
def test_impossible_requests_say_what_is_there(count: int, samples: int, sequence_length: int, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        pack([words(count)], WordTokenizer(), sequence_length=sequence_length, samples=samples, max_length=64)
