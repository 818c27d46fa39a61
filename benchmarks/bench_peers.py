"""Weight-only methods of fewbits beside those of other projects, at the same bits, on the same text.

Every peer is installed in an environment of its own (minutes each, once), quantizes the re-ordered embedded model
after the same calibration windows, and hands back the weights as its own library decodes them. One evaluation
measures all of them on text that calibration never saw. What is done already is kept in the work directory: an
interrupted run goes on, results made on another machine can be copied into its folder `results`, and those of an
earlier record count where it has none (`--record`).

    python benchmarks/bench_peers.py [--only AutoRound] [--text NAME=FILE] [--record FILE] [--jobs 2] [--dry-run]

The record is "peers"; `make docs` makes docs/comparison.md and its figure from it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from peers.environments import install, last_lines, recorded
from peers.measure import LENGTH, Judge, windows, write_dense
from peers.page import TEXT, verdicts
from peers.registry import ABSENT, CONTESTANTS, HERE, OURS, PEERS, ROWS, Contestant
from recorded import ROOT, save
from safetensors.torch import load_file

from fewbits.calibration.data import TokenSet
from fewbits.checkpoints.source import open_source
from fewbits.core.errors import FewbitsError
from fewbits.core.record import environment, write_json

CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fewbits-peers"
EVALUATION_SAMPLES = 16


class Run:
    """One run of the script: what everyone is given, and how one contestant becomes a result."""

    benchmark: ClassVar[str] = "peers"  # the name of its record, and of the script after `bench_`
    contestants: ClassVar[Sequence[Contestant]] = CONTESTANTS
    handed: ClassVar[str] = "decoded.safetensors"  # what a contestant hands back, and what is removed once measured
    own_folders: ClassVar[tuple[str, ...]] = ("algorithms", "calibration", "formats", "pipeline")

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.work = options, options.work
        for folder in ("results", "texts", "scratch"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        self.model = write_dense(options.model, self.work / "model")
        tokenizer = open_source(str(self.model)).load_tokenizer()

        def cut(name: str, text: str | None, split: str, samples: int) -> TokenSet:
            return windows(self.work / "texts" / f"{name}.safetensors", text, split, samples, tokenizer)

        self.calibration = cut(f"calibration-{options.samples}", None, "calibration", options.samples)
        self.texts = {TEXT: cut("evaluation-built-in", None, "evaluation", EVALUATION_SAMPLES)}
        for name, path in (pair.split("=", 1) for pair in options.text):
            self.texts[name] = cut(f"evaluation-{name}", path, "evaluation", EVALUATION_SAMPLES)
        self.judge: Judge | None = None
        self.judging = threading.Lock()
        self.environments: dict[str, dict[str, Any]] = {}
        self.recorded: dict[str, Any] = {"peers": {}}
        if options.record:
            self.adopt(json.loads(options.record.read_text(encoding="utf-8"))[self.benchmark])

    def adopt(self, record: dict[str, Any]) -> None:
        """Puts the results of `record` into the work directory where it has none.

        They were made of the same tokens, or they are refused; one of other options or versions is left out."""
        texts = {name: text["sha256"] for name, text in record["texts"].items()}
        if record["calibration"]["sha256"] != self.calibration.sha256 or any(
            texts.get(name) != text.sha256 for name, text in self.texts.items()
        ):
            raise FewbitsError(f"{self.options.record}: made of other texts than {', '.join(self.texts)} here")
        self.recorded = record
        found = {f"{each['row']}/{each['peer']}/{each['label']}": each for each in record["results"]}
        for contestant in self.contestants:
            result, path = found.get(contestant.key), self.result_path(contestant)
            if result is None or result["error"] or path.is_file() or result["options"] != contestant.options:
                continue
            if contestant.peer == OURS or self._same_environment(contestant.peer):
                write_json(path, result)

    def _same_environment(self, peer: str) -> bool:
        spec, then = PEERS[peer].environment.spec(), self.recorded["peers"].get(peer, {})
        return all(then.get(name) == value for name, value in spec.items())

    def result_path(self, contestant: Contestant) -> Path:
        """Where the result lies: named after all that decides it."""
        peer = PEERS.get(contestant.peer)
        decides = {
            "key": contestant.key,
            "options": contestant.options,
            "versions": peer.environment.spec() if peer else OURS,
            "calibration": self.calibration.sha256,
            "text": self.texts[TEXT].sha256,
        }
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        name = "-".join(contestant.key.replace("/", " ").split()).lower()
        return self.work / "results" / f"{name}-{digest}.json"

    def prepare(self, wanted: list[Contestant]) -> None:
        """Installs what `wanted` needs."""
        given = dict(pair.split("=", 1) for pair in self.options.python)
        for name in dict.fromkeys(contestant.peer for contestant in wanted if contestant.peer != OURS):
            if name in given:
                self.environments[name] = {"python": given[name], "seconds": None, "error": None}
                continue
            print(f"environment of {name} …", flush=True)
            found = install(name, PEERS[name].environment, self.options.envs, index=self.options.index)
            self.environments[name] = found
            print(f"environment of {name}: {found['error'] or 'ready'} ({found['seconds']} s)", flush=True)

    def installed(self, name: str) -> dict[str, Any]:
        """{"seconds", "error"} of the peer's environment, from this run, an earlier one or the record gone on from."""
        found = self.environments.get(name) or recorded(name, PEERS[name].environment, self.options.envs)
        if not found and self._same_environment(name):
            found = self.recorded["peers"][name]
        return {key: found.get(key) for key in ("seconds", "error")}

    def known(self, contestant: Contestant) -> dict[str, Any] | None:
        """What the work directory holds; one of ours counts as long as the code that made it is the present one."""
        path = self.result_path(contestant)
        if not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        stale = contestant.peer == OURS and found.get("source") != own_source(self.own_folders)
        return None if stale and not self.options.kept else found

    def result(self, contestant: Contestant) -> dict[str, Any]:
        """What is known, or made now; a failure is a result with `error`, and is tried again next time."""
        if found := self.known(contestant):
            return found
        head = {"row": contestant.row, "peer": contestant.peer, "label": contestant.label}
        if self.options.kept:
            return {**head, "error": "not run yet"}
        try:
            found = {**head, **self._make(contestant), "error": None}
        except FewbitsError as error:
            return {**head, "error": str(error)}
        if contestant.peer == OURS:
            found["source"] = own_source(self.own_folders)
        write_json(self.result_path(contestant), found)
        return found

    def _make(self, contestant: Contestant) -> dict[str, Any]:
        out = self.work / "scratch" / self.result_path(contestant).stem
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        try:
            self._quantize(contestant, out)
            facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
            handed = load_file(out / self.handed)
            with self.judging:
                if self.judge is None:
                    device = "cuda" if torch.cuda.is_available() else "cpu"
                    self.judge = Judge(self.model, self.texts, device, self.work / "scratch")
                evaluations = self.evaluations(self.judge, handed)
        finally:
            (out / self.handed).unlink(missing_ok=True)
        found = {**facts, "options": contestant.options, "evaluations": evaluations}
        return {**found, "machine": machine(self.benchmark)}

    def evaluations(self, judge: Judge, handed: dict[str, torch.Tensor]) -> dict[str, dict[str, Any]]:
        """Name of the text -> what the judge says of what a contestant handed back."""
        return judge.measure(handed)

    def script(self, peer: str) -> Path:
        """What runs in the environment of `peer`."""
        return HERE / "with_fewbits.py" if peer == OURS else PEERS[peer].script

    def given(self) -> list[Path]:
        """Files that scripts get after what all of them get."""
        return []

    def _quantize(self, contestant: Contestant, out: Path) -> None:
        if contestant.peer == OURS:
            python = sys.executable
        else:
            ready = self.environments[contestant.peer]
            if ready["error"]:
                raise FewbitsError(f"not installed: {ready['error']}")
            python = ready["python"]
        tokens = self.work / "texts" / f"calibration-{self.options.samples}.safetensors"
        options = json.dumps(contestant.options)
        command = [python, self.script(contestant.peer), self.model, tokens, options, out, *self.given()]
        setting = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if contestant.peer == OURS:
            setting["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with open(out / "log.txt", "w+", encoding="utf-8", errors="replace") as log:
            try:
                done = subprocess.run(
                    [*map(str, command)], cwd=out, env=setting, stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, timeout=self.options.limit, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise FewbitsError(f"not done within {self.options.limit} seconds") from error
            if done.returncode:
                log.seek(0)
                raise FewbitsError(f"{last_lines(log.read())} (exit {done.returncode})")


def machine(benchmark: str = Run.benchmark) -> dict[str, Any]:
    """Where a figure came from; the command without this machine's paths, which repeat nothing elsewhere."""
    return {**environment(), "command": f"python benchmarks/bench_{benchmark}.py"}


@functools.cache
def own_source(folders: tuple[str, ...]) -> str:
    """A hash over the code in `folders` of this package: what decides the figures of its own contestants."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted((ROOT / "fewbits" / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def line(result: dict[str, Any]) -> str:
    head = f"{result['row']:8} {result['peer']:15} {result['label']:18}"
    if result["error"]:
        return f"{head} {result['error']}"
    measured = result["evaluations"][TEXT]
    return (
        f"{head} {result['bits_per_weight']:.3f} bits  KL {measured['kl']['mean']:.4f} ± {measured['kl']['stderr']:.4f}"
        f"  perplexity {measured['perplexity']['mean']:.2f}  top-1 {measured['top1']['mean']:.3f}"
        f"  {result['seconds']:.0f} s on {result['device']}"
    )


def arguments(description: str | None = __doc__) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="what is quantized; the rows are made for the embedded model")
    parser.add_argument("--work", type=Path, default=CACHE / "work", help="texts, dense model and finished results")
    parser.add_argument("--envs", type=Path, default=CACHE / "envs", help="where the peers are installed")
    parser.add_argument("--index", default="", help="package index that torch is installed from")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PATH", help="an environment you have")
    parser.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE", help="measure what is run on this text too"
    )
    parser.add_argument("--samples", type=int, default=16, help=f"calibration windows of {LENGTH} tokens")
    parser.add_argument("--record", type=Path, help="an earlier record, whose results count where there are none yet")
    parser.add_argument(
        "--only", action="append", default=[], help="contestants whose row/peer/label holds this; may be repeated"
    )
    parser.add_argument("--jobs", type=int, default=1, help="contestants at a time")
    parser.add_argument("--limit", type=int, default=3600, help="seconds a contestant may take")
    parser.add_argument(
        "--kept", action="store_true", help="run nothing: only what the work directory holds, of whatever version"
    )
    parser.add_argument("--dry-run", action="store_true", help="print, write no record")
    options = parser.parse_args()
    options.work, options.envs = options.work.absolute(), options.envs.absolute()
    if pairs := [pair for pair in options.python + options.text if "=" not in pair]:
        parser.error(f"{pairs[0]!r}: --python takes PEER=PATH and --text NAME=FILE")
    return options


def results_of(run: Run) -> list[dict[str, Any]]:
    """The results of all contestants that are asked for, in the order of the registry."""
    options = run.options
    wanted = [each for each in run.contestants if not options.only or any(part in each.key for part in options.only)]
    missing = [each for each in wanted if run.known(each) is None]
    if not options.kept:
        run.prepare(missing)
    results = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for done in concurrent.futures.as_completed(pool.submit(run.result, each) for each in wanted):
            results.append(done.result())
            print(line(results[-1]), flush=True)
    order = {each.key: position for position, each in enumerate(run.contestants)}
    return sorted(results, key=lambda found: order[f"{found['row']}/{found['peer']}/{found['label']}"])


def main() -> None:
    options = arguments()
    run = Run(options)
    results = results_of(run)
    record = {
        "environment": machine(),
        "model": options.model,
        "calibration": run.calibration.description,
        "texts": {name: text.description for name, text in run.texts.items()},
        "rows": [{"name": row.name, "bits": row.bits, "budget": row.budget} for row in ROWS],
        "peers": {
            name: {**peer.environment.spec(), "calibrated": peer.calibrated, **run.installed(name)}
            for name, peer in PEERS.items()
        },
        "absent": [{"row": row, "peer": peer, "reason": reason} for (row, peer), reason in ABSENT.items()],
        "results": results,
    }
    for row, text in verdicts(record).items():
        print(f"{row}: {text}")
    if not options.dry_run:
        print(save("peers", record))


if __name__ == "__main__":
    main()
