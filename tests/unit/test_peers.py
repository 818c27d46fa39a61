"""The comparison with other projects, without them: bits, verdicts, page, figure, and what a failure becomes.

Nothing is installed or downloaded; the record is made up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_peers
import pytest
import torch
from peers import contract, environments, page
from peers.measure import Judge
from peers.registry import ABSENT, CONTESTANTS, OURS, PEERS, ROWS, Contestant
from tiny_runtime_models import saved, tiny_llama

from fewbits.calibration.data import TokenSet
from fewbits.core.errors import FewbitsError


def result(row: str, peer: str, label: str, bits: float, kl: float, **changes: Any) -> dict[str, Any]:
    measured = {
        "kl": {"mean": kl, "stderr": kl / 20},
        "perplexity": {"mean": 13.0, "stderr": 1.0},
        "top1": {"mean": 0.8, "stderr": 0.01},
    }
    found = {
        "row": row, "peer": peer, "label": label, "bits_per_weight": bits, "evaluations": {"built-in": measured},
        "seconds": 61.0, "peak_rss_bytes": 10**9, "device": "cpu", "versions": {peer: "1.0"}, "settings": "as told",
        "notes": [], "machine": {"cpu": "a CPU"}, "error": None,
    }  # fmt: skip
    return {**found, **changes}


@pytest.fixture
def record() -> dict[str, Any]:
    failed = {"row": "W4 g64", "peer": "HQQ", "label": "g64 axis 1", "error": "not installed: no such wheel"}
    text = {"samples": 2, "sequence_length": 8, "tokens": 16, "description": "a text"}
    return {
        "environment": {"date": "2026-11-25T00:00:00+00:00"},
        "calibration": text,
        "texts": {"built-in": text},
        "rows": [{"name": row.name, "bits": row.bits, "budget": row.budget} for row in ROWS],
        "peers": {
            "AutoRound": {"calibrated": True, "seconds": 90.0, "error": None},
            "HQQ": {"calibrated": False, "seconds": 3.0, "error": "no such wheel"},
        },
        "absent": [{"row": "W3 g64", "peer": "HQQ", "reason": "has no three bits"}],
        "results": [
            result("W4 g64", "AutoRound", "sym", 4.25, 0.10),
            result("W4 g64", "AutoRound", "fat", 5.5, 0.01),
            result("W4 g64", OURS, "GPTQ sym", 4.25, 0.08),
            result("W4 g64", OURS, "GPTQ asym", 4.3125, 0.05),
            result("W3 g64", "AutoRound", "sym", 3.25, 0.30),
            failed,
        ],
    }


# ---- counting


def test_bits_count_the_short_last_group() -> None:
    parts = contract.group_parts([(2, 576), (3, 128)], 4, 128, 16, 4)
    groups = 2 * 5 + 3 * 1
    assert parts == {"codes": 4 * (2 * 576 + 3 * 128), "scales": 16 * groups, "zero points": 4 * groups}
    assert "zero points" not in contract.group_parts([(2, 64)], 4, 64, 16)


def test_what_a_script_writes_is_what_it_decoded(tmp_path: Path) -> None:
    work = contract.Job(model=tmp_path, ids=torch.zeros(1, 8), options={}, out=tmp_path / "out")
    with work:
        weight = torch.randn(4, 64)
    parts = contract.group_parts([(4, 64)], 4, 64, 16)
    contract.finish(work, {"a.weight": weight, "a.norm": torch.ones(64)}, parts, ["safetensors"], "some")
    facts = json.loads((tmp_path / "out" / "facts.json").read_text(encoding="utf-8"))
    assert facts["bits_per_weight"] == 4.25 and facts["weights"] == 256
    assert set(facts["versions"]) == {"python", "torch", "safetensors"}
    assert torch.equal(bench_peers.load_file(tmp_path / "out" / "decoded.safetensors")["a.weight"], weight)


# ---- the registry


def test_contestants_name_known_rows_peers_and_scripts() -> None:
    assert len({each.key for each in CONTESTANTS}) == len(CONTESTANTS)
    assert {each.row for each in CONTESTANTS} == {row.name for row in ROWS}
    assert {each.peer for each in CONTESTANTS} == {*PEERS, OURS}
    assert all(peer.script.is_file() for peer in PEERS.values())
    assert not ABSENT.keys() & {(each.row, each.peer) for each in CONTESTANTS}
    for row in ROWS:  # everyone is in every row, or there is a reason
        named = {each.peer for each in CONTESTANTS if each.row == row.name}
        named |= {peer for where, peer in ABSENT if where == row.name}
        assert named == {*PEERS, OURS}, row.name


# ---- failures


def test_an_install_that_fails_is_named_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Path] = []

    def fail(directory: Path, *_: Any) -> None:
        tries.append(directory)
        raise subprocess.CalledProcessError(1, "pip", stderr="Looking\nERROR: No matching distribution for nothing\n")

    monkeypatch.setattr(environments, "_install", fail)
    wanted = environments.Environment(requirements=("nothing==1",))
    found = environments.install("nobody", wanted, tmp_path)
    assert found["error"] == "ERROR: No matching distribution for nothing"
    assert environments.recorded("nobody", wanted, tmp_path) == found
    environments.install("nobody", wanted, tmp_path)
    assert len(tries) == 2

    def slow(*_: Any) -> None:
        raise subprocess.TimeoutExpired("pip", 600)

    monkeypatch.setattr(environments, "_install", slow)
    assert "10 minutes" in environments.install("nobody", wanted, tmp_path)["error"]


def test_what_is_installed_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Path] = []
    monkeypatch.setattr(environments, "_install", lambda directory, *_: tries.append(directory))
    wanted = environments.Environment(requirements=("nothing==1",))
    assert environments.install("one", wanted, tmp_path)["error"] is None
    environments.install("one", wanted, tmp_path)
    assert len(tries) == 1
    environments.install("one", environments.Environment(requirements=("nothing==2",)), tmp_path)
    assert len(tries) == 2


def a_run(tmp_path: Path, **installed: dict[str, Any]) -> bench_peers.Run:
    run = bench_peers.Run.__new__(bench_peers.Run)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    run.options = argparse.Namespace(samples=1, limit=60, envs=tmp_path, kept=False, record="record.json")
    run.work, run.model, run.environments, run.recorded = tmp_path, tmp_path, installed, {"peers": {}}
    run.calibration = TokenSet.of(ids, {})
    run.texts = {"built-in": run.calibration}
    for folder in ("results", "scratch", "texts"):
        (tmp_path / folder).mkdir()
    return run


def test_a_failure_is_a_result_with_an_error_and_is_not_kept(tmp_path: Path) -> None:
    broken = {"python": sys.executable, "seconds": 1.0, "error": "no such wheel"}
    absent = {"python": sys.executable, "seconds": 1.0, "error": None}
    run = a_run(tmp_path, HQQ=broken, torchao=absent)
    options = {"bits": 4, "group_size": 64}
    found = run.result(Contestant(row="W4 g64", peer="HQQ", label="a", options=options))
    assert found["error"] == "not installed: no such wheel"
    # This environment has no torchao: the script's own last words are the error.
    found = run.result(Contestant(row="W4 g64", peer="torchao", label="b", options=options))
    assert "exit 1" in found["error"]
    assert list((tmp_path / "results").iterdir()) == []


def test_results_are_kept_and_ours_only_while_the_code_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path)
    made: list[str] = []

    def make(contestant: Contestant) -> dict[str, Any]:
        made.append(contestant.peer)
        return {"bits_per_weight": 4.25}

    monkeypatch.setattr(run, "_make", make)
    contestants = [Contestant(row="W4 g64", peer=peer, label="a", options={}) for peer in ("HQQ", OURS)]
    for _ in range(2):
        assert [run.result(each)["bits_per_weight"] for each in contestants] == [4.25, 4.25]
    assert made == ["HQQ", OURS]
    monkeypatch.setattr(bench_peers, "own_source", lambda _: "changed since")
    for each in contestants:
        run.result(each)
    assert made == ["HQQ", OURS, OURS]


def test_an_earlier_record_counts_where_there_is_nothing_newer(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    described = {"sha256": run.calibration.sha256}
    ours, theirs, moved = (next(each for each in CONTESTANTS if each.peer == peer) for peer in (OURS, "HQQ", "torchao"))
    specs = {peer: {**PEERS[peer].environment.spec(), "seconds": 7.0, "error": None} for peer in PEERS}
    specs["torchao"]["requirements"] = ["torchao==0"]
    results = [
        result(each.row, each.peer, each.label, 4.25, 0.1, options=each.options) for each in (ours, theirs, moved)
    ]
    record = {"calibration": described, "texts": {"built-in": described}, "peers": specs, "results": results}
    bench_peers.write_json(run.result_path(ours), {"newer": True})
    run.adopt(record)
    run.options.kept = True
    assert run.result(ours) == {"newer": True}
    assert run.result(theirs) == results[1]
    assert run.result(moved)["error"] == "not run yet"  # of another version
    assert run.installed("HQQ") == {"seconds": 7.0, "error": None}
    with pytest.raises(FewbitsError, match="other texts"):
        run.adopt({**record, "calibration": {"sha256": "another"}})


# ---- the evaluation


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    directory = tmp_path_factory.mktemp("judge")
    saved(tiny_llama(), directory / "model")
    ids = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    tokens = TokenSet.of(ids, {})
    return Judge(directory / "model", {"built-in": tokens}, "cpu", directory)


def test_the_original_weights_lose_nothing_and_others_do(judge: Judge) -> None:
    same = {name: judge.parameters[name].detach().clone() for name in judge.linears()}
    found = judge.measure(same)["built-in"]
    assert found["kl"]["mean"] < 1e-6 and found["top1"]["mean"] == 1.0
    other = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in same.items()}
    assert judge.measure(other)["built-in"]["kl"]["mean"] > 1e-3
    assert judge.measure(same)["built-in"]["kl"]["mean"] < 1e-6  # and the model is left as it was


def test_weights_that_are_not_all_there_are_refused(judge: Judge) -> None:
    whole = {name: judge.parameters[name].detach().clone() for name in judge.linears()}
    first = min(whole)
    for bad, said in (
        ({name: tensor for name, tensor in whole.items() if name != first}, "not quantized"),
        ({**whole, first: whole[first][:1]}, "no tensor of the model"),
        ({**whole, first: whole[first] * float("nan")}, "NaN"),
    ):
        with pytest.raises(FewbitsError, match=said):
            judge.measure(bad)


# ---- the page


def test_the_verdict_compares_at_no_more_bits_within_the_budget(record: dict[str, Any]) -> None:
    found = page.verdict(record, record["rows"][1])
    assert found is not None and found.ours is not None
    assert (found.peer["label"], found.ours["label"]) == ("sym", "GPTQ sym")  # not the fat one, not the asymmetric one
    assert found.ratio == pytest.approx(0.8)
    three = page.verdict(record, record["rows"][2])
    assert three is not None and three.ours is None and "none of ours" in str(three)
    assert page.verdict(record, record["rows"][3]) is None


def test_the_page_names_errors_and_reasons(record: dict[str, Any]) -> None:
    text = page.page(record)
    assert "HQQ g64 axis 1: not installed: no such wheel" in text
    assert "| HQQ | - | no | no such wheel | - |" in text
    assert "HQQ: has no three bits" in text
    assert "| W4 g64 | - | 0.0500 ± 0.0025 | - |" in text
    assert "**fewbits GPTQ asym**" in text and "5.500 (over)" in text
    assert "| W4 g64 | AutoRound sym | 4.250 | 0.1000 ± 0.0050 | GPTQ sym | 4.250 | 0.0800 ± 0.0040 | 0.80 |" in text


def test_the_frontier_keeps_what_nothing_beats(record: dict[str, Any]) -> None:
    assert [each["label"] for each in page.frontier(page.measured(record))] == ["sym", "GPTQ sym", "GPTQ asym", "fat"]


def test_the_figure_is_drawn_from_the_record(record: dict[str, Any], tmp_path: Path) -> None:
    from fewbits.report.figure import save

    written = save(tmp_path / "peers", lambda figure, wide: page.draw(record, figure, wide), 4.0)
    assert "AutoRound" in written[1].read_text(encoding="utf-8")
