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


def table(record: dict[str, Any]) -> str:
    lines = [
        "| type asked for | of the blocks' weights | perplexity here | llama.cpp | difference, % | its weights decoded "
        "| inputs rounded here too |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        weights = row["weights"]
        inside = {kind: count for kind, count in weights.items() if kind not in ("F16", "BF16", "F32")} or weights
        whole = sum(inside.values())
        kinds = ", ".join(f"{100 * count / whole:.0f} % {kind}" for kind, count in sorted(inside.items()))
        cells = [row["type"], kinds, plain(row["perplexity"]), plain(row["llama_cpp"])]
        cells += [told(row[name], record["bound"]) for name in ("difference", "decoded", "rounded")]
        lines.append(f"| {' | '.join(cells)} |")
    count, length = record["windows"]
    beyond = [row["type"] for row in record["rows"] if abs(row["difference"]["mean"]) > record["bound"]]
    lines += [
        "",
        f"{count} windows of {length} tokens, standard errors by windows; bold is beyond {100 * record['bound']:.1f} % "
        f"({', '.join(beyond) or 'none'}). llama.cpp of xllamacpp {record['xllamacpp']}.",
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
