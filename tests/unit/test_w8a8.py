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
    assert rows["token", 100][0] > 1 and rows["static", 100][0] > 1
    for name in ("llm_int8", "smoothquant", "rotate"):
        for factor in (10, 100):
            share, error = rows[name, factor]
            assert share < 0.02 + 2 * error, (name, factor)
