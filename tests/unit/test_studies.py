"""Studies: what is computed, that its record is plain JSON, and that page and figures can be drawn from it alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fewbits.cli.main import app
from fewbits.core.errors import BadInput
from fewbits.evaluation.studies import STUDIES
from fewbits.report.study import PAGES, write_study

ORACLES: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "oracles.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What `fewbits study formats --json` prints, and where it wrote."""
    directory = tmp_path_factory.mktemp("study") / "out"
    done = CliRunner().invoke(app, ["study", "formats", "-o", str(directory), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), directory


def test_every_study_has_a_page_and_a_command() -> None:
    (group,) = (group for group in app.registered_groups if group.name == "study")
    assert group.typer_instance is not None
    commands = {command.name for command in group.typer_instance.registered_commands}
    assert STUDIES.names() == PAGES.names()
    assert commands <= set(STUDIES.names())
    for name in commands:
        shown = CliRunner().invoke(app, ["study", str(name), "--help"])
        assert shown.exit_code == 0 and "--json" in shown.stdout and "--out" in shown.stdout


def test_what_formats_finds_is_what_the_papers_say(made: tuple[dict[str, Any], Path]) -> None:
    """Van Baalen et al. 2023: INT8 on uniform values, E2M5 then INT8 on Gaussian ones, exponent bits for tails."""
    best = made[0]["results"]["best"]
    eight = ("int8_narrow", "fp8_e2m5", "fp8_e3m4", "fp8_e4m3", "fp8_e5m2")

    def order(name: str) -> list[str]:
        return sorted(eight, key=lambda format: -best[name][format]["sqnr_db"])

    assert order("uniform")[0] == "int8_narrow"
    assert order("gaussian") == ["fp8_e2m5", "int8_narrow", "fp8_e3m4", "fp8_e4m3", "fp8_e5m2"]
    assert order("laplace") == order("student-t 8") == ["fp8_e2m5", "fp8_e3m4", "int8_narrow", "fp8_e4m3", "fp8_e5m2"]
    assert order("student-t 4")[:2] == ["fp8_e3m4", "fp8_e4m3"]
    assert order("student-t 3")[0] == "fp8_e4m3"
    values = [best["gaussian"][format]["sqnr_db"] for format in order("gaussian")]
    gaps = [a - b for a, b in itertools.pairwise(values)]
    assert gaps == pytest.approx([2.13, 2.98, 6.01, 5.97], abs=0.02)


def test_lloyd_max_and_blocks_agree_with_published_numbers(made: tuple[dict[str, Any], Path]) -> None:
    results = made[0]["results"]
    for bits in range(2, 9):
        for name, oracle in (("gaussian", "gauss"), ("laplace", "laplace")):
            found = results["lloyd_max"][name][str(bits)]["error"]
            assert found == pytest.approx(ORACLES[oracle][str(1 << bits)]["D_lloyd"], rel=1e-8)
    published = ORACLES["gaussian_absmax_block_mse"]["NF4"]["64"]
    assert results["blocks"]["gaussian"]["nf4"]["64"] == pytest.approx(published, rel=1e-6)


def test_page_and_figures_are_written_whole(made: tuple[dict[str, Any], Path]) -> None:
    paths, directory = made
    text = Path(paths["page"]).read_text(encoding="utf-8")
    assert "<script" not in text and "http-equiv" in text and "src=" not in text
    assert "#01fe" not in text and "fewbits:" not in text  # every colour became the page's
    assert text.count('role="img"') == len(paths["figures"])  # each wide and narrow; each as PNG and SVG
    for figure in map(Path, paths["figures"]):
        head = figure.read_bytes()[:5]
        assert head == (b"\x89PNG\r" if figure.suffix == ".png" else b"<?xml")
        assert figure.suffix == ".png" or "#01fe" not in figure.read_text(encoding="utf-8")
    assert not list(directory.glob(".*"))


def test_the_page_is_drawn_from_the_record_alone(made: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    record = json.loads(Path(made[0]["record"]).read_text(encoding="utf-8"))
    again = write_study(record, tmp_path / "again")
    assert Path(again["page"]).read_bytes() == Path(made[0]["page"]).read_bytes()
    assert Path(again["record"]).read_bytes() == Path(made[0]["record"]).read_bytes()


def test_a_file_in_the_way_is_refused(made: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    record = json.loads(Path(made[0]["record"]).read_text(encoding="utf-8"))
    (tmp_path / "taken").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        write_study(record, tmp_path / "taken")
