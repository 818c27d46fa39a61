"""The page of `fewbits study outliers`: where the large values are, what rounding pays for them, what they carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbits.report import study_outliers_figures as figures
from fewbits.report.html import tile
from fewbits.report.study import Part, StudyPage
from fewbits.report.tables import table
from fewbits.report.words import MINUS, TIMES, esc, percent

Results = Mapping[str, Any]


def page(record: dict[str, Any]) -> StudyPage:
    results, settings = record["results"], record["settings"]
    measured = results["texts"]["measured"]
    return StudyPage(
        title="Outlier features and massive activations",
        verdict=_verdict(results),
        chips=(
            str(settings["model"]),
            f"{len(results['observed']['hidden']) - 1} blocks",
            f"{measured['samples']} {TIMES} {measured['sequence_length']} held-out tokens",
        ),
        tiles=_tiles(results),
        parts=(
            _channels(results),
            _tokens(results),
            _carried(results),
            _curve(results),
            _first_token(results),
            _removal(results),
            Part(key="found", title="What was found", lead="", table=_found(results)),
        ),
    )


# ---- the sections


def _channels(results: Results) -> Part:
    return Part(
        key="channels",
        title="The dimensions that stand out",
        lead="Largest magnitude in the residual stream after each block, of the dimensions that stand out most; on the "
        "left in the first tokens of the windows, on the right in all other tokens. A row that is bright from left "
        "to right is a dimension that is large in block after block.",
        draw=lambda canvas, wide: figures.channels(canvas, wide, results),
        heights=(4.4, 8.2),
        description="Heat maps of the largest magnitude by block and dimension, first tokens and others",
    )


def _tokens(results: Results) -> Part:
    return Part(
        key="tokens",
        title="Which tokens",
        lead="Largest magnitude by block, for the first token of a window, for delimiters (punctuation, line breaks, "
        "special tokens) and for the rest. The dotted line is the median magnitude; 1000 times as much, and more than "
        "100, is what Sun et al. call massive: the dashed line.",
        draw=lambda canvas, wide: figures.tokens(canvas, wide, results),
        heights=(4.0, 7.8),
        description="Largest magnitude by block for three classes of tokens, in the residual stream and before down",
    )


def _carried(results: Results) -> Part:
    return Part(
        key="carried",
        title="What a dimension carries of the error",
        lead="Inputs of attention and MLP behind the norms, rounded to INT8 with one scale per token: the share of the "
        "squared error that goes away when this one dimension is kept in 16 bits, its own error and the coarser "
        "steps it forces on the others together.",
        draw=lambda canvas, wide: figures.carried(canvas, wide, results),
        heights=(4.4, 8.2),
        description="Heat maps of the share of the rounding error by block and dimension",
    )


def _curve(results: Results) -> Part:
    return Part(
        key="curve",
        title="Keeping dimensions in 16 bits",
        lead="Error left, as a share of that of rounding everything, mean over the inputs behind the norms. The worst "
        "dimensions were chosen on other text. The grey band is one standard deviation over random choices; marks "
        f"stand for the outlier features. {_on_error(results)}",
        draw=lambda canvas, wide: figures.curve(canvas, wide, results),
        heights=(4.0, 7.8),
        description="Error left against the number of dimensions kept exact, worst and random, per token and tensor",
    )


def _first_token(results: Results) -> Part:
    return Part(
        key="first",
        title="The first token and the scale",
        lead="What INT8 takes from all tokens but the first of a window, as a share of their own energy: with one "
        "scale for the window, with the first token kept in 16 bits and out of the scale, and with one scale per "
        "token. Where the first two lines part, one token sets the scale for all; at 100 % the others are rounded to "
        f"zero. {_on_first(results)}",
        draw=lambda canvas, wide: figures.first_token(canvas, wide, results),
        heights=(4.0, 11.0),
        description="INT8 error by block for four kinds of inputs, with and without the first token in the scale",
    )


def _removal(results: Results) -> Part:
    main = results["removal"]["main"]
    stand_in = (
        " No dimension meets either definition of an outlier feature: those with the largest rms stand in."
        if main == "largest"
        else ""
    )
    return Part(
        key="removal",
        title="Does the model need them?",
        lead="Perplexity over that of the model as it is. Dimensions are zeroed in the inputs of attention and MLP; "
        "massive activations are replaced where they emerge. Error bars: one standard error, over windows or, for "
        f"random choices, over draws. The first choice is the mean probability of the likeliest token.{stand_in}",
        draw=lambda canvas, wide: figures.removal(canvas, wide, results),
        heights=(_height(results), _height(results) + 0.9),
        description="Perplexity with dimensions or massive activations removed, against random ones",
        table=_removal_table(results),
    )


def _height(results: Results) -> float:
    return 0.9 + 0.32 * (len(results["removal"]["runs"]) + 1)


# ---- words


def _verdict(results: Results) -> str:
    said = (part(results) for part in (_on_features, _on_massive, _on_removal))
    return " ".join(sentence for sentence in said if sentence)


def _on_features(results: Results) -> str:
    outliers = results["observed"]["outliers"]
    absolute, relative = len(outliers["inputs"]), len(outliers["inputs_relative"])
    width = results["observed"]["hidden"][0]["channels"]
    behind = "no dimension" if not absolute else _count(absolute, "dimension")
    stream = len(outliers["hidden"])
    note = (
        f" (in the residual stream all {width} dimensions do: a magnitude of 6 says nothing there)"
        if stream == width
        else f" (in the residual stream {stream} of {width} do)"
        if stream
        else ""
    )
    again = "none does" if not relative else _count(relative, "does", "do")
    return (
        f"Behind the norms {behind} of {width} {'meets' if absolute < 2 else 'meet'} LLM.int8()'s definition of an "
        f"outlier feature{note}; measured by the rms of the token, {again}."
    )


def _on_massive(results: Results) -> str:
    found = results["observed"]["massive"]["found"]
    if not found:
        return "There are no massive activations."
    top = found[0]
    token = {"first": "the first token", "delimiter": f"the delimiter {top['text']!r}"}.get(
        top["class"], f"the token {top['text']!r}"
    )
    return (
        f"Massive activations sit on {token} in dimension {top['dimension']}: {abs(top['value']):,.0f}, "
        f"{top['ratio']:,.0f} times the median."
    )


def _worst(results: Results) -> Mapping[str, Any]:
    """The input that one scale per window hurts most."""
    worst: Mapping[str, Any] = max(results["error"]["places"], key=lambda place: place["others"]["tensor"])
    return worst


def _on_first(results: Results) -> str:
    place = _worst(results)
    others = place["others"]
    if others["tensor"] < 2 * others["spared"]:
        return ""
    return (
        f"With one INT8 scale per window the first token takes {percent(others['tensor'])} of the energy of all other "
        f"tokens from the input of {place['name']}; {percent(others['spared'])} is lost without it."
    )


def _on_error(results: Results) -> str:
    curve = results["curve"]
    if 8 not in curve["kept"]:
        return ""
    at = curve["kept"].index(8)
    token, tensor = (curve[scaling]["inputs"] for scaling in ("token", "tensor"))
    return (
        f"Keeping the worst 8 dimensions in 16 bits removes {percent(1 - token['worst'][at])} of the error of INT8 "
        f"inputs scaled per token and {percent(1 - tensor['worst'][at])} per tensor; 8 random ones "
        f"{percent(max(1 - token['random'][at], 0.0))} and {percent(max(1 - tensor['random'][at], 0.0))}."
    )


def _on_removal(results: Results) -> str:
    removal = results["removal"]
    run, drawn = removal["runs"][removal["main"]], removal["runs"]["random"]
    subject = {
        "magnitude": "the outlier features",
        "relative": f"those {len(run['dimensions'])} dimensions",
        "largest": f"the {len(run['dimensions'])} dimensions with the largest rms",
    }[removal["main"]]
    said = (
        f"Zeroing {subject} multiplies perplexity by {_times(run['ratio'])}, "
        f"as many random ones by {_times(drawn['ratio'])}"
    )
    massive = removal["runs"].get("massive zero")
    if massive is None:
        return f"{said}."
    mean = removal["runs"]["massive mean"]
    return (
        f"{said}; setting the massive activations to zero, by {_times(massive['ratio'])}, to their mean, "
        f"by {_times(mean['ratio'])}."
    )


def _times(ratio: Mapping[str, Any]) -> str:
    """'3.52 ± 0.21'; fewer digits where the number is large."""
    mean, stderr = ratio["mean"], ratio["stderr"]
    if mean is None:
        return "infinite"
    error = "" if stderr is None else f" ± {figures.amount(stderr, like=mean)}"
    return figures.amount(mean) + error


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


# ---- tiles and tables


def _tiles(results: Results) -> list[str]:
    outliers, massive = results["observed"]["outliers"], results["observed"]["massive"]["found"]
    removal = results["removal"]
    worst = _worst(results)
    shown = [
        tile(
            "Outlier features",
            f"{len(outliers['inputs'])} / {len(outliers['inputs_relative'])}",
            "",
            "at magnitude 6 / at 6 times the token's rms, behind the norms",
        ),
        tile(
            "Largest activation",
            f"{abs(massive[0]['value']):,.0f}" if massive else "none massive",
            "",
            f"{massive[0]['ratio']:,.0f} times the median" if massive else "above 100 and 1000 times the median",
        ),
        tile(
            "Worst input, one scale",
            percent(worst["others"]["tensor"]),
            "",
            f"of {worst['name']} lost, first token aside; {percent(worst['others']['token'])} with a scale per token",
        ),
        tile(
            "Perplexity without them",
            esc(f"{TIMES} " + _times(removal["runs"][removal["main"]]["ratio"])),
            "",
            f"random dimensions: {TIMES} {_times(removal['runs']['random']['ratio'])}",
        ),
    ]
    return shown


def _removal_table(results: Results) -> str:
    removal = results["removal"]
    original = removal["original"]
    rows = [["the model as it is", "", _pm(original["perplexity"]), "", percent(original["top"]["mean"])]]
    for key, run in removal["runs"].items():
        dimensions = run.get("dimensions")
        rows.append(
            [
                esc(figures.name_of(key, run)),
                esc(", ".join(map(str, dimensions)) if dimensions and len(dimensions) <= 8 else ""),
                _pm(run["perplexity"]),
                f"{TIMES} " + _times(run["ratio"]),
                percent(run["top"]["mean"]),
            ]
        )
    return table(["Removed", "Dimensions", "Perplexity", "Ratio", "First choice"], rows, numbers_from=2)


def _pm(value: Mapping[str, Any]) -> str:
    mean, _, error = _times(value).partition(" ± ")
    return f'{mean} <span class="pm">± {error}</span>' if error else mean


def _found(results: Results) -> str:
    observed = results["observed"]
    heads = ["Outlier feature", "Where", "Layers", "Tokens", "Smallest", "Largest"]
    rows = []
    for key, where in (
        ("inputs", "behind norms, ≥ 6"),
        ("inputs_relative", "behind norms, ≥ 6 rms"),
        ("hidden_relative", "residual stream, ≥ 6 rms"),
    ):
        for entry in observed["outliers"][key][:12]:
            rows.append(
                [
                    str(entry["dimension"]),
                    esc(where),
                    percent(entry["layers"]),
                    percent(entry["tokens"]),
                    f"{entry['low']:,.1f}".replace("-", MINUS),
                    f"{entry['high']:,.1f}".replace("-", MINUS),
                ]
            )
    features = table(heads, rows, numbers_from=2) if rows else '<p class="note">No outlier features.</p>'
    return features + _massive_table(observed["massive"]["found"])


def _massive_table(found: list[Mapping[str, Any]]) -> str:
    if not found:
        return '<p class="note">No massive activations.</p>'
    rows = [
        [
            str(entry["dimension"]),
            esc("first of the window" if entry["token"] is None else repr(entry["text"])),
            " to ".join(dict.fromkeys(str(end(entry["blocks"]) + 1) for end in (min, max))),
            str(entry["windows"]),
            f"{entry['value']:,.0f}".replace("-", MINUS),
            f"{entry['ratio']:,.0f}",
        ]
        for entry in found[:12]
    ]
    return table(
        ["Massive: dimension", "Token", "After blocks", "Windows", "Value", "Times the median"], rows, numbers_from=3
    )
