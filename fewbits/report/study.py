"""The page of a study, with its figures as files: everything is drawn from the study's record.

    DIR/<study>.json        the record
    DIR/<study>.html        the page, self-contained
    DIR/<study>-<key>.png   each figure, and .svg

A study's page is described by a function `page(record) -> StudyPage` that PAGES names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbits.core.errors import BadInput
from fewbits.core.record import atomic_path, write_json
from fewbits.core.registry import Registry
from fewbits.core.units import duration_text
from fewbits.report.figure import figure, save
from fewbits.report.html import document, section
from fewbits.report.words import esc

PAGES = Registry(
    "page of a study",
    {
        "formats": "fewbits.report.study_formats:page",
        "model_formats": "fewbits.report.study_model_formats:page",
        "bits": "fewbits.report.study_bits:page",
        "outliers": "fewbits.report.study_outliers:page",
    },
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A section: a figure, or a table (HTML), or both.

    key: names the figure's files. draw: fills a matplotlib figure, wide or narrow; heights: inches of the two.
    """

    key: str
    title: str
    lead: str
    draw: Callable[[Any, bool], None] | None = None
    heights: tuple[float, float] = (4.0, 4.4)
    description: str = ""
    table: str = ""


@dataclass(frozen=True, kw_only=True)
class StudyPage:
    """What a page says. title, verdict (one or two sentences: the finding) and chips are text; tiles are HTML.

    brand: the command that made it.
    """

    title: str
    verdict: str
    parts: Sequence[Part]
    chips: Sequence[str] = ()
    tiles: Sequence[str] = field(default=())
    brand: str = "fewbits study"


def write_study(record: dict[str, Any], directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes record, figures and page to `directory`, made if need be; the paths as {"record", "page", "figures"}."""
    return write_page(record, PAGES.get(record["study"])(record), directory)


def write_page(record: dict[str, Any], page: StudyPage, directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The same for a page that is no study's."""
    name = record["study"]
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise BadInput(f"'{target}' is a file; name a directory to write the {name} page to")
    target.mkdir(parents=True, exist_ok=True)
    text = _html(page, record)
    figures = [
        path
        for part in page.parts
        if part.draw is not None
        for path in save(target / f"{name}-{part.key}", part.draw, part.heights[0])
    ]
    written, html = target / f"{name}.json", target / f"{name}.html"
    write_json(written, record)
    with atomic_path(html) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return {"record": str(written), "page": str(html), "figures": [str(path) for path in figures]}


def _html(page: StudyPage, record: dict[str, Any]) -> str:
    chips = "".join(f"<li>{esc(chip)}</li>" for chip in page.chips)
    tiles = f'<div class="tiles">{"".join(page.tiles)}</div>' if page.tiles else ""
    header = (
        f'<header>\n<p class="brand">{esc(page.brand)}</p>\n<h1>{esc(page.title)}</h1>\n'
        f'<ul class="chips">{chips}</ul>\n<p class="verdict">{esc(page.verdict)}</p>\n{tiles}</header>'
    )
    parts = [section(part.title, part.lead, _drawn(part), part.table) for part in page.parts]
    sources = "".join(f"<li>{esc(source)}</li>" for source in record["sources"])
    parts.append(section("Sources", "", f'<ul class="notes">{sources}</ul>' if sources else ""))
    parts.append(section("Record", "What it takes to repeat this.", _record(record)))
    made = f"Made by fewbits {esc(record['fewbits'])} from {esc(record['study'])}.json."
    return document(page.title, header, "".join(parts), made)


def _drawn(part: Part) -> str:
    if part.draw is None:
        return ""
    return figure(part.key, part.description or part.title, part.draw, part.heights)


def _record(record: dict[str, Any]) -> str:
    environment = record["environment"]
    entries = [
        ("Command", environment.get("command")),
        ("Date", environment.get("date")),
        ("Machine", ", ".join(str(environment[key]) for key in ("cpu", "platform") if environment.get(key))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())),
        *((key.replace("_", " ").capitalize(), _text(value)) for key, value in record["settings"].items()),
        ("Time", duration_text(record["seconds"])),
    ]
    return "<dl>" + "".join(f"<dt>{esc(key)}</dt><dd>{esc(value)}</dd>" for key, value in entries if value) + "</dl>"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
