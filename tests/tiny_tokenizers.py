"""Small trained tokenizers of the kinds models have: byte-level BPE, BPE with byte fallback, Unigram."""

from __future__ import annotations

import json
from typing import Any

LINES = [
    "the cat sat on the mat and the dog sat there too",
    "two naïve cafés sold 1234 cups of coffee for 56 euros",
    "def main(): return [x for x in range(10) if x % 2]",
] * 20
TEXTS = ["the cat sat on  the mat", "café 1999 tēst\n\n x", "ünknown → 猫 sat", "a", " leading and trailing "]


def byte_level(rule: str | None = None, *, whole: bool = False) -> Any:
    """Byte-level BPE; `rule`: a regular expression text is cut by, or None for GPT-2's."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(ignore_merges=whole))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule is None)
    parts = [] if rule is None else [pre_tokenizers.Split(Regex(rule), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*parts, last]) if parts else last
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")


def sentencepiece(*, prefix: bool = True) -> Any:
    """BPE that falls back to bytes, blanks as "▁", as Llama 2 (`prefix`) and Gemma have."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    parts = [normalizers.Prepend("▁")] if prefix else []
    normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    first = Tokenizer(models.BPE())
    first.normalizer = normalizer
    first.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=300, show_progress=False, max_token_length=8))
    learned = json.loads(first.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in learned["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizer
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )


def unigram() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
