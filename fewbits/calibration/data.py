"""Text, and the token windows made from it.

Calibration shows the model some text and records what flows into each layer; evaluation shows it other
text and measures what quantization changed. Both need the same thing: a fixed set of token windows that a
later run can rebuild and a reader can check. So a `TokenSet` carries the sha256 of its ids and a
description of where they came from.

**Packing.** Documents are tokenised one by one, each closed by the tokenizer's end-of-text token, and laid
end to end; the stream is cut into windows of `sequence_length` tokens that do not overlap, and a seeded
choice takes `samples` of them. A tokenizer that opens every sequence with a BOS token has it at the head
of each window as well: Llama and Gemma put their attention sink there, and without it the activations
calibrated would be of a kind the model never sees in use.

**Built-in text.** Every CPython ships the reference manual's topics as `pydoc_data.topics`: a few hundred
kilobytes of English prose with some code, no download, no licence to ask for. Topics are dealt to the
splits "calibration" and "evaluation" by a hash of their name, about 4 : 1. The manual repeats itself
(`for` is also a section of `compound`), so paragraphs that evaluation holds are struck from calibration,
and no paragraph appears twice in a split: held-out text is never calibrated on. The text follows the
Python version; the hash in the record tells two versions apart.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.core.errors import BadInput, unknown
from fewbits.core.record import atomic_path

TextSpec = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
SPLITS = ("calibration", "evaluation")
_EVALUATION_SHARE = 5  # one topic in five, by hash


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Token windows and where they came from.

    ids: int64 [samples, sequence_length].
    sha256: hex digest over the shape and the ids as little-endian int64.
    description: JSON-ready: text, documents, tokens, samples, sequence_length, seed, sha256.
    """

    ids: torch.Tensor
    sha256: str
    description: dict[str, Any]

    @staticmethod
    def of(ids: torch.Tensor, description: Mapping[str, Any]) -> TokenSet:
        """The windows `ids`; what follows from them (tokens, samples, sequence_length, sha256) is described anew."""
        digest = ids_sha256(ids)
        told = {"tokens": ids.numel(), "samples": ids.shape[0], "sequence_length": ids.shape[1], "sha256": digest}
        return TokenSet(ids=ids, sha256=digest, description={**description, **told})

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def every(self, step: int) -> TokenSet:
        """Each `step`-th window."""
        return self if step == 1 else TokenSet.of(self.ids[::step], self.description)


def builtin_text() -> list[str]:
    """Every topic of the running CPython's reference manual, ordered by name."""
    from pydoc_data.topics import topics  # 0.5 MB of literals: read only when asked for

    return [topics[name] for name in sorted(topics)]


def builtin_split(split: str) -> list[str]:
    """The documents of one `split` of the built-in text; the splits share no paragraph.

    Raises `BadInput` for a split that is not in `SPLITS`.
    """
    if split not in SPLITS:
        raise unknown("split of the built-in text", split, SPLITS)
    return list(_builtin_splits()[split])


@functools.cache
def _builtin_splits() -> dict[str, tuple[str, ...]]:
    from pydoc_data.topics import topics

    names: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(topics):
        bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % _EVALUATION_SHARE
        names["evaluation" if bucket == 0 else "calibration"].append(name)
    seen: set[str] = set()
    splits: dict[str, tuple[str, ...]] = {}
    for split in ("evaluation", "calibration"):  # evaluation first: what both hold is struck from calibration
        documents = ("\n\n".join(_unseen_paragraphs(topics[name], seen)) for name in names[split])
        splits[split] = tuple(document for document in documents if document)
    return splits


