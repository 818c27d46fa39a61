"""fewbits demo: the main job, end to end, on the embedded model.

Quantize with round-to-nearest and with GPTQ; measure both against the original on text that calibration never
saw; write the certificate's page; generate; time the original and both side by side; print one table. The
record behind the README's table is made by the same command (benchmarks/bench_demo.py).
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.certify import add_to_certificate, read_certificate
from fewbits.cli.console import message, plus_minus, print_json, print_table
from fewbits.cli.generate import speed
from fewbits.cli.progress import ProgressBar
from fewbits.core.record import environment, write_json
from fewbits.core.units import bytes_text, duration_text

MODEL = "demo"
ORIGINAL = "original"
LABELS = {"rtn": "round-to-nearest", "gptq": "GPTQ"}
PROMPT = "Explain in two sentences why the sky is blue."
SHOWN_TOKENS = 80  # of the completion that is printed
COLUMNS = ("", "size", "bits per weight", "perplexity", "KL to the original", "same top token", "tokens/s")
TIMED_TOKENS = 64  # of each timed completion


@guarded(resumes=True)
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory for the checkpoints and the report.")] = Path(
        "fewbits-demo"
    ),
    scheme: Annotated[str, typer.Option(help="Scheme or format name.")] = "W4A16_ASYM",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Do the main job on the embedded model: quantize, measure, report, generate, and a table at the end."""
    seconds: dict[str, float] = {}
    directories = _quantize(out, scheme, group_size, seconds)
    evaluations = _evaluate(directories, seconds)
    _complete(directories["gptq"], seconds)
    rates = _generate(directories, seconds)
    record = _record(directories, evaluations, rates, seconds)
    _certify(directories, evaluations, record)
    report = _report(directories["gptq"])
    write_json(out / "demo.json", record)
    if as_json:
        print_json(record)
        return
    _tell(record)
    print(f"\ncheckpoint  {directories['gptq']}")
    print(f"report      {report}")
    print(f"try         fewbits chat {directories['gptq']}")


def _step(text: str) -> None:
    message(f"\n== {text}")


def _quantize(out: Path, scheme: str, group_size: int, seconds: dict[str, float]) -> dict[str, Path]:
    from fewbits.pipeline.quantize import quantize

    directories = {}
    for method, label in LABELS.items():
        _step(f"quantize to {scheme}, group size {group_size}, with {label}")
        began = time.monotonic()
        with ProgressBar() as bar:
            directories[method] = Path(
                quantize(
                    MODEL,
                    scheme,
                    group_size=group_size,
                    method=method,
                    out=out / method,
                    eval_samples=0,  # the written checkpoints are measured below
                    on_progress=bar,
                )
            )
        # The certificate's own figure holds where this run found the work done already.
        seconds[f"quantize {label}"] = read_certificate(directories[method])["seconds"]
        message(f"{directories[method]} in {duration_text(time.monotonic() - began)}")
    return directories


