"""The page: complete, self-contained, well-formed, and safe whatever the certificate says."""

from __future__ import annotations

import copy
import html.parser
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_certificate import fake_certificate, fake_evaluation, write_fake

from fewbits.core.errors import BadInput, MissingExtra
from fewbits.report import figure, plots, write_report
from fewbits.report.certificate import read_certificate
from fewbits.report.words import change, percent

VOID = {"meta", "br", "link", "img", "hr", "input"}
SECTIONS = [
    "Size and accuracy",
    "Error by layer",
    "Error by type of layer",
    "Bits by layer",
    "The worst layers&#x27; weights",
    "KL divergence by position",
    "Completions side by side",
    "Notes",
    "Loading it",
    "Where every tensor went",
    "Record",
]


class Document(html.parser.HTMLParser):
    """Checks that tags nest and notes what the page holds."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._note(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data


def report(directory: Path, certificate: dict[str, Any]) -> str:
    return write_report(write_fake(directory, certificate)).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(tmp_path_factory.mktemp("report") / "smollm2-w4", fake_certificate(blocks=6))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of everything but the figures, which take most of the time."""
    monkeypatch.setattr(plots, "figure", lambda key, description, draw, heights: f"<i>{key}</i>")


# ---- what it says


def test_every_section_is_there(whole: str) -> None:
    assert re.findall(r"<h2>(.*?)</h2>", whole) == SECTIONS


def test_what_was_learned_is_shown_block_by_block(tmp_path: Path) -> None:
    certificate = fake_certificate(2)
    for layer in certificate["layers"]:
        layer["block_loss"] = {"before": 0.04, "after": 0.02 + 0.01 * layer["block"]}
    words = Document(write_report(write_fake(tmp_path, certificate)).read_text(encoding="utf-8")).words
    assert "Learned blocks" in words
    assert re.search(rf"0\s*4\.0 %\s*2\.0 %\s*{change(0.5)}\s*1\s*4\.0 %\s*3\.0 %\s*{change(0.75)}", words)


def test_numbers_are_those_of_the_certificate(whole: str) -> None:
    words = " ".join(Document(whole).words.split())
    for expected in (
        "116.5 MB, 2.3 times smaller than the 16-bit original.",
        "It picks the original's next token 87.0 % of the time.",
        "Its predictions diverge 45 % less than those of plain rounding to nearest.",
        "0.1180 ± 0.0047",
        "0.2140 ± 0.0086",
        "10.94 → 12.17.",
        "4.50 bits per quantized weight, 6.93 over the whole model.",
        "built-in evaluation text: 17 topics of pydoc_data.topics, 8,192 tokens, windows of 512.",
        "model.layers.3.mlp.down_proj: Cholesky failed at damping 0.01, retried at 0.1",
        'AutoModelForCausalLM.from_pretrained("smollm2-w4")',
        "vllm serve smollm2-w4",
        'fewbits.load("smollm2-w4")',
        "gptq (sequential True, block size 128, damping 0.01, act order True)",
        "fewbits quantize demo -o smollm2-w4 --scheme W4A16_ASYM --group-size 64",
        "7a" * 32,
        "2m22s",
        "1.9 GB",
        "Word for word the same.",
    ):
        assert expected in words, expected


def test_rows_come_in_order_and_the_method_is_marked(whole: str) -> None:
    body = whole[whole.index("<tbody>") : whole.index("</tbody>")]
    rows = [" ".join(re.sub("<[^>]*>", " ", row).split()) for row in re.findall(r"<tr.*?</tr>", body)]
    assert [row.split()[0] for row in rows] == ["Original,", "Round-to-nearest", "GPTQ"]
    assert body.count('class="marked"') == 1 and re.search(r'<tr class="marked"><td>GPTQ', body)


def test_completions_are_marked_from_the_first_word_that_differs(whole: str) -> None:
    assert "It is a city <mark>renowned for" in whole and "It is a city <mark>known for" in whole


# ---- how it is made


def test_well_formed_and_self_contained(whole: str) -> None:
    document = Document(whole)
    assert not {"script", "iframe", "object", "embed", "link", "img", "form"} & set(document.tags)
    assert not [name for name, _ in document.attributes if name.startswith("on")]
    for name, value in document.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), value
    without_namespaces = re.sub(r'xmlns(:xlink)?="[^"]*"', "", whole)
    assert "http://" not in without_namespaces and "https://" not in without_namespaces
    assert "@import" not in whole and "default-src 'none'" in whole
    assert len(whole) < 2_000_000


