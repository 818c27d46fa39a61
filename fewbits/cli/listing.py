"""fewbits list WHAT: what this installation knows, from the tables the code itself uses."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fewbits.cli.boundary import guarded
from fewbits.cli.console import message, print_json, print_table
from fewbits.core.errors import unknown

Row = dict[str, Any]

# Stands for the layers of a model of a few billion parameters; kernels refuse by divisibility, not by size.
SHAPE = (4096, 4096)
_OFFSETS = {(False, False): "-", (True, False): "zero point", (False, True): "minimum"}
COMMON_FORMATS = (
    "int4-g64",
    "int4-g128",
    "int4-asym-g64",
    "int8-channel",
    "int3-g64",
    "nf4-g64",
    "fp8_e4m3-channel",
    "fp4_e2m1-g16",
)
BOTH_SIDES = ("W8A8", "W4A8")  # schemes that round the inputs too
# What no codec of quantized models is for.
CHECKPOINTS: tuple[Row, ...] = (
    {"checkpoint": "safetensors", "reads": "yes", "writes": "-", "holds": "dense float32, bfloat16, float16"},
    {
        "checkpoint": "gguf",
        "reads": "yes",
        "writes": "yes",
        "holds": "legacy, K and ternary types, IQ4_NL, MXFP4; i-quants are read only; runs in llama.cpp",
    },
)


def _summary(thing: type) -> str:
    """The first line of the module `thing` is taught in."""
    return (sys.modules[thing.__module__].__doc__ or "").strip().split("\n")[0].rstrip(".")


def formats() -> list[Row]:
    from fewbits.formats import known_formats, parse_format

    shape = SHAPE
    rows = []
    for name in known_formats():
        format = parse_format(name)
        rows.append(
            {
                "format": name,
                "bits": format.bits,
                "levels": len(format.grid.levels),
                "kind": format.grid.kind,
                "offset": _OFFSETS[format.scaling.zero_point, format.scaling.minimum],
                "bits per weight": round(format.bits_per_weight(shape), 3),
            }
        )
    return rows


def schemes() -> list[Row]:
    from fewbits.formats import SCHEMES

    return [
        {"scheme": name, "weights": weights, "activations": activations or "16-bit"}
        for name, (weights, activations) in SCHEMES.items()
    ]


def methods() -> list[Row]:
    from fewbits.algorithms import METHODS
    from fewbits.algorithms.compose import option_names

    return [
        {
            "method": name,
            "role": method.role,
            "needs": ", ".join(sorted(method.statistics)) or "no data",
            "options": ", ".join(option_names(method)),
            "what": _summary(method),
        }
        for name, method in METHODS.items()
    ]


def ranges() -> list[Row]:
    from fewbits.algorithms.ranges import RANGES

    return [
        {
            "range estimator": name,
            "options": ", ".join(field.name for field in dataclasses.fields(estimator)),
            "what": (estimator.__doc__ or "").strip().split("\n")[0].rstrip("."),
        }
        for name, estimator in RANGES.items()
    ]


def kernels() -> list[Row]:
    import torch

    from fewbits.formats import parse_format, parse_scheme
    from fewbits.kernels import LinearSpec, explain

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    products = [(name, parse_format(name), None) for name in COMMON_FORMATS]
    products += [(name, parse_scheme(name).weights, parse_scheme(name).activations) for name in BOTH_SIDES]
    for name, format, activations in products:
        spec = LinearSpec(format=format, shape=SHAPE, device=device, activations=activations)
        answers = explain(spec)
        rows.append(
            {
                "format": name,
                "device": str(device),
                "runs": next(kernel for kernel, answer in answers if answer),
                "answers": {kernel: str(answer) for kernel, answer in answers},
            }
        )
    return rows


def models() -> list[Row]:
    from fewbits.models.topology import TOPOLOGIES

    rows = [
        {
            "family": name,
            "model types": ", ".join(topology.model_types),
            "experts": "yes" if topology.experts else "-",
            "GGUF": "yes" if topology.gguf else "-",
        }
        for name, topology in TOPOLOGIES.items()
    ]
    other = {"family": "any other", "model types": "walked linear by linear, without a table"}
    return [*rows, {**other, "experts": "yes", "GGUF": "-"}]


def checkpoints() -> list[Row]:
    from fewbits.checkpoints.codecs import CODECS

    quantized = [
        {"checkpoint": name, "reads": "yes", "writes": "yes" if codec.writes else "-", "holds": codec.holds}
        for name, codec in CODECS.items()
    ]
    return [*quantized, *CHECKPOINTS]


KINDS: dict[str, Callable[[], list[Row]]] = {
    "formats": formats,
    "methods": methods,
    "ranges": ranges,
    "kernels": kernels,
    "schemes": schemes,
    "models": models,
    "checkpoints": checkpoints,
}


@guarded()
def listing(
    what: Annotated[str, typer.Argument(metavar="WHAT", help=f"One of {', '.join(KINDS)}.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List what fewbits knows: formats, methods, kernels (with why each would run here or not), …"""
    if what not in KINDS:
        raise unknown("list", what, KINDS)
    rows = KINDS[what]()
    if as_json:
        print_json(rows)
    elif what == "kernels":
        _print_kernels(rows)
    elif what == "methods":  # in two tables, or columns would be a word wide
        for columns in (("method", "role", "needs", "what"), ("method", "options")):
            print_table(columns, ([row[column] or "-" for column in columns] for row in rows))
    else:
        columns = list(rows[0])
        print_table(columns, ([row[column] for column in columns] for row in rows))
        if what == "formats":
            message(f"-g takes any group size. Bits per weight: a {SHAPE[0]} x {SHAPE[1]} matrix, float32 scales.")


def _print_kernels(rows: list[Row]) -> None:
    """For each format the kernel that runs on this machine and those that could; then each refusal, once."""
    cells = []
    refusals: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        note = row["answers"][row["runs"]].removeprefix("yes").removeprefix(": ")
        able = [kernel for kernel, answer in row["answers"].items() if not answer.startswith("no")]
        others = ", ".join(kernel for kernel in able if kernel != row["runs"])
        cells.append((row["format"], row["runs"] + (f" ({note})" if note else ""), others or "-"))
        for kernel, answer in row["answers"].items():
            if answer.startswith("no"):
                refusals.setdefault((kernel, answer.removeprefix("no: ")), []).append(row["format"])
    print_table(("format", "runs here", "could run"), cells)
    whole = [row["format"] for row in rows]
    order = {kernel: place for place, kernel in enumerate(rows[0]["answers"])}
    print_table(
        ("kernel", "does not run", "because"),
        (
            (kernel, "any of these" if formats == whole else ", ".join(formats), reason)
            for (kernel, reason), formats in sorted(refusals.items(), key=lambda each: order[each[0][0]])
        ),
    )
    size = f"{SHAPE[0]} x {SHAPE[1]}"
    message(f"on {rows[0]['device']}, for a {size} matrix; asked in the order of preference, the first that can runs")
