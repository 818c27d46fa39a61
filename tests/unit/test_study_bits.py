"""fewbits study bits: arithmetic of total bits, weights put back, truncation, what is found, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runtime_models import block_linears, byte_tokenizer, saved, tiny_llama
from typer.testing import CliRunner

from fewbits.cli.main import app
from fewbits.core.errors import BadInput, Unsupported
from fewbits.evaluation.evaluate import opened
from fewbits.evaluation.studies import depth
from fewbits.evaluation.studies.bits import Size, Subject, study
from fewbits.evaluation.studies.bits_analysis import as_trained, best_bits, equal_bits, front, log_ratio, trained
from fewbits.evaluation.studies.bits_grid import BITS, TYPES, grid_of
from fewbits.formats import parse_format
from fewbits.report.study_bits import page

SMALL: dict[str, Any] = {"samples": 3, "sequence_length": 24, "block_sizes": ("32", "channel"), "bits": (2, 4, 8)}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these products are too small to share
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return tiny_llama(layers=5), byte_tokenizer()


@pytest.fixture(scope="module")
def made(pair: tuple[Any, Any]) -> dict[str, Any]:
    before = {name: value.clone() for name, value in pair[0].state_dict().items()}
    record = study([pair], **SMALL)
    after = pair[0].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # put back bit for bit
    assert all("forward" not in vars(block) for block in pair[0].model.layers)
    return record


# ---- the numbers


def test_total_bits_are_exact(made: dict[str, Any], pair: tuple[Any, Any]) -> None:
    """64 hidden units, 160 in the MLP, 2 of 4 heads for keys and values, tied embeddings of 264 rows."""
    linear = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160
    for depth_ in (5, 4, 3):
        size = next(s for s in made["results"]["sizes"] if s["depth"] == depth_)
        assert size["block_bits"] == 16 * depth_ * (linear + 2 * 64)
        assert size["total_bits"] == size["block_bits"] + 16 * (264 * 64 + 64)
        point = next(p for p in made["results"]["points"] if p["depth"] == depth_ and p["format"] == "int4-asym-g32")
        groups = linear // 32
        assert point["block_bits"] == depth_ * (4 * linear + groups * (16 + 4) + 16 * 2 * 64)
        assert point["total_bits"] - point["block_bits"] == size["total_bits"] - size["block_bits"]
        assert point["bits_per_weight"] == pytest.approx(4 + 20 / 32, rel=1e-12)
    assert sum(p.numel() for p in pair[0].parameters()) == made["results"]["sizes"][0]["total_parameters"]


def test_the_more_bits_the_smaller_the_divergence(made: dict[str, Any]) -> None:
    whole = {p["format"]: p for p in made["results"]["points"] if p["depth"] == 5}
    assert whole["int8-asym-g32"]["kl"]["mean"] < 0.01 * whole["int2-asym-g32"]["kl"]["mean"]
    for entry in made["results"]["widths"]:
        assert entry["kl"]["stderr"] > 0 and entry["added_nll"]["stderr"] >= 0
    assert {p["type"] for p in whole.values()} == {"int-asym", "int", "float", "quantile", "lloyd"}
    assert {p["block"] for p in whole.values()} == {"32", "channel"}
    assert {p["bits"] for p in made["results"]["points"] if p["depth"] == 3} == {2, 4, 8}


def test_a_point_is_what_a_quantized_model_gives(made: dict[str, Any], pair: tuple[Any, Any]) -> None:
    model = tiny_llama(layers=5)
    format = parse_format("int4-asym-channel").with_scale_dtype(torch.float16)
    with torch.no_grad():
        for module in block_linears(model).values():
            module.weight.copy_(format.quantize(module.weight).dequantize())
    with opened((model, pair[1])) as loaded:
        from fewbits.evaluation.evaluate import score, windows

        tokens = windows(loaded, None, 3, 24)
        nll = score(Subject(loaded).forward, tokens.ids).nll
    point = next(p for p in made["results"]["points"] if p["format"] == "int4-asym-channel")
    assert point["nll"]["mean"] == pytest.approx(float(nll.mean()), rel=1e-6)


def test_the_same_twice_and_plain_json(made: dict[str, Any], pair: tuple[Any, Any]) -> None:
    again = study([pair], **SMALL)
    assert again["results"] == made["results"]
    json.dumps(made, allow_nan=False)


# ---- truncation


def test_a_truncated_model_is_the_model_without_those_blocks(pair: tuple[Any, Any]) -> None:
    model, ids = pair[0], torch.arange(20)[None]
    shallow = tiny_llama(layers=3)
    kept = (0, 2, 4)
    state = {
        name.replace(f"layers.{index}.", f"layers.{new}."): value
        for new, index in enumerate(kept)
        for name, value in model.state_dict().items()
        if f"layers.{index}." in name or "layers" not in name
    }
    shallow.load_state_dict(state)
    with torch.no_grad(), depth.truncated(model.model.layers, kept):
        assert torch.equal(model(ids).logits, shallow(ids).logits)
    assert depth.kept([3, 1, 2], 5, 3) == (0, 2, 4)
    assert depth.kept([1, 2, 3], 5, 1) == (0,) and depth.kept([1, 2, 3], 5, 5) == (0, 1, 2, 3, 4)


def test_importance_finds_the_block_that_does_nothing() -> None:
    model, tokenizer = tiny_llama(layers=5), byte_tokenizer()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    with opened((model, tokenizer)) as loaded:
        subject = Subject(loaded)
        values = depth.importances(subject.forward, subject.blocks, torch.arange(40).view(2, 20))
    assert values[2] == pytest.approx(0, abs=1e-6) and depth.by_importance(values)[0] == 2


def test_random_truncations_keep_the_ends_and_nest() -> None:
    order = depth.by_chance(8, seed=3, draw=1)
    assert order == depth.by_chance(8, seed=3, draw=1) and order != depth.by_chance(8, seed=3, draw=2)
    large, small = depth.kept(order, 8, 6), depth.kept(order, 8, 3)
    assert set(small) < set(large) and {0, 7} <= set(small)


def test_random_draws_become_error_bars(pair: tuple[Any, Any]) -> None:
    record = study([pair], **{**SMALL, "bits": (3, 4)}, types=("int",), truncate="random", draws=2, depths=(5, 3))
    assert [(s["depth"], s["draw"]) for s in record["results"]["sizes"]] == [(5, 0), (3, 0), (3, 1)]
    assert len([c for c in record["results"]["curves"] if c["depth"] == 3]) == 2  # one for each bit-width
    assert record["results"]["truncations"][0]["how"] == "random"


# ---- what points say


def _point(bits: int, total: int, nll: list[float]) -> dict[str, Any]:
    mean = {"mean": sum(nll) / len(nll)}
    return {"bits": bits, "total_bits": total, "block_bits": total, "nll": mean, "nll_by_window": nll}


def test_equal_bits_by_hand() -> None:
    """At 4 bits NLL falls from 4 to 3 over an octave, at 3 bits it is 0.5 higher half an octave to the left."""
    curves = [_point(4, 1 << 20, [4.0, 4.2]), _point(4, 1 << 21, [3.0, 3.2])]
    curves += [_point(3, 1 << 19, [4.5, 4.7]), _point(3, 1 << 21, [3.5, 3.9]), _point(5, 1 << 30, [1.0, 1.0])]
    low, high = equal_bits(curves, "total_bits")
    # over [20, 21]: 3 bits run from 4.0 to 3.5 and from 4.3 to 3.9; their means less those of 4 bits
    assert low["difference"]["mean"] == pytest.approx((3.75 - 3.5 + 4.1 - 3.7) / 2)
    assert (low["from"], low["to"]) == (1 << 20, 1 << 21)
    assert high["difference"] is None and high["from"] is None
    best = best_bits([low, high])
    assert best["bits"] == 4 and best["above"] is None
    assert best_bits([high])["bits"] is None
    assert [p["total_bits"] for p in front(curves, "total_bits")] == [1 << 19, 1 << 20, 1 << 21, 1 << 30]


def test_trained_sizes_follow_the_power_law() -> None:
    """L * (bits / 16)**0.076 + added: half the bits at no loss are worth 5 %, and cost nothing but what is added."""
    largest = {"nll": {"mean": 3.0}, "nll_by_window": [2.9, 3.1], "block_parameters": 100}
    points = [
        {"bits": 8, "format": "int8", "bits_per_weight": 8.0, "nll_by_window": [2.9, 3.1]},
        {"bits": 4, "format": "int4", "bits_per_weight": 4.0, "nll_by_window": [3.2, 3.6]},
    ]
    found = trained(points, largest)
    assert [entry["nll"]["mean"] for entry in found["widths"]] == pytest.approx([3 * 4**-0.076 + 0.4, 3 * 2**-0.076])
    assert found["bits"] == 8 and found["widths"][1]["nll"]["stderr"] == 0
    sizes = [{"depth": 4, "block_parameters": 100}, {"depth": 2, "block_parameters": 50}]
    expected = as_trained([{"depth": 4}, {"depth": 2}], sizes, largest)
    assert [entry["nll"]["mean"] for entry in expected] == pytest.approx([3.0, 3 * 2**0.076])


def test_log_ratio_is_paired() -> None:
    a = [1.0, 2.0, 4.0]
    exact = log_ratio(a, [value / 4 for value in a])
    assert exact["mean"] == pytest.approx(2) and exact["stderr"] == pytest.approx(0, abs=1e-12)
    assert log_ratio(a, [0.0, 0.0, 0.0]) == {"mean": None, "stderr": None}


def test_the_grid() -> None:
    grid = grid_of((3, 4), ("int-asym", "float"), ("channel", "64", "128"), ("nvfp4",), full=False)
    assert [cell.format.name for cell in grid.ladder] == ["int3-asym-g64", "int4-asym-g64"]
    assert [cell.format.name for cell in grid.rest] == [
        *(f"int{bits}-asym-{block}" for block in ("g128", "channel") for bits in (3, 4)),
        "fp4_e2m1-g64",
        "nvfp4",
    ]
    everything = grid_of(BITS, ("int",), ("64",), (), full=True)
    assert len(everything.ladder) == 6 * sum(map(len, TYPES.values())) and not everything.rest


# ---- the command, and what is refused


def test_the_command(tmp_path: Path) -> None:
    directory = saved(tiny_llama(layers=3), tmp_path / "model")
    out = tmp_path / "out"
    options = ["--samples", "2", "--sequence-length", "24", "--bits", "3-4,8", "--block-sizes", "32", "--depths", "3,2"]
    done = CliRunner().invoke(app, ["study", "bits", str(directory), *options, "-o", str(out), "--json"])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert {p["bits"] for p in printed["results"]["points"]} == {3, 4, 8}
    text = Path(printed["page"]).read_text(encoding="utf-8")
    assert (
        text.count('role="img"') == len(printed["figures"]) == 10 and "#01fe" not in text and "mathdefault" not in text
    )
    assert json.loads(Path(printed["record"]).read_text(encoding="utf-8"))["results"] == printed["results"]


def test_several_models_are_sizes(pair: tuple[Any, Any]) -> None:
    small = tiny_llama(layers=2)
    small.config.name_or_path = "small"
    record = study([pair, (small, pair[1])], **{**SMALL, "bits": (3, 4)}, types=("int",))
    assert [s["depth"] for s in record["results"]["sizes"]] == [5, 2]
    assert record["results"]["truncations"] == [] and record["results"]["trained"] is None
    parts = {part.key for part in page(record).parts}
    assert parts == {"scaling", "types", "blocks", "pareto"}
    with pytest.raises(BadInput, match="share a tokenizer"):
        study([pair, (small, Backwards())], **{**SMALL, "bits": (4,)})


class Backwards:
    """Ids are bytes, counted from the other end."""

    bos_token_id, eos_token_id = None, 256

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        return {"input_ids": [255 - byte for byte in text.encode()]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ("int4-gg",)}, "unknown format|names no scaling"),
        ({"types": ("int5000",)}, "unknown data type"),
        ({"bits": (1, 4)}, "1 bits: the study covers 2 to 8"),
        ({"bits": ()}, "no bits"),
        ({"bits": (2,), "types": ("float",)}, "none of the bits"),
        ({"block_sizes": ("64x",)}, "block size '64x'"),
        ({"block_sizes": ("4096",)}, "group size 4096 is larger than"),
        ({"depths": (9,)}, "depth 9: .* has 5 blocks"),
        ({"truncate": "middle"}, "unknown truncation 'middle'"),
        ({"draws": 4}, "by importance there is only one"),
    ],
)
def test_what_cannot_be_done_is_said(pair: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        study([pair], **{**SMALL, **options})
    assert all("forward" not in vars(block) for block in pair[0].model.layers)


def test_models_without_blocks_or_linears_are_refused(pair: tuple[Any, Any]) -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 4)

    with pytest.raises(Unsupported, match="no list of blocks"):
        study([(Flat(), pair[1])], **SMALL)
    hollow = tiny_llama(layers=2)
    hollow.model.layers = torch.nn.ModuleList(torch.nn.LayerNorm(64) for _ in range(2))
    with pytest.raises(Unsupported, match="no linear in its blocks"):
        study([(hollow, pair[1])], **SMALL)
    with pytest.raises(BadInput, match="one model"):
        study([pair, pair], depths=(2,), **SMALL)


def test_a_size_without_a_draw_has_a_plain_key() -> None:
    assert Size(model="m", depth=3, kept=(0, 1, 2)).key == "m/3"
    assert Size(model="m", depth=3, kept=(0, 1, 2), draw=2).key == "m/3/2"