def _unseen_paragraphs(text: str, seen: set[str]) -> list[str]:
    """Paragraphs of `text` whose words, white space aside, are not in `seen`; adds them to it."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return kept


def read_texts(spec: TextSpec = None, split: str = "calibration") -> tuple[list[str], str]:
    """The documents `spec` names and a one-line description of them.

    spec: None for the built-in text's `split`; the path of a UTF-8 text file; or a sequence of texts, or of
    `Path`s. A plain string alone is always a path; strings in a sequence are texts, unless every one of
    them is the path of an existing file (so a command line's list of files can be passed on as it is).
    Raises `BadInput` for a missing, empty, binary or unreadable file, and for texts that are all blank.
    """
    if spec is None:
        documents = builtin_split(split)
        return documents, f"built-in {split} text: {len(documents)} topics of pydoc_data.topics"
    if isinstance(spec, str | os.PathLike):
        return [_read_file(Path(spec))], f"file {Path(spec).name}"
    items = list(spec)
    for item in items:
        if not isinstance(item, str | os.PathLike):
            raise BadInput(f"text must be strings or paths of text files, not {type(item).__name__}")
    if not items:
        raise BadInput("no text: the list is empty; pass at least one text, or None for the built-in text")
    if all(isinstance(item, os.PathLike) or _is_file(item) for item in items):
        names = ", ".join(Path(item).name for item in items[:4]) + (", …" if len(items) > 4 else "")
        return [_read_file(Path(item)) for item in items], f"{len(items)} files: {names}"
    documents = [_read_file(Path(item)) if isinstance(item, os.PathLike) else item for item in items]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise BadInput(f"no text: all {len(items)} texts are blank")
    return documents, f"{len(documents)} texts passed in"


def _is_file(text: str) -> bool:
    # A text is no path once it has a line break, and the system refuses names longer than this anyway.
    return len(text) < 4096 and "\n" not in text and "\0" not in text and bool(text) and os.path.isfile(text)


def _read_file(path: Path) -> str:
    way_out = "pass a UTF-8 text file, or leave it out for the built-in text"
    if not path.exists():
        raise BadInput(f"no text file at '{path}'; {way_out}")
    if not path.is_file():
        raise BadInput(f"'{path}' is not a file; {way_out}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read '{path}': {error.strerror}; {way_out}") from error
    if b"\0" in data:
        raise BadInput(f"'{path}' is a binary file (it has a zero byte at {data.index(0)}); {way_out}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {data[error.start]:#04x} at {error.start}"
        raise BadInput(f"'{path}' is not UTF-8 ({where}); {way_out}") from error
    if not text.strip():
        raise BadInput(f"'{path}' holds no text ({len(data)} bytes); {way_out}")
    return text


def pack(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    sequence_length: int,
    samples: int | None,
    seed: int = 0,
    at_most: int | None = None,
    max_length: int | None = None,
    description: str = "",
) -> TokenSet:
    """Tokenise `texts` and choose `samples` windows of `sequence_length` tokens, by `seed`.

    tokenizer: a transformers tokenizer, or anything with its call, `bos_token_id` and `eos_token_id`.
    samples: how many windows; None takes all there are, or `at_most` of them.
    max_length: the model's context; a longer window is refused.
    Windows keep the order of the text. Raises `BadInput`, with the counts, when there is too little text.
    """
    _check(sequence_length=sequence_length, samples=samples, at_most=at_most, max_length=max_length)
    stream, bos = tokenise(texts, tokenizer)
    width = sequence_length - len(bos)
    available = len(stream) // width
    wanted = samples if samples is not None else max(1, min(available, at_most or available))
    if available < wanted:
        raise BadInput(
            f"too little text: {len(stream)} tokens make {available} windows of {sequence_length}, "
            f"and {wanted} are asked for ({wanted * width} tokens); "
            f"{_way_out(len(stream), available, sequence_length)}"
        )
    chosen = sorted(random.Random(seed).sample(range(available), wanted))
    windows = [bos + stream[index * width : (index + 1) * width] for index in chosen]
    return TokenSet.of(
        torch.tensor(windows, dtype=torch.int64),
        {
            "description": description,
            "documents": len(texts),
            "characters": sum(map(len, texts)),
            "tokens_available": len(stream),
            "seed": seed,
        },
    )


def _way_out(tokens: int, available: int, sequence_length: int) -> str:
    if available:
        return f"pass more text, --samples {available} or fewer, or a shorter --sequence-length"
    if tokens >= 2:
        return f"pass more text, or a --sequence-length of at most {min(tokens, sequence_length - 1)}"
    return "pass more text"


def _check(*, sequence_length: int, samples: int | None, at_most: int | None, max_length: int | None) -> None:
    if sequence_length < 2:
        raise BadInput(f"sequence length must be 2 or more (one token and the next), not {sequence_length}")
    for count in (samples, at_most):
        if count is not None and count < 1:
            raise BadInput(f"samples must be 1 or more, not {count}")
    if max_length is not None and sequence_length > max_length:
        raise BadInput(
            f"sequence length {sequence_length} is more than the {max_length} positions of the model; "
            f"use --sequence-length {max_length} or less"
        )


def tokenise(texts: Iterable[str], tokenizer: Any) -> tuple[list[int], list[int]]:
    """(the stream of ids over all `texts`, [BOS] or [] as the tokenizer opens a sequence).

    Every document ends in the end-of-text token, where the tokenizer has one.
    """
    opening = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    bos_id, eos_id = getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None)
    bos = [bos_id] if bos_id is not None and opening[:1] == [bos_id] else []
    # The stream is cut into windows below; transformers' warning that a document is longer than the model's context
    # would be about nothing. This is where it remembers having warned.
    if (warned := getattr(tokenizer, "deprecation_warnings", None)) is not None:
        warned["sequence-length-is-longer-than-the-specified-maximum"] = True
    stream: list[int] = []
    for text in texts:
        if ids := tokenizer(text, add_special_tokens=False)["input_ids"]:
            stream += ids
            if eos_id is not None:
                stream.append(eos_id)
    return stream, bos


def ids_sha256(ids: torch.Tensor) -> str:
    """sha256 over the shape and the values of int64 `ids` [samples, length], in little-endian bytes."""
    digest = hashlib.sha256(",".join(map(str, ids.shape)).encode())
    digest.update(ids.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def write_tokens(path: Path, tokens: TokenSet, asked: Mapping[str, Any]) -> None:
    """Keeps `tokens` in the safetensors file `path`, under what was asked for (JSON)."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"description": json.dumps(tokens.description), "asked": json.dumps(asked)}
    with atomic_path(path) as temporary:
        save_file({"ids": tokens.ids}, temporary, metadata=metadata)


def read_tokens(path: Path, asked: Mapping[str, Any]) -> TokenSet | None:
    """The windows that `write_tokens` kept in `path`, if they answer to `asked` and are whole; else None."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata, ids = file.metadata() or {}, file.get_tensor("ids")
        description = json.loads(metadata["description"])
        same = json.loads(metadata["asked"]) == json.loads(json.dumps(asked))
    except (SafetensorError, KeyError, ValueError):
        return None
    if not same or ids_sha256(ids) != description["sha256"]:
        return None
    return TokenSet(ids=ids, sha256=description["sha256"], description=description)