def test_figures_take_the_colours_of_the_page(whole: str) -> None:
    assert "#01fe" not in whole
    for name in ("ink", "muted", "line", "method", "baseline", "grid"):
        assert f"var(--{name})" in whole[whole.index("<svg") :] and f"--{name}:" in whole
    # A colour that is written out would be right in light or in dark, not in both.
    assert not re.findall(r"(?:fill|stroke): #\w+", whole)
    assert whole.count("<svg") == 2 * 5 and whole.count('role="img"') == 2 * 5
    assert "<style type=" not in whole, "a style inside a figure reaches the whole page"


def test_ids_are_unique_and_references_resolve(whole: str) -> None:
    ids = Document(whole).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', whole)) | set(re.findall(r"url\(#([^)]+)\)", whole)) <= set(ids)


def test_the_same_certificate_makes_the_same_page(tmp_path: Path) -> None:
    certificate = fake_certificate(blocks=1)
    certificate["distributions"] = certificate["distributions"][:1]
    assert report(tmp_path / "a" / "x", certificate) == report(tmp_path / "b" / "x", certificate)


# ---- certificates that lack things


def test_without_evaluations(tmp_path: Path, no_figures: None) -> None:
    page = report(tmp_path, {**fake_certificate(blocks=1), "evaluations": [], "samples": []})
    assert "What it lost was not measured." in page and "<code>" not in page[: page.index("<main>")]
    assert "KL divergence by position" not in page and "Completions" not in page
    Document(page)


def test_without_a_baseline(tmp_path: Path, no_figures: None) -> None:
    certificate = fake_certificate(blocks=1)
    certificate["evaluations"] = certificate["evaluations"][1:]
    page = report(tmp_path, certificate)
    assert "Round-to-nearest" not in page[: page.index("Error by layer")] and "predictions diverge" not in page


def test_a_baseline_on_other_text_is_not_compared(tmp_path: Path, no_figures: None) -> None:
    certificate = fake_certificate(blocks=1)
    certificate["evaluations"][0]["text"]["sha256"] = "00"
    page = report(tmp_path, certificate)
    assert "predictions diverge" not in page and "Round-to-nearest, text 1" in page and "GPTQ, text 2" in page


def test_labels_may_be_words(tmp_path: Path, no_figures: None) -> None:
    certificate = fake_certificate(blocks=1)
    certificate["evaluations"][0]["what"], certificate["evaluations"][1]["what"] = "round-to-nearest", "GPTQ"
    assert "diverge 45 % less" in report(tmp_path, certificate)


def test_round_to_nearest_itself(tmp_path: Path) -> None:
    certificate = fake_certificate(blocks=2)
    certificate["method"] = {"name": "rtn"}
    certificate["evaluations"] = certificate["evaluations"][:1]
    for layer in certificate["layers"]:
        layer["rtn_relative_error"] = None
    page = report(tmp_path, certificate)
    assert "RTN" in page and "predictions diverge" not in page and "The mean over the blocks.</p>" in page


def test_native_checkpoints_say_so(tmp_path: Path, no_figures: None) -> None:
    page = report(tmp_path, {**fake_certificate(blocks=1), "checkpoint_format": "fewbits"})
    assert "vllm serve" not in page and "import fewbits  # registers the format" in page


def test_speed_has_a_column_when_measured(tmp_path: Path, no_figures: None) -> None:
    certificate = fake_certificate(blocks=1)
    assert "Tokens per second" not in report(tmp_path, certificate)
    certificate["evaluations"][1]["tokens_per_second"] = 97.25
    page = report(tmp_path, certificate)
    assert "Tokens per second" in page and ">97.2<" in page


def test_many_experts_stay_a_page(tmp_path: Path) -> None:
    certificate = fake_certificate(blocks=2)
    model = certificate["layers"][0]
    certificate["layers"] = [
        {**model, "name": f"model.layers.{block}.mlp.experts.{expert}.{kind}", "kind": kind, "block": block}
        for block in range(4)
        for expert in range(256)
        for kind in ("gate_proj", "up_proj", "down_proj")
    ]
    page = report(tmp_path, certificate)
    assert len(page) < 2_000_000 and "2,072 more layers" in page


# ---- certificates that are wrong


