"""How to load the checkpoint, as code to copy."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from fewbits.report.certificate import Certificate
from fewbits.report.words import esc


def ways_to_load(certificate: Certificate, directory: Path) -> str:
    """Blocks of code for transformers, vLLM and fewbits, with the directory's name in them."""
    name = directory.resolve().name
    # A path on the reader's machine: JSON's quoting is Python's for strings, and shlex's is the shell's.
    quoted, shell = json.dumps(name, ensure_ascii=False), shlex.quote(name)
    needs = "pip install fewbits" if certificate.native else "pip install transformers compressed-tensors"
    first = "import fewbits  # registers the format with transformers\n" if certificate.native else ""
    transformers = (
        f"# {needs}\n{first}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({quoted})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({quoted})"
    )
    fewbits = (
        f"import fewbits\n\nmodel, tokenizer = fewbits.load({quoted})\n\n"
        f"# or, in a shell\n# fewbits generate {shell} 'Hello'"
    )
    blocks = [("transformers", f"<pre><code>{esc(transformers)}</code></pre>")]
    if certificate.native:
        note = "vLLM does not read the native format; it does read schemes such as W4A16."
        blocks.append(("vLLM", f"<p>{esc(note)}</p>"))
    else:
        serve = f"vllm serve {shell}\n\n# or in Python\nfrom vllm import LLM\n\nllm = LLM({quoted})"
        blocks.append(("vLLM", f"<pre><code>{esc(serve)}</code></pre>"))
    blocks.append(("fewbits", f"<pre><code>{esc(fewbits)}</code></pre>"))
    return '<div class="ways">' + "".join(f"<div><h3>{title}</h3>{code}</div>" for title, code in blocks) + "</div>"
