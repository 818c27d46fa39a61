"""A tokenizer as GGUF's ``tokenizer.*`` keys: what ``tokenizer.json`` says, in llama.cpp's terms.

Three kinds of models have a counterpart there:

| tokenizer.json | llama.cpp | carried as |
|---|---|---|
| BPE on bytes written as letters (ByteLevel) | gpt2 | tokens, merges, the name of the rule that cuts text before |
| BPE with byte fallback and blanks as "▁" | llama | tokens, scores: the rank of a token's first merge, negated |
| Unigram | t5 | tokens, log-probabilities, the map of characters |

llama.cpp knows the rules by which text is cut only by name (gguf_pretokenizers.py). One difference is left: where a
Unigram puts a blank before text that starts with one already, tokenizer.json may not, and llama.cpp does.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from fewbits.checkpoints.gguf_pretokenizers import WHOLE_TOKENS_FIRST, name_of
from fewbits.checkpoints.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from fewbits.checkpoints.gguf_write import Typed
from fewbits.core.errors import BadInput, Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}


def tokenizer_keys(tokenizer: PreTrainedTokenizerBase, rows: int, where: str) -> dict[str, Any]:
    """The ``tokenizer.*`` keys of `tokenizer`, its list of tokens filled up to the embeddings' `rows`.

    Raises Unsupported, with the part that has no counterpart, for a tokenizer llama.cpp cannot follow.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Unsupported(f"{where}: the tokenizer has no tokenizer.json; save it as a fast tokenizer first")
    state = json.loads(backend.to_str())
    model = state["model"]
    kind = model.get("type")
    tokens = _tokens(tokenizer, rows, where)
    if kind == "BPE" and model.get("byte_fallback"):
        keys = _sentencepiece(state, tokens, where)
    elif kind == "BPE":
        keys = _byte_level(state, where)
    elif kind == "Unigram":
        keys = _unigram(state, tokens, where)
    else:
        raise Unsupported(f"{where}: a {kind} tokenizer; GGUF is written for BPE and Unigram")
    keys["tokenizer.ggml.tokens"] = tokens
    keys["tokenizer.ggml.token_type"] = Typed(_types(state, tokens, keys["tokenizer.ggml.model"]), "i32")
    for name, attribute in _SPECIAL.items():
        index = getattr(tokenizer, attribute)
        if isinstance(index, int) and 0 <= index < rows:
            keys[f"tokenizer.ggml.{name}_token_id"] = index
    keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"] = _ends(tokenizer)
    return keys | _templates(tokenizer)


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int, where: str) -> list[str]:
    found = {index: token for token, index in tokenizer.get_vocab().items()}
    if found and max(found) >= rows:
        raise BadInput(f"{where}: the tokenizer has token id {max(found)}, the embeddings only {rows} rows")
    return [found.get(index, f"[PAD{index}]") for index in range(rows)]


def _types(state: dict[str, Any], tokens: list[str], model: str) -> list[int]:
    """NORMAL, except for what the file says of a token, and bytes where the model falls back to them."""
    vocabulary = state["model"]["vocab"]  # of a Unigram a list
    known = set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
    types = [NORMAL if index in known else UNUSED for index in range(len(tokens))]
    if model == "llama":
        for index, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[index] = BYTE
    for added in state.get("added_tokens") or []:
        if added["id"] < len(tokens):
            types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = state["model"].get("unk_token") or state["model"].get("unk_id")
    if model != "gpt2" and unknown is not None:
        index = unknown if isinstance(unknown, int) else tokens.index(unknown)
        types[index] = UNKNOWN
    return types


def _byte_level(state: dict[str, Any], where: str) -> dict[str, Any]:
    _check_normalizer(state, ("NFC",), where)
    name = name_of(state.get("pre_tokenizer"), where)
    if state["model"].get("ignore_merges") and name not in WHOLE_TOKENS_FIRST:
        raise Unsupported(f"{where}: the tokenizer takes whole words before merges, which llama.cpp's {name} does not")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(_pair(merge)) for merge in state["model"]["merges"]],
    }


def _pair(merge: Any) -> tuple[str, str]:
    """A merge as two tokens; older files join them by a blank."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _sentencepiece(state: dict[str, Any], tokens: list[str], where: str) -> dict[str, Any]:
    _check_normalizer(state, ("Prepend", "Replace"), where)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(state["model"]["merges"]):
        ranks.setdefault("".join(_pair(merge)), rank)
    # llama.cpp joins the pair whose token scores highest; a token without a merge is never the result of a join.
    scores = [float(-ranks[token]) if token in ranks else float(-len(ranks) - 1) for token in tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _prefixed(state),
    }


def _prefixed(state: dict[str, Any]) -> bool:
    """Whether a blank is put before the text."""
    parts = _normalizers(state.get("normalizer"))
    rule = state.get("pre_tokenizer") or {}
    first = [rule, *(rule.get("pretokenizers") or [])]
    metaspace = any(
        part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in first
    )
    return metaspace or any(part.get("type") == "Prepend" for part in parts)


def _normalizers(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if normalizer is None:
        return []
    if normalizer.get("type") == "Sequence":
        return [found for part in normalizer["normalizers"] for found in _normalizers(part)]
    return [normalizer]


def _check_normalizer(state: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for part in _normalizers(state.get("normalizer")):
        blanks = part.get("type") != "Replace" or (part["pattern"].get("String"), part["content"]) == (" ", "▁")
        if part.get("type") not in known or not blanks:
            raise Unsupported(f"{where}: the tokenizer's {json.dumps(part)[:200]} has no counterpart in llama.cpp")


def _unigram(state: dict[str, Any], tokens: list[str], where: str) -> dict[str, Any]:
    _check_normalizer(state, ("Precompiled", "Replace", "Prepend"), where)
    if state["model"].get("byte_fallback"):
        raise Unsupported(f"{where}: a Unigram tokenizer that falls back to bytes, which llama.cpp's does not")
    scores = {token: float(score) for token, score in state["model"]["vocab"]}
    lowest = min(scores.values(), default=0.0)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [scores.get(token, lowest) for token in tokens],
        "tokenizer.ggml.add_space_prefix": _prefixed(state),
        "tokenizer.ggml.remove_extra_whitespaces": False,
    }
    for part in _normalizers(state.get("normalizer")):
        if part.get("type") == "Precompiled" and part.get("precompiled_charsmap"):
            raw = base64.b64decode(part["precompiled_charsmap"])
            keys["tokenizer.ggml.precompiled_charsmap"] = Typed(raw, "u8")
    return keys


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether encoding a text puts the beginning and the end token around it."""
    ids = list(tokenizer("a").input_ids)
    first = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    last = len(ids) > 1 and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    return first, last


def _templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    if not isinstance(template, dict):
        return {}
    named = {f"tokenizer.chat_template.{name}": text for name, text in template.items() if name != "default"}
    if named:
        named["tokenizer.chat_templates"] = [key.rpartition(".")[2] for key in named]
    return {**({"tokenizer.chat_template": template["default"]} if "default" in template else {}), **named}