def test_missing_or_broken_certificates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has no certificate\.json; pass a directory"):
        write_report(tmp_path)
    with pytest.raises(BadInput, match=r"has no certificate\.json"):
        write_report(tmp_path / "absent")
    path = tmp_path / "certificate.json"
    for content, message in (
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "holds a list"),
        (b"{}", "no list 'layers'"),
        (b'{"layers": []}', "no usable 'source.path'"),
    ):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=message):
            write_report(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["certificate.json"]


@pytest.mark.parametrize("section", ["source.path", "scheme.name", "method.name", "size.bytes", "size.bits_per_weight"])
@pytest.mark.parametrize("value", [None, [], {}, True, 0, -1])
def test_required_fields_are_named(tmp_path: Path, section: str, value: Any) -> None:
    certificate = fake_certificate(blocks=1)
    name, _, key = section.partition(".")
    certificate[name][key] = value
    with pytest.raises(BadInput, match=f"no usable '{section}'"):
        read_certificate(write_fake(tmp_path, certificate))


GARBAGE: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    "x",
    "",
    [],
    [None],
    [[]],
    {},
    {"x": {}},
    float("nan"),
    "9" * 5000,
]


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a JSON tree; of lists, to the first entry only."""
    found = [prefix] if prefix else []
    if isinstance(value, dict):
        for key in value:
            found += paths(value[key], (*prefix, key))
    elif isinstance(value, list) and value:
        found += paths(value[0], (*prefix, 0))
    return found


def test_any_value_may_be_garbage(tmp_path: Path, no_figures: None) -> None:
    """Every field in turn replaced: the page is made without it, or the certificate refused."""
    certificate = fake_certificate(blocks=1)
    refused = 0
    cases = [(path, offset) for path in paths(certificate) for offset in range(2)]
    for number, (path, offset) in enumerate(cases):
        broken = copy.deepcopy(certificate)
        place = broken
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = GARBAGE[(number + offset * 7) % len(GARBAGE)]
        try:
            Document(report(tmp_path, broken))
        except BadInput:
            refused += 1
    assert 0 < refused < len(cases) / 4


@pytest.mark.parametrize("value", [0.0, -1.0, 1e300, 1e-300])
def test_figures_survive_absurd_numbers(tmp_path: Path, value: float) -> None:
    certificate = fake_certificate(blocks=1)
    certificate["distributions"] = certificate["distributions"][:2]
    for layer in certificate["layers"][:2]:
        layer["relative_error"] = layer["rtn_relative_error"] = layer["bits"] = value
    certificate["layers"][2]["block"] = -3
    certificate["layers"][3]["kind"] = "k" * 10_000
    certificate["distributions"][0]["counts"][0] = value
    certificate["distributions"][1]["levels"][0] = value
    certificate["evaluations"][1]["kl_by_position"][0]["mean"] = value
    Document(report(tmp_path, certificate))


def test_markup_in_a_certificate_stays_text(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&$\\frac{1}{2}$</svg></style>"

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poisoned(item) for item in value]
        return value + attack if isinstance(value, str) else value

    certificate = poisoned(fake_certificate(blocks=1))
    certificate["environment"]["versions"] = {attack: attack}
    certificate["method"][attack] = attack
    document = Document(report(tmp_path / "smollm2 'w4\"<b>", certificate))
    assert not {"script", "img"} & set(document.tags)
    assert not [name for name, _ in document.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in document.words


# ---- where it goes


def test_output_path(tmp_path: Path, no_figures: None) -> None:
    directory = write_fake(tmp_path / "model", fake_certificate(blocks=1))
    assert write_report(directory) == directory / "report.html"
    assert write_report(str(directory), tmp_path / "page.html") == tmp_path / "page.html"
    with pytest.raises(BadInput, match=r"is a directory; name the file to write"):
        write_report(directory, tmp_path)
    with pytest.raises(BadInput, match="no directory"):
        write_report(directory, tmp_path / "absent" / "page.html")
    assert not list(tmp_path.rglob("*.tmp"))


def test_matplotlib_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'fewbits\[report\]'"):
        write_report(write_fake(tmp_path, fake_certificate(blocks=1)))
    assert not (tmp_path / "report.html").exists()


def test_style_of_figures_does_not_leak() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure.figure("x", "nothing", lambda canvas, wide: None, (1.0, 1.0))
    assert dict(matplotlib.rcParams) == before


def test_words() -> None:
    assert [percent(value) for value in (0.0123, 0.01, 0.123, 0.996, 12.3, 0.00058)] == [
        "1.2 %",
        "1.0 %",
        "12 %",
        "100 %",
        "1230 %",
        "0.058 %",
    ]
    assert change(0.6) == "\N{MINUS SIGN}40 %" and change(1.112, 1) == "+11.2 %"


def test_fake_certificate_is_json() -> None:
    json.dumps(fake_certificate(blocks=1), allow_nan=False)
    assert fake_evaluation("rtn", 0.1, __import__("random").Random(0))["what"] == "rtn"
