"""Writes llama.cpp's perplexity beside ours into docs/gguf.md, from the newest "gguf" record.

Without a record the page stays as it is.
"""

from __future__ import annotations

import re
from typing import Any

from recorded import ROOT, latest

PAGE = ROOT / "docs" / "gguf.md"


def told(found: dict[str, float], bound: float) -> str:
    """A difference in percent; beyond the bound it is bold."""
    mean, error = 100 * found["mean"], 100 * found["stderr"]
    places = 2 if error >= 0.01 else 3
    text = f"{mean:+.{places}f} ± {error:.{places}f}"
    return f"**{text}**" if abs(found["mean"]) > bound else text


def plain(perplexity: float) -> str:
    return f"{perplexity:.3f}" if perplexity < 1e4 else f"{perplexity:.1e}"


def within(rows: list[dict[str, Any]], bound: float) -> list[str]:
    """A line for each comparison: the largest difference, and what is beyond the bound."""
    lines = []
    for name, what in (("difference", "as it runs"), ("decoded", "decoded"), ("rounded", "inputs rounded here too")):
        largest = max(rows, key=lambda row: abs(row[name]["mean"]))
        beyond = [row["type"] for row in rows if abs(row[name]["mean"]) > bound]
        verdict = f"all but {', '.join(beyond)}" if beyond else "all"
        lines.append(f"- {what}: {verdict} within it, at most {told(largest[name], bound)} % ({largest['type']})")
    return lines


def table(record: dict[str, Any]) -> str:
    lines = [
        "| type asked for | of the blocks' weights | perplexity here | llama.cpp | its over ours, % | weights decoded "
        "| inputs rounded here too | what the rounding costs here |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(record["rows"], key=lambda row: row["bytes"], reverse=True):
        weights = row["weights"]
        inside = {kind: count for kind, count in weights.items() if kind not in ("F16", "BF16", "F32")} or weights
        whole = sum(inside.values())
        kinds = ", ".join(f"{100 * count / whole:.0f} % {kind}" for kind, count in sorted(inside.items()))
        cells = [row["type"], kinds, plain(row["perplexity"]), plain(row["llama_cpp"])]
        cells += [told(row[name], record["bound"]) for name in ("difference", "decoded", "rounded", "inputs")]
        lines.append(f"| {' | '.join(cells)} |")
    count, length = record["windows"]
    bound = record["bound"]
    usable = [row for row in record["rows"] if not row["ruined"]]
    lines += [
        "",
        f"{count} windows of {length} tokens ({record['decoded_windows']} for decoded weights), standard errors by "
        f"windows; bold is beyond {100 * bound:.1f} %. llama.cpp of xllamacpp {record['xllamacpp']}. The model itself "
        f"has {plain(record['perplexity'])}; what more than doubles that has ruined it. The {len(usable)} other types:",
        "",
        *within(usable, bound),
    ]
    return "\n".join(lines)


def main() -> None:
    found = latest("gguf")
    if found is None:
        print("no 'gguf' record under benchmarks/results: docs/gguf.md left as it is")
        return
    path, record = found
    source = path.relative_to(ROOT).as_posix()
    content = f"{table(record)}\n\nFrom [`{source}`](../{source}), by `python benchmarks/interop/check_gguf.py`."
    pattern = re.compile(r"(<!-- gguf:begin -->\n).*?(<!-- gguf:end -->)", re.DOTALL)
    old = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(pattern.sub(lambda match: f"{match[1]}{content}\n{match[2]}", old), encoding="utf-8")
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
