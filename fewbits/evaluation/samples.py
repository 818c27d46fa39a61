"""Greedy completions of a few fixed prompts: what the numbers look like in words.

Greedy, so that nothing is left to chance: two models that agree write the same text, and the first word
that differs is where their most likely tokens part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a small boat in a storm.",
    "A train leaves at 9:40 and arrives at 11:05. How long does the journey take?",
)


def complete(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = 48,
) -> list[str]:
    """The greedy completion of each prompt, without the prompt, by transformers' `generate`.

    Prompts go through the tokenizer's chat template where it has one; otherwise they are continued as text.
    """
    chat = bool(getattr(tokenizer, "chat_template", None))
    training = model.training
    model.eval()
    completions = []
    try:
        for prompt in prompts:
            inputs = _encode(tokenizer, prompt, chat).to(next(model.parameters()).device)
            with torch.inference_mode():
                output = model.generate(
                    input_ids=inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    # Greedy ignores these; left in, a checkpoint's own values would be warned about.
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=_padding(tokenizer),
                )
            written = output[0, inputs.shape[1] :]
            completions.append(tokenizer.decode(written, skip_special_tokens=True).strip())
    finally:
        model.train(training)
    return completions


def _encode(tokenizer: Any, prompt: str, chat: bool) -> torch.Tensor:
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The template has written the special tokens already.
    ids = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    return torch.tensor([ids], dtype=torch.int64)


def _padding(tokenizer: Any) -> int | None:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
