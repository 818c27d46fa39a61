"""A conversation: messages, and answers streamed.

Every turn hands the whole conversation to the chat template. The decode engine recognises the part it has
read already, so a turn costs its own tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fewbits.core.errors import BadInput
from fewbits.runtime.generate import Stream, stream


class Chat:
    """`say(text)` yields the answer piece by piece; `messages` is the conversation so far.

    options: those of `fewbits.runtime.generate.stream`. Raises BadInput where the tokenizer has no chat
    template.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, system: str | None = None, **options: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise BadInput("this model's tokenizer has no chat template: it is no chat model; use `generate`")
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.last: Stream | None = None

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text`. An answer broken off (Ctrl-C) stays in the conversation as far as it came."""
        asked = [*self.messages, {"role": "user", "content": text}]
        self.last = answer = stream(self._model, self._tokenizer, asked, **self._options)
        self.messages = asked
        try:
            yield from answer
        finally:
            self.messages.append({"role": "assistant", "content": answer.text.strip()})
