"""fewbits plan MODEL --bits 3.5"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.console import message, print_json, print_table
from fewbits.cli.progress import ProgressBar
from fewbits.core.errors import MissingExtra


@guarded(resumes=True)
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, .gguf file, hub id, or 'demo'.")],
    bits: Annotated[float, typer.Option(help="Bits per weight on average, scales and zero points included.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Plan to write; its figure goes beside it.")] = Path(
        "plan.json"
    ),
    format: Annotated[
        list[str] | None,
        typer.Option(
            help="Format to choose from, or a mix such as int4-g64@25+int3-g64; may be repeated. Default: int2 to int8 "
            "under groups of 64."
        ),
    ] = None,
    within: Annotated[
        bool,
        typer.Option(
            "--within", help="Let bits vary within a linear too: its dearest input channels in a wider format."
        ),
    ] = False,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale, in the default formats.")] = None,
    target: Annotated[
        str, typer.Option(help="Who must be able to use it: any, compressed-tensors, vllm, or here (packed kernels).")
    ] = "any",
    measurements: Annotated[
        Path | None,
        typer.Option(help="What formats cost layers, read and added to. Default: beside the plan.", show_default=False),
    ] = None,
    method: Annotated[str, typer.Option(help="How codes are chosen while measuring: gptq or rtn.")] = "gptq",
    calibration: Annotated[
        list[Path] | None,
        typer.Option(help="Text file, may be repeated. Default: built-in text.", show_default=False),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the sequences.")] = 0,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Layer to keep; 're:' starts a pattern; may be repeated. Replaces the default, lm_head."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 for what is kept.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, … Default: chosen.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Choose the format of every layer so that MODEL loses least at an average number of bits.

    What every format costs every group of layers is measured once; other budgets reuse it.
    """
    from fewbits.pipeline.planning import plan as run

    with ProgressBar(quiet=as_json) as bar:
        found = run(
            model,
            bits,
            formats=format or (),
            group_size=group_size,
            within=within,
            target=target,
            measurements=measurements or out.with_suffix(".measurements.json"),
            method=method,
            calibration=list(calibration) if calibration else None,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            dtype=dtype,
            device=device,
            on_progress=bar,
            **({"ignore": ignore} if ignore is not None else {}),
        )
    found.write(out)
    if as_json:
        print_json(found.raw)
    else:
        tell(found.raw)
    _draw(found.raw, out)
    message(f"next: fewbits quantize {model} --plan {out} -o OUT")


def _draw(raw: dict[str, Any], out: Path) -> None:
    from fewbits.report.figure import save
    from fewbits.report.plan_figure import draw, height

    try:
        paths = save(out.with_suffix(""), lambda canvas, wide: draw(canvas, wide, raw), height(raw))
    except MissingExtra as error:
        message(f"no figure: {error}")
        return
    message(f"figure: {', '.join(map(str, paths))}")


def tell(raw: dict[str, Any]) -> None:
    """The plan in two tables on standard output."""
    heads = ("group", "format", "bits", "loss, nats", "output error", "fewer bits add", "more bits save")
    print_table(heads, _rows(raw["groups"]))
    if raw["price"]:
        print(f"(times: against {1e6 * raw['price']:.2g} nats per million bits, which the next bits save at best)")
    for group in raw["groups"]:
        for format, why in group["refused"].items():
            print(f"not for {group['name']}: {format}, {why}")
    print()
    print_table(("format", "groups", "weights"), _formats(raw))
    print(
        f"\n{raw['average']:.4f} bits per weight of {raw['bits']:g} asked for; predicted KL to the original "
        f"{raw['predicted_kl']:.4f} nats per token"
        + ("" if raw["gap"] == 0 else f" (within {raw['gap']:.1%} of least)")
    )
    if raw["average"] < raw["bits"] - 0.01:
        print("Less than asked for: " + ("every group has its best format" if not raw["price"] else "nothing fits"))


def _rows(groups: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            group["name"],
            group["format"],
            f"{group['bits']:.3f}",
            f"{group['loss']:.2e}",
            f"{100 * group['error']:.3g} %",
            _step(group["down"]),
            _step(group["up"]),
        )
        for group in groups
    ]


def _step(step: dict[str, Any] | None) -> str:
    if step is None:
        return "-"
    return f"{step['nats']:.1e}" + ("" if step["price"] is None else f" ({step['price']:.2g} times)")


def _formats(raw: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for format in raw["formats"]:
        taken = [group for group in raw["groups"] if group["format"] == format]
        if taken:
            share = sum(group["weights"] for group in taken) / raw["weights"]
            rows.append((format, str(len(taken)), f"{100 * share:.1f} %"))
    return rows
