"""The tokenizer a GGUF file carries in its ``tokenizer.*`` keys, as a transformers tokenizer.

The inverse of gguf_vocab.py. Kind "gpt2" is BPE on bytes with the merges in the file; "llama" has scores instead, from
which merges follow: a token may be joined from any two tokens that make it up, higher scores first; "t5" is a Unigram.
A rule for cutting text that gguf_pretokenizers.py does not know is left to transformers (`convert_gguf_tokenizer`), as
are other kinds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fewbits.checkpoints.base import by_library
from fewbits.checkpoints.gguf_pretokenizers import WHOLE_TOKENS_FIRST, build, called
from fewbits.core.errors import BadInput, Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
MAX_PIECE = 128  # a token longer than that is in no vocabulary, and its cuts are too many
_LISTS = {
    "tokens": ("tokenizer.ggml.tokens", str),
    "merges": ("tokenizer.ggml.merges", str),
    "scores": ("tokenizer.ggml.scores", float),
    "token_type": ("tokenizer.ggml.token_type", int),
}
_SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def build_tokenizer(metadata: dict[str, Any], path: str, context: int) -> PreTrainedTokenizerBase:
    """The tokenizer described by `metadata`, with special tokens, chat template and maximal length `context`.

    Raises BadInput when the description is damaged, Unsupported for a kind transformers cannot build.
    """
    from transformers import PreTrainedTokenizerFast

    described = _described(metadata, path)
    options = _special_tokens(metadata, described["tokens"], path)
    backend = by_library(f"{path}: the tokenizer is damaged", lambda: _backend(described, metadata, path))
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        options["chat_template"] = template
    for key in ("add_bos_token", "add_eos_token"):
        if isinstance(metadata.get(f"tokenizer.ggml.{key}"), bool):
            options[key] = metadata[f"tokenizer.ggml.{key}"]
    if described["tokenizer_type"] == "llama":
        options.setdefault("add_bos_token", True)  # llama.cpp's rule for files without the key
    tokenizer: PreTrainedTokenizerBase = by_library(
        f"{path}: the tokenizer is damaged",
        lambda: PreTrainedTokenizerFast(
            tokenizer_object=backend, model_max_length=context, clean_up_tokenization_spaces=False, **options
        ),
    )
    return tokenizer


def _described(metadata: dict[str, Any], path: str) -> dict[str, Any]:
    """The dictionary that transformers' converter expects, with every list checked."""
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str):
        raise BadInput(f"{path}: the file carries no tokenizer (no key tokenizer.ggml.model)")
    described: dict[str, Any] = {"tokenizer_type": kind}
    if isinstance(metadata.get("tokenizer.ggml.pre"), str):
        described["pre_tokenizer_type"] = metadata["tokenizer.ggml.pre"]
    for name, (key, element) in _LISTS.items():
        if key in metadata:
            value = metadata[key]
            if not isinstance(value, list) or not all(type(item) is element for item in value):
                raise BadInput(f"{path}: {key} is not a list of {element.__name__}")
            described[name] = value
    count = len(described.get("tokens", ()))
    if not count:
        raise BadInput(f"{path}: tokenizer.ggml.tokens is missing or empty")
    for name in ("scores", "token_type"):
        if name in described and len(described[name]) != count:
            raise BadInput(f"{path}: {_LISTS[name][0]} has {len(described[name])} entries for {count} tokens")
    _check_merges(described.get("merges", []), set(described["tokens"]), path)
    return described


def _check_merges(merges: list[str], tokens: set[str], path: str) -> None:
    """Each merge must join two tokens into a third; the tokenizers library aborts on some that do not."""
    for merge in merges:
        left, blank, right = merge.partition(" ")
        if not blank or not {left, right, left + right} <= tokens:
            raise BadInput(f"{path}: tokenizer.ggml.merges has {merge[:80]!r}, which does not join two tokens into one")


def _special_tokens(metadata: dict[str, Any], tokens: list[str], path: str) -> dict[str, Any]:
    special: dict[str, Any] = {}
    for name, key in _SPECIAL.items():
        index = metadata.get(key)
        if index is None:
            special[name] = None
        elif type(index) is not int or not 0 <= index < len(tokens):
            raise BadInput(f"{path}: {key} is {index!r}; there are {len(tokens)} tokens")
        else:
            special[name] = tokens[index]
    return special


