"""fewbits quantize MODEL -o OUT"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.console import message, plus_minus, print_json
from fewbits.cli.progress import ProgressBar
from fewbits.cli.text import calibration_text
from fewbits.core.errors import BadInput
from fewbits.core.units import bytes_text, duration_text

FORMATS = ("auto", "compressed-tensors", "native", "gguf", "mxfp4")
_WORDS = {"true": True, "false": False, "none": None}  # in any case; as JSON writes them, JSON reads them


@guarded(resumes=True)
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id, or 'demo'.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write; a killed run resumes there.")],
    scheme: Annotated[
        str | None, typer.Option(help="Scheme (W4A16, FP8_DYNAMIC, …) or format name. Default: W4A16.")
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(help="In place of a scheme: bits per weight on average, best spread over the layers."),
    ] = None,
    within: Annotated[
        bool, typer.Option("--within", help="With --bits: let them vary within a linear, by groups of input channels.")
    ] = False,
    plan: Annotated[Path | None, typer.Option(help="In place of a scheme: a plan that `fewbits plan` wrote.")] = None,
    measurements: Annotated[
        Path | None, typer.Option(help="With --bits: what formats cost layers, read and added to.", show_default=False)
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="Steps, joined by commas (awq,gptq,learned): see `fewbits list methods`. Or auto: the best of some."
        ),
    ] = "gptq",
    minutes: Annotated[
        float | None,
        typer.Option(
            help="With --method auto: the time to be done in, trials included. Default: 6.", show_default=False
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="NAME=VALUE", help="Option of a step, or STEP.NAME=VALUE; may be repeated."),
    ] = None,
    experts: Annotated[
        str, typer.Option(help="Experts that saw few tokens: borrow the others' statistics, or go data-free.")
    ] = "borrow",
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Calibrate each linear on the quantized ones before it in its block.")
    ] = False,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Text file, may be repeated. Default: built-in text.", show_default=False),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    continuations: Annotated[
        int, typer.Option(help="Calibration text the original adds: each sequence continued so many times.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Chooses the sequences.")] = 0,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Layer to keep; 're:' starts a pattern; may be repeated. Replaces the default, lm_head."),
    ] = None,
    act_order: Annotated[
        bool | None, typer.Option("--act-order/--no-act-order", help="GPTQ: most important inputs first.")
    ] = None,
    damp: Annotated[float | None, typer.Option(help="GPTQ: damping, as a share of mean(diag H).")] = None,
    range: Annotated[
        str | None, typer.Option(help="How the range of a group is found: see `fewbits list ranges`.")
    ] = None,
    act_range: Annotated[
        str | None,
        typer.Option(
            help="Static activations (W8A8_STATIC, FP8): absmax, moving_average, delayed, percentile, mse, entropy, …",
            show_default=False,
        ),
    ] = None,
    eval_samples: Annotated[
        int | None, typer.Option(help="Held-out sequences to measure the loss on while quantizing; 0: none.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 for what is kept.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: chosen.")] = None,
    checkpoint_format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = "auto",
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what an unfinished run did; a finished OUT is kept.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Quantize MODEL to a checkpoint in OUT, layer by layer, with its certificate."""
    from fewbits.pipeline.quantize import quantize as run

    given = {
        "samples": samples,
        "sequence_length": sequence_length,
        "ignore": ignore,
        "eval_samples": eval_samples,
    }
    named = {"act_order": act_order, "damping": damp, "range": range}
    options = {**{name: value for name, value in named.items() if value is not None}, **parse_options(option or [])}
    text: Any = list(calibration) if calibration else None
    with ProgressBar() as bar:
        if continuations:
            settings = {"samples": samples, "sequence_length": sequence_length, "seed": seed, "device": device}
            text = calibration_text(model, text, continuations, out, report=bar, **settings)
            del given["samples"], given["sequence_length"]
        path = run(
            model,
            scheme,
            out=out,
            bits=bits,
            within=within,
            plan=plan,
            measurements=measurements,
            group_size=group_size,
            method=method,
            minutes=minutes,
            method_options=options,
            act_range=act_range,
            sequential=sequential,
            experts=experts,
            calibration=text,
            seed=seed,
            dtype=dtype,
            device=device,
            checkpoint_format=checkpoint_format,
            restart=restart,
            on_progress=bar,
            **{name: value for name, value in given.items() if value is not None},
        )
    summary = summarise(Path(path))
    if as_json:
        print_json(summary)
    else:
        tell(summary)


def parse_options(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE of each; values as JSON where they are (3, 0.5, true), Python's True, False and None, else text."""
    found: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise BadInput(f"--option {text!r}: write it as NAME=VALUE, e.g. rounds=5 or gptq.damping=0.02")
        try:
            found[name] = json.loads(value)
        except ValueError:  # no JSON, or a number of thousands of digits
            found[name] = _WORDS.get(value.lower(), value)
    return found


def summarise(out: Path) -> dict[str, Any]:
    """What a quantized directory's certificate says, in a few numbers."""
    certificate = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
    errors = [layer["relative_error"] for layer in certificate["layers"]]
    size = certificate["size"]
    return {
        "out": str(out),
        "scheme": certificate["scheme"],
        "method": certificate["method"],
        **({"auto": certificate["auto"]} if "auto" in certificate else {}),
        "bytes": size["bytes"],
        "source_bytes": size["source_bytes"],
        "source_bytes_16bit": size["source_bytes_16bit"],
        "bits_per_weight": size["bits_per_weight"],
        "bits_per_weight_model": size["bits_per_weight_model"],
        "layers": len(certificate["layers"]),
        "mean_relative_error": sum(errors) / len(errors) if errors else None,
        "evaluation": _evaluation(certificate),
        "fallbacks": certificate["fallbacks"],
        "seconds": certificate["seconds"],
        "peak_rss_bytes": certificate["peak_rss_bytes"],
    }


def _evaluation(certificate: dict[str, Any]) -> dict[str, Any] | None:
    """The measures taken while quantizing; None where that was turned off."""
    if not certificate["evaluations"]:
        return None
    first = certificate["evaluations"][0]
    return {name: first[name] for name in ("perplexity", "reference_perplexity", "kl", "top1")}


def tell(summary: dict[str, Any]) -> None:
    """The summary in a few lines on standard output; fallbacks are never left out."""
    size, dense = summary["bytes"], summary["source_bytes_16bit"]
    print(f"{summary['out']}: {bytes_text(size)}, {dense / size:.2f} times smaller than with 16 bits per weight")
    line = f"{summary['layers']} layers at {summary['bits_per_weight']:.2f} bits per weight"
    if summary["mean_relative_error"] is not None:
        line += f", mean relative output error {summary['mean_relative_error']:.4f}"
    print(f"{line}, in {duration_text(summary['seconds'])}")
    if choice := summary.get("auto"):
        print(choice["why"])
    if found := summary["evaluation"]:
        print(
            f"KL to the original {plus_minus(found['kl'])} nats per token; perplexity "
            f"{plus_minus(found['perplexity'], 2)} (original {plus_minus(found['reference_perplexity'], 2)})"
        )
    told = summary.get("auto", {}).get("why")
    for fallback in summary["fallbacks"]:
        if fallback != told:
            print(f"fallback: {fallback}")
    message(f"next: fewbits report {summary['out']}   fewbits generate {summary['out']} 'Hello'")
