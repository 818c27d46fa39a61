"""fewbits bench kernels: our products on this GPU beside others', and the search for the fastest choices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.console import message, print_json, print_table
from fewbits.core.errors import BadInput, Unsupported

app = typer.Typer(help="Measure this machine.", no_args_is_help=True)


def _shapes(given: list[str]) -> dict[str, tuple[int, int]]:
    from fewbits.evaluation.kernel_speed import SHAPES

    found: dict[str, tuple[int, int]] = {}
    for text in given:
        parts = text.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise BadInput(f"a shape is OUTxIN, such as 4096x4096, not {text!r}")
        found[text] = int(parts[0]), int(parts[1])
    return found or dict(SHAPES)


def _tune(formats: list[str], shapes: dict[str, tuple[int, int]], tokens: list[int]) -> Path:
    import torch

    from fewbits.core.record import environment
    from fewbits.formats.scheme import parse_scheme
    from fewbits.kernels import KERNELS, LinearSpec, tuned
    from fewbits.kernels.cuda_fragments import layout_for
    from fewbits.kernels.fragment_layout import Layout
    from fewbits.kernels.tuning import tune

    device = torch.device("cuda", torch.cuda.current_device())
    layouts: list[Layout] = []
    for name in formats:
        scheme, columns = parse_scheme(name), max(k for _, k in shapes.values())
        spec = LinearSpec(
            format=scheme.weights,
            shape=(1, columns),
            device=device,
            dtype=torch.bfloat16,
            activations=scheme.activations,
        )
        answer, layout = KERNELS.get("cuda_fragments").accepts(spec), layout_for(spec)
        if not (answer and isinstance(layout, Layout)):
            raise Unsupported(f"{name} has no choices to search for: {answer}")
        if layout not in layouts:  # on some GPUs formats that differ in their inputs have the same
            layouts.append(layout)
    cases: list[dict[str, Any]] = []
    for layout in layouts:
        cases += tune(layout, list(shapes.values()), tokens, device, message)
    major, _ = torch.cuda.get_device_capability(device)
    return tuned.keep(torch.cuda.get_device_name(device), major, environment(), cases)


@app.command("kernels")
@guarded()
def kernels(
    format: Annotated[
        list[str] | None, typer.Option(help="FORMAT of ours, or FORMAT/INPUTS; repeat for several.")
    ] = None,
    shape: Annotated[list[str] | None, typer.Option(help="OUTxIN; repeat for several. Default: 8B and 70B.")] = None,
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, by commas.")] = "1,4,16,64,256,4096",
    tune: Annotated[bool, typer.Option("--tune", help="First search for the fastest choices, and keep them.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the record (JSON) here.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw time against tokens as NAME.svg and NAME.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The record on standard output.")] = False,
) -> None:
    """Time products of weights in few bits on this GPU, beside cuBLAS, FP8, and what else is installed."""
    import torch

    from fewbits.core.record import environment, write_json
    from fewbits.evaluation import kernel_speed
    from fewbits.report import kernel_speed as page

    if not torch.cuda.is_available():
        raise Unsupported("kernels are timed on a CUDA device, and torch sees none here")
    counts = tokens.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in counts):
        raise BadInput(f"--tokens takes numbers by commas, not {tokens!r}")
    numbers, shapes = [int(part) for part in counts], _shapes(shape or [])
    formats = format or list(kernel_speed.FORMATS)
    if tune:
        message(f"choices kept in {_tune(formats, shapes, numbers)}")
    device = torch.device("cuda", torch.cuda.current_device())
    record = {"environment": environment(), **kernel_speed.measure(formats, shapes, numbers, device, message)}
    if out is not None:
        write_json(out, record)
    if figure is not None:
        page.draw(record, figure.with_suffix(""))
    if as_json:
        print_json(record)
        return
    print_table(*page.table(record))
    print()
    print_table(*page.accuracy_table(record))
