"""Eight bits on both sides: what was last measured on the embedded model holds what the documentation says of it."""

from __future__ import annotations

import math

from recorded import latest


def rises() -> dict[tuple[str, int], tuple[float, float]]:
    """(setting, size of outliers) -> perplexity over fp32 as a share, and its standard error."""
    found = latest("w8a8")
    assert found is not None
    rows = {}
    for row in found[1]["rows"]:
        ratio = math.exp(row["lost"]["mean"])
        rows[row["name"], row["factor"]] = ratio - 1, ratio * row["lost"]["stderr"]
    return rows


def test_outliers_ruin_naive_scales_and_not_what_was_invented_against_them() -> None:
    rows = rises()
    assert rows["token", 100][0] > 1
    for name in ("llm_int8", "smoothquant"):
        (before, _), (after, error) = rows[name, 1], rows[name, 100]
        assert before < rows["token", 1][0] and after - before < 0.02 + 2 * error, name
    assert rows["rotate", 1][0] < 0.01


def test_a_prompt_in_w8a8_is_read_faster_than_in_bfloat16() -> None:
    found = latest("prefill")
    assert found is not None
    seconds = {row["model"]: row["seconds"] for row in found[1]["rows"] if "model" in row}
    assert seconds["transformers, W8A8"] * 1.5 < seconds["transformers, bfloat16"]
    errors = {row["product"]: row["largest_error"] for row in found[1]["rows"] if "product" in row}
    assert errors["torch._int_mm"] == 0 and errors["oneDNN, 8-bit weights"] > 0.1
