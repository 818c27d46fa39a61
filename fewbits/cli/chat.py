"""fewbits chat MODEL: a line is a message, the answer streams; end of input leaves."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.console import message
from fewbits.cli.generate import speed


@guarded()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id, or 'demo'.")],
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens per answer, at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 picks the most likely token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this sum.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    kv: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Store keys and values in few bits: int8, fp8, int4, int2, …")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a turn.")] = False,
) -> None:
    """Talk to MODEL; it must have a chat template."""
    from fewbits.runtime.chat import Chat
    from fewbits.runtime.load import load

    loaded, tokenizer = load(model, device=device)
    talk = Chat(
        loaded,
        tokenizer,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        kv=kv,
    )
    message("one message a line; Ctrl-D leaves, Ctrl-C breaks an answer off")
    for text in _messages():
        if as_json:
            answer = "".join(talk.say(text))
            print(json.dumps({"user": text, "assistant": answer, **talk.last.stats.to_dict()}), flush=True)
        else:
            _answer(talk, text)


def _messages() -> Iterator[str]:
    """Lines that hold something, from a terminal (with editing) or a pipe, until there are no more."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` line editing
    while True:
        try:
            text = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            message("")
            return
        if not sys.stdin.isatty() and not text:
            return
        if text.strip():
            yield text.strip()


def _answer(talk: Any, text: str) -> None:
    """Prints the answer as it comes; Ctrl-C keeps what there is of it."""
    with contextlib.closing(talk.say(text)) as pieces:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" …", end="")
    print()
    message(speed(talk.last))
