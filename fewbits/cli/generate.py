"""fewbits generate MODEL PROMPT"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.console import message, print_json


@guarded()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id, or 'demo'.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; '-' reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 picks the most likely token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this sum.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put PROMPT through the model's chat template.")] = False,
    kv: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Store keys and values in few bits: int8, fp8, int4, int2, …")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print text and timings as JSON when done.")] = False,
) -> None:
    """Continue PROMPT with MODEL, token by token; the speed goes to standard error."""
    from fewbits.runtime.generate import stream
    from fewbits.runtime.load import load

    text = sys.stdin.read() if prompt == "-" else prompt
    loaded, tokenizer = load(model, device=device)
    found = stream(
        loaded,
        tokenizer,
        [{"role": "user", "content": text}] if chat else text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        kv=kv,
    )
    for piece in found:
        if not as_json:
            print(piece, end="", flush=True)
    if as_json:
        print_json({"prompt": text, "text": found.text, "runner": found.runner, **found.stats.to_dict()})
        return
    print()
    message(speed(found))


def speed(found: Any) -> str:
    """One line on a finished `Stream`: how many tokens, how fast, by what."""
    stats = found.stats
    parts = [f"{stats.new_tokens} tokens"]
    if stats.decode_rate is not None:
        parts.append(f"{stats.decode_rate:.1f} tokens/s")
    if stats.prefill_rate is not None:
        parts.append(f"prompt of {stats.prompt_tokens} read at {stats.prefill_rate:.0f} tokens/s")
    if stats.stopped == "context":
        parts.append("stopped: the model has no more positions")
    return f"[{', '.join(parts)}; {found.runner}]"
