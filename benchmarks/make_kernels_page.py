"""Writes what `fewbits bench kernels` measured into docs/kernels.md and draws docs/images/kernels.svg.

Reads the newest "kernels" and "kernel formats" records under benchmarks/results, and of bench_gpu_w8a8_kv.py the newest
with attention. A record comes from the machine with the GPU, by `fewbits bench kernels --out FILE`, and is added by

    python benchmarks/make_kernels_page.py [--add "kernels" FILE --measured COMMIT]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recorded import ROOT, every, latest, save, source_line, write_between

from fewbits.report.kernel_speed import accuracy_table, draw, table

PAGE = ROOT / "docs" / "kernels.md"
FIGURE = ROOT / "docs" / "images" / "kernels"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def add(name: str, file: Path, measured: str) -> None:
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    record["environment"]["device"] = "-".join(record["device"].lower().split())
    save(name, record, measured)


def newest(part: str) -> tuple[Path, dict[str, Any]] | None:
    """Of the records of bench_gpu_w8a8_kv.py, the newest with this part."""
    return next((found for found in every("gpu_w8a8_kv") if part in found[1]), None)


def attention(path: Path, record: dict[str, Any]) -> str:
    """The table of decode attention, as benchmarks/bench_gpu_w8a8_kv.py measured it."""
    kv = record["kv"]
    columns = [
        "batch",
        "keys and values",
        "bits a number",
        "microseconds",
        "speed, cuDNN bf16 = 1",
        "ours bf16 = 1",
        "SQNR, dB",
    ]
    rows = []
    for batch in (name for name in kv if name.startswith("batch")):
        sixteen = {name: us for name, us in kv[batch]["bf16"]["us"].items() if us}
        cudnn, own = sixteen["sdpa cudnn"], min(us for name, us in sixteen.items() if not name.startswith("sdpa"))
        times = {"bf16, cuDNN": cudnn, "bf16, flash": sixteen["sdpa flash"], "bf16, ours": own}
        times |= {name: row["us"]["default"] for name, row in kv[batch].items() if name != "bf16"}
        for name, us in times.items():
            bits = kv[batch][name]["bits_per_number"] if name in kv[batch] else 16
            noise = f"{kv['sqnr_db'][name]:.0f}" if name in kv["sqnr_db"] else ""
            rows.append([batch[6:], name, f"{bits:g}", f"{us:.1f}", f"{cudnn / us:.2f}", f"{own / us:.2f}", noise])
    shape = f"{kv['tokens']} tokens, {kv['heads']} heads of {kv['width']}, read by {kv['query_heads']} query heads"
    return f"{shape}. {source_line(path)[:-1]}, by `{record['environment']['command']}`.\n\n{markdown(columns, rows)}"


def chains(path: Path, record: dict[str, Any]) -> str:
    """The table of 4096 tokens in E4M3 and in bfloat16, alone and with the operation before."""
    columns = [
        "layer",
        "bf16",
        "FP8",
        "rounding",
        "times as fast, rounding too",
        "before it",
        "bf16",
        "FP8",
        "times as fast",
    ]
    rows = []
    for name, chain in record["chains"].items():
        alone, taken = record["shapes"][name], chain["before_alone_us"]
        times = alone["bf16_us"], alone["us"]["fp8 _scaled_mm"], alone["rounding_us"]
        with_before = chain["bf16_us"] - taken, chain["fp8_us"] - taken
        rows.append(
            [
                name, *(f"{us:.1f}" for us in times), f"{alone['fp8_over_bf16_with_rounding']:.2f}", chain["before"],
                *(f"{us:.1f}" for us in with_before), f"{chain['fp8_over_bf16']:.2f}",
            ]
        )  # fmt: skip
    command = record["environment"]["command"]
    return f"4096 tokens, microseconds. {source_line(path)[:-1]}, by `{command}`.\n\n{markdown(columns, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs=2, metavar=("NAME", "FILE"))
    parser.add_argument("--measured", default="", help="the commit that was measured")
    given = parser.parse_args()
    if given.add:
        add(given.add[0], Path(given.add[1]), given.measured)
    contents: dict[str, str] = {}
    for name in ("kernels", "kernel formats"):
        found = latest(name)
        if found is None:
            continue
        path, record = found
        device = f"{record['device']}, read bandwidth {record['bandwidth'] / 1e12:.2f} TB/s, microseconds."
        command = record["environment"]["command"]
        text = f"{device} {source_line(path)[:-1]}, by `{command}`.\n\n{markdown(*table(record))}"
        key = name.replace(" ", "-")
        contents[key] = text
        contents[f"{key}-accuracy"] = markdown(*accuracy_table(record))
        if name == "kernels":
            draw(record, FIGURE)
            if given.add is None:
                FIGURE.with_suffix(".png").unlink()
    if (found := newest("kv")) is not None:
        contents["attention"] = attention(*found)
    if (found := newest("chains")) is not None:
        contents["chains"] = chains(*found)
    if contents:
        write_between(PAGE, **contents)


if __name__ == "__main__":
    main()
