"""The tokenizer a GGUF file carries in its ``tokenizer.*`` keys, as a transformers tokenizer.

transformers knows how to build the common kinds from such lists. It leaves the pre-tokenizer, the rule by
which text is cut before merges apply, at GPT-2's for names it does not list; a family of models that cut
numbers into single digits is corrected here (llama.cpp calls them by `DIGIT_SPLITTERS` in
``tokenizer.ggml.pre``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fewbits.core.errors import BadInput, Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGIT_SPLITTERS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
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

    try:
        from transformers.integrations.gguf import convert_gguf_tokenizer
    except ImportError:  # where transformers keeps it up to 5.17
        from transformers.integrations.ggml import convert_gguf_tokenizer

    described = _described(metadata, path)
    options = _special_tokens(metadata, described["tokens"], path)
    try:
        backend, _ = convert_gguf_tokenizer(metadata.get("general.architecture", ""), described)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise Unsupported(
            f"{path}: transformers cannot build this tokenizer ({error}); pass the original model"
        ) from error
    if described.get("pre_tokenizer_type") in DIGIT_SPLITTERS:
        _split_digits(backend)
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        options["chat_template"] = template
    for key in ("add_bos_token", "add_eos_token"):
        if isinstance(metadata.get(f"tokenizer.ggml.{key}"), bool):
            options[key] = metadata[f"tokenizer.ggml.{key}"]
    if described["tokenizer_type"] == "llama":
        options.setdefault("add_bos_token", True)  # llama.cpp's rule for files without the key
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=context, clean_up_tokenization_spaces=False, **options
    )


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


def _split_digits(backend: Any) -> None:
    from tokenizers import pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
