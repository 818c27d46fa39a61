"""What `fewbits bench kernels` measures and shows: here its tables and its refusals, for times take a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from fewbits.core.errors import BadInput, first_line
from fewbits.evaluation import kernel_speed
from fewbits.report.kernel_speed import table


def record(*rows: tuple[str, int, float | None]) -> dict[str, Any]:
    found: list[dict[str, Any]] = [
        {"who": who, "shape": "o", "tokens": m, "us": us, "roof_us": us / 2}
        if us is not None
        else {"who": who, "shape": "o", "tokens": m, "failed": "RuntimeError"}
        for who, m, us in rows
    ]
    here: dict[str, Any] = {"fewbits a": {}, "cuBLAS bf16": {}}
    return {"shapes": {"o": [64, 64]}, "tokens": [1, 16, 64], "rows": found, "accuracy": here}


def test_a_line_without_ours_is_shown() -> None:
    rows = [("fewbits a", 16, 4.0), ("cuBLAS bf16", 1, 3.0), ("cuBLAS bf16", 16, 5.0), ("cuBLAS bf16", 64, None)]
    columns, lines = table(record(*rows))
    assert columns[-2:] == ["fewbits a", "cuBLAS bf16"]
    assert lines == [["o 64 x 64", "1", "-", "-", "3.0"], ["o 64 x 64", "16", "2.0 (50 %)", "4.0", "5.0"]]


def test_ours_stay_first_when_nothing_of_them_was_timed() -> None:
    columns, lines = table(record(("cuBLAS bf16", 1, 3.0)))
    assert columns[-2:] == ["fewbits a", "cuBLAS bf16"] and lines == [["o 64 x 64", "1", "-", "-", "3.0"]]


def test_a_misspelt_format_is_found_before_anything_is_timed() -> None:
    with pytest.raises(BadInput, match="int4-g12q"):
        kernel_speed.contestants(["int4-g128", "int4-g12q"])


def test_an_error_is_told_in_one_line() -> None:
    assert first_line(AssertionError()) == "AssertionError"
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"
