"""The table of commands."""

from __future__ import annotations

import os

import typer

import fewbits
from fewbits.cli.bench import app as bench
from fewbits.cli.boundary import DEBUG
from fewbits.cli.chat import chat
from fewbits.cli.convert import convert
from fewbits.cli.demo import demo
from fewbits.cli.evaluate import evaluate
from fewbits.cli.generate import generate
from fewbits.cli.inspect import inspect
from fewbits.cli.listing import listing
from fewbits.cli.plan import plan
from fewbits.cli.quantize import quantize
from fewbits.cli.report import report
from fewbits.cli.study import app as study
from fewbits.cli.verify import verify

app = typer.Typer(
    name="fewbits",
    help="Make a large language model small and fast on the hardware at hand, and prove what that cost.\n\n"
    "MODEL is a directory of safetensors, a .gguf file, a hub id, or 'demo' for the embedded model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("inspect")(inspect)
app.command("plan")(plan)
app.command("quantize")(quantize)
app.command("convert")(convert)
app.command("eval")(evaluate)
app.command("report")(report)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("verify")(verify)
app.command("list")(listing)
app.command("demo")(demo)
app.add_typer(study, name="study")
app.add_typer(bench, name="bench")


def _version(asked: bool) -> None:
    if asked:
        print(fewbits.__version__)
        raise typer.Exit


@app.callback()
def settings(
    debug: bool = typer.Option(False, "--debug", envvar=DEBUG, help="Show the traceback of a failure."),
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_version, help="Print the version and exit."
    ),
) -> None:
    if debug:
        os.environ[DEBUG] = "1"
    else:
        # Other libraries' bars and hints would break into ours; set before they are imported.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warning when a process forks later