def _evaluate(directories: dict[str, Path], seconds: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Evaluations of both checkpoints against one pass of the original."""
    from fewbits.evaluation import evaluate, remember

    _step("measure what was lost, on held-out text")
    began = time.monotonic()
    found = {}
    with ProgressBar() as bar, remember(MODEL, progress=bar.step) as reference:
        for method, directory in directories.items():
            result = evaluate(str(directory), against=reference, what=LABELS[method], progress=bar.step)
            found[method] = result.to_dict()
    seconds["evaluate"] = time.monotonic() - began
    return found


def _certify(directories: dict[str, Path], evaluations: dict[str, dict[str, Any]], record: dict[str, Any]) -> None:
    """Enters what was measured, with size and speed, in the certificates: GPTQ's holds all three rows."""
    original, *quantized = record["rows"]
    measured = ("bytes", "bits_per_weight", "tokens_per_second")
    entries = {
        method: {**evaluations[method], "what": method, **{name: row[name] for name in measured}}
        for method, row in zip(LABELS, quantized, strict=True)
    }
    reference = {
        **evaluations["gptq"],
        "what": ORIGINAL,
        "model": MODEL,
        "perplexity": original["perplexity"],
        **dict.fromkeys(("kl", "top1", "reference_perplexity")),
        "kl_by_position": [],
        **{name: original[name] for name in measured},
    }
    add_to_certificate(directories["rtn"], evaluations=[reference, entries["rtn"]])
    add_to_certificate(directories["gptq"], evaluations=[reference, *entries.values()])


def _complete(directory: Path, seconds: dict[str, float]) -> None:
    """Greedy completions of the original and of the quantized model, side by side in the certificate."""
    from fewbits.evaluation import complete
    from fewbits.evaluation.samples import PROMPTS
    from fewbits.runtime.load import load

    _step("completions of both, for the report")
    began = time.monotonic()
    texts = {}
    for name, path in (("original", MODEL), ("quantized", str(directory))):
        texts[name] = complete(*load(path))
    samples = [
        {"prompt": prompt, "original": original, "quantized": quantized}
        for prompt, original, quantized in zip(PROMPTS, texts["original"], texts["quantized"], strict=True)
    ]
    add_to_certificate(directory, samples=samples)
    seconds["completions"] = time.monotonic() - began


def _generate(directories: dict[str, Path], seconds: dict[str, float]) -> dict[str, float | None]:
    """Streams one completion of the quantized model; then tokens per second of all three, taken in turns."""
    import torch

    from fewbits.cli.speed import side_by_side, transformers_rate
    from fewbits.runtime.generate import stream
    from fewbits.runtime.load import load

    began = time.monotonic()
    models = {method: load(directory) for method, directory in directories.items()}
    _step(f"generate with the quantized model: {PROMPT!r}")
    shown = stream(*models["gptq"], [{"role": "user", "content": PROMPT}], max_new_tokens=SHOWN_TOKENS)
    for piece in shown:
        print(piece, end="", file=sys.stderr, flush=True)
    message(f"\n{speed(shown)}")

    _step(f"tokens per second: bfloat16 through transformers, 4 bits through fewbits, {TIMED_TOKENS} tokens")
    models[ORIGINAL] = load(MODEL, dtype=torch.bfloat16)

    def timed(method: str) -> float | None:
        found = stream(*models[method], PROMPT, max_new_tokens=TIMED_TOKENS, ignore_eos=True)
        for _ in found:
            pass
        return found.stats.decode_rate

    runs = {method: functools.partial(timed, method) for method in directories}
    runs[ORIGINAL] = functools.partial(transformers_rate, *models[ORIGINAL], PROMPT, TIMED_TOKENS)
    rates = side_by_side(runs)
    seconds["generate"] = time.monotonic() - began
    return rates


def _report(directory: Path) -> Path:
    from fewbits.report.html import write_report

    _step("write the report")
    return write_report(directory)


def _record(
    directories: dict[str, Path],
    evaluations: dict[str, dict[str, Any]],
    rates: dict[str, float | None],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What `demo.json` holds: one row a model, and what is needed to judge the figures."""
    certificates = {method: read_certificate(directory) for method, directory in directories.items()}
    certificate, evaluation = certificates["gptq"], evaluations["gptq"]
    rows = [
        {
            "model": "original, bfloat16",
            "bytes": certificate["size"]["source_bytes_16bit"],
            "bits_per_weight": 16.0,
            "perplexity": evaluation["reference_perplexity"],
            "kl": None,
            "top1": None,
            "tokens_per_second": rates[ORIGINAL],
        }
    ]
    for method, label in LABELS.items():
        size = certificates[method]["size"]
        rows.append(
            {
                "model": label,
                "bytes": size["bytes"],
                "bits_per_weight": size["bits_per_weight"],
                "perplexity": evaluations[method]["perplexity"],
                "kl": evaluations[method]["kl"],
                "top1": evaluations[method]["top1"],
                "tokens_per_second": rates[method],
            }
        )
    return {
        "scheme": certificate["scheme"]["name"],
        "format": certificate["scheme"]["weights"],
        "rows": rows,
        "text": evaluation["text"],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_rss_bytes": {LABELS[method]: found["peak_rss_bytes"] for method, found in certificates.items()},
        "fallbacks": certificate["fallbacks"],
        "environment": environment(),
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the record under `COLUMNS`."""
    return (
        row["model"],
        bytes_text(row["bytes"]),
        f"{row['bits_per_weight']:.2f}",
        plus_minus(row["perplexity"], 2),
        plus_minus(row["kl"]),
        f"{row['top1']['mean']:.1%}" if row["top1"] else "-",
        "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.1f}",
    )


def _tell(record: dict[str, Any]) -> None:
    print(f"\n{MODEL}: {record['scheme']}, {record['format']}\n")
    print_table(COLUMNS, map(cells, record["rows"]))
    text = record["text"]
    print(
        "\nBits per weight of the quantized layers; the size includes the embeddings, which stay in 16 bits.\n"
        f"KL in nats per token over {text['tokens']} tokens of held-out text, ± one standard error. Tokens/s at\n"
        "batch 1: the original through transformers' generate, the others through fewbits, in turns."
    )
    peak = max(record["peak_rss_bytes"].values())
    times = ", ".join(f"{name} {duration_text(value)}" for name, value in record["seconds"].items())
    print(f"Time: {times}. Peak memory of quantizing: {peak / 2**30:.2f} GiB.")