def _backend(described: dict[str, Any], metadata: dict[str, Any], path: str) -> Any:
    kind, rule = described["tokenizer_type"], called(described.get("pre_tokenizer_type", ""))
    if kind == "gpt2" and rule is not None:
        return _byte_level(described, rule)
    if kind == "llama" and "scores" in described:
        return _sentencepiece(described, prefix=metadata.get("tokenizer.ggml.add_space_prefix", True) is not False)
    if kind == "t5" and "scores" in described:
        return _unigram(described, metadata, path)
    return _by_transformers(described, metadata, path)


def _by_transformers(described: dict[str, Any], metadata: dict[str, Any], path: str) -> Any:
    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
    except ImportError:  # where transformers keeps it up to 5.17
        from transformers.integrations.ggml import convert_gguf_tokenizer

    try:
        backend, _ = convert_gguf_tokenizer(metadata.get("general.architecture", ""), described)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise Unsupported(
            f"{path}: transformers cannot build this tokenizer ({error}); pass the original model"
        ) from error
    return backend


def _byte_level(described: dict[str, Any], rule: str) -> Any:
    from tokenizers import Tokenizer, decoders, models

    tokens = _vocabulary(described)
    merges = [tuple(merge.split(" ", 1)) for merge in described.get("merges", [])]
    backend = Tokenizer(models.BPE(tokens, merges, ignore_merges=rule in WHOLE_TOKENS_FIRST))
    backend.pre_tokenizer = build(rule)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, described)
    return backend


def _sentencepiece(described: dict[str, Any], *, prefix: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = _vocabulary(described)
    listed = zip(described["tokens"], _kinds(described), strict=True)
    unknown = next((token for token, kind in listed if kind == UNKNOWN), "<unk>")
    backend = Tokenizer(
        models.BPE(
            tokens,
            _merges(described),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=unknown if unknown in tokens else None,
        )
    )
    first = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    _add_tokens(backend, described)
    return backend


def _merges(described: dict[str, Any]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, in the order in which llama.cpp prefers them."""
    normal = {
        token: score
        for token, score, kind in zip(described["tokens"], described["scores"], _kinds(described), strict=True)
        if kind == NORMAL and len(token) <= MAX_PIECE
    }
    found = [
        (-score, cut, token)
        for token, score in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    return [(token[:cut], token[cut:]) for _, cut, token in sorted(found)]


def _unigram(described: dict[str, Any], metadata: dict[str, Any], path: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if max(map(len, described["tokens"])) > MAX_PIECE:
        raise BadInput(f"{path}: a token of more than {MAX_PIECE} characters, which no Unigram has")
    kinds = _kinds(described)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", kinds.index(UNKNOWN) if UNKNOWN in kinds else None)
    if not all(math.isfinite(score) for score in described["scores"]):
        raise BadInput(f"{path}: tokenizer.ggml.scores holds values that are not finite")
    backend = Tokenizer(models.Unigram(list(zip(described["tokens"], described["scores"], strict=True)), unknown))
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
    if charsmap:
        try:
            backend.normalizer = normalizers.Precompiled(bytes(charsmap))
        except (ValueError, TypeError) as error:
            raise BadInput(f"{path}: tokenizer.ggml.precompiled_charsmap is damaged: {error}") from error
    scheme = "always" if metadata.get("tokenizer.ggml.add_space_prefix", True) is not False else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    _add_tokens(backend, described)
    return backend


def _vocabulary(described: dict[str, Any]) -> dict[str, int]:
    """Token -> id; of a token that is listed twice the first counts."""
    found: dict[str, int] = {}
    for index, token in enumerate(described["tokens"]):
        found.setdefault(token, index)
    return found


def _kinds(described: dict[str, Any]) -> list[int]:
    kinds: list[int] = described.get("token_type") or [NORMAL] * len(described["tokens"])
    return kinds


def _add_tokens(backend: Any, described: dict[str, Any]) -> None:
    """Tokens that are found in text before it is cut: control tokens, and those the model's authors added."""
    from tokenizers import AddedToken

    special, added = [], []
    for token, kind in zip(described["tokens"], _kinds(described), strict=True):
        if kind in (CONTROL, UNKNOWN) and token:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED and token:
            added.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(added)
