"""The rules by which text is cut before merges apply, and llama.cpp's names for them (``tokenizer.ggml.pre``).

A rule is a sequence of regular expressions, each cutting what the one before left. llama.cpp has them built in, under
the name of the first model that came with one; tokenizer.json spells them out. A wrong rule gives other tokens
without a sound, so both directions go through this table, and what is not in it is refused.
"""

from __future__ import annotations

import json
from typing import Any

from fewbits.core.errors import Unsupported

_LETTERS = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_ENDINGS}|{_LETTERS}\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_CASED = (
    rf"{_LETTERS}{_UPPER}*{_LOWER}+%s|{_LETTERS}{_UPPER}+{_LOWER}*%s|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
)
GPT2 = "GPT-2's rule"  # built into the ByteLevel of tokenizer.json
DIGIT = "digits one by one"

RULES: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2,),
    "smollm": (DIGIT, GPT2),
    "llama-bpe": (_WORDS % "{1,3}",),
    "qwen2": (_WORDS % "",),
    "tekken": (_CASED % ("", "", ""),),
    "gpt-4o": (_CASED % (f"{_ENDINGS}?", f"{_ENDINGS}?", "{1,3}"),),
}
# Other names llama.cpp has for the same rules.
_ALIASES = {
    "gpt-2": ("phi-2", "jina-v2-code"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral"),
    "qwen2": ("deepseek-r1-qwen",),
    "gpt-4o": ("llama4",),
}
# Names under which llama.cpp takes a piece that is a token whole, whatever the merges say.
WHOLE_TOKENS_FIRST = ("llama-bpe", "tekken")


def called(name: str) -> str | None:
    """The name in `RULES` that `name` is another word for; None where llama.cpp's rule is not known here."""
    if name in RULES:
        return name
    return next((known for known, others in _ALIASES.items() if name in others), None)


def name_of(pre_tokenizer: dict[str, Any] | None, where: str) -> str:
    """llama.cpp's name for the rule that tokenizer.json has as `pre_tokenizer`; Unsupported where there is none."""
    rules = tuple(_cuts(pre_tokenizer, where))
    for name, known in RULES.items():
        if rules == known:
            return name
    raise Unsupported(
        f"{where}: text is cut by {' then '.join(rules)[:300] or 'nothing'} before merges, which llama.cpp has no name "
        f"for that fewbits knows; known: {', '.join(RULES)}"
    )


def _cuts(rule: dict[str, Any] | None, where: str) -> list[str]:
    """What a pre-tokenizer cuts by, in order; Unsupported for one that changes text otherwise."""
    if rule is None:
        return []
    kind = rule.get("type")
    if kind == "Sequence":
        return [found for part in rule["pretokenizers"] for found in _cuts(part, where)]
    if kind == "ByteLevel" and not rule.get("add_prefix_space"):
        return [GPT2] if rule.get("use_regex", True) else []
    if kind == "Digits" and rule.get("individual_digits"):
        return [DIGIT]
    pattern = rule.get("pattern", {}).get("Regex")
    if kind == "Split" and pattern and rule.get("behavior") == "Isolated" and not rule.get("invert"):
        return [pattern]
    raise Unsupported(f"{where}: the tokenizer's {json.dumps(rule)[:200]} has no counterpart in llama.cpp")


def build(name: str) -> Any:
    """The pre-tokenizer of a name in `RULES`, bytes as letters included."""
    from tokenizers import Regex, pre_tokenizers

    parts: list[Any] = []
    for rule in RULES[name]:
        if rule == DIGIT:
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif rule != GPT2:
            parts.append(pre_tokenizers.Split(Regex(rule), "isolated"))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=RULES[name][-1] == GPT2)
    return pre_tokenizers.Sequence([*parts, last])
