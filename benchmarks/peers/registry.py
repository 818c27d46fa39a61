"""Who is compared with whom: rows, peers with their environments, and contestants.

A row is a width and a group size. Its budget is the code's bits and 32 more a group, what a scale and a zero point
in half precision take: a peer that stores more is shown, and not counted in that row. A contestant is one setting of
one peer in one row; those of the peer "fewbits" run in this process. To add a setting is to add a line.

A group of 128 does not divide the 576 inputs of the embedded model's linears. Peers that insist that it does get the
next groups on either side, 96 and 192, in that row; GPTQModel takes no other group and is shown as it answers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from peers.environments import Environment

HERE = Path(__file__).resolve().parent
OURS = "fewbits"
TRANSFORMERS = "transformers==5.17.0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    name: str
    bits: int
    group_size: int

    @property
    def budget(self) -> float:
        """The most bits per weight that count in this row."""
        return self.bits + 32 / self.group_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """`options` are the peer's own; label names the setting in tables and is unique within row and peer."""

    row: str
    peer: str
    label: str
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.row}/{self.peer}/{self.label}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """script: run in the environment, see contract.py. calibrated: whether it looks at text."""

    environment: Environment
    script: Path
    calibrated: bool


def _peer(script: str, calibrated: bool, *requirements: str, no_deps: tuple[str, ...] = ()) -> Peer:
    environment = Environment(requirements=requirements, no_deps=no_deps)
    return Peer(environment=environment, script=HERE / script, calibrated=calibrated)


ROWS = tuple(
    Row(name=f"W{bits} g{size}", bits=bits, group_size=size) for bits, size in ((4, 128), (4, 64), (3, 64), (2, 64))
)
# GPTQModel asks for a newer torch than the one everyone gets, and does without; its real needs are spelled out.
_GPTQMODEL = (
    "accelerate", "datasets", "defuser", "device-smi", "dill", "jinja2", "logbar", "ninja", "packaging", "pillow",
    "protobuf", "pyarrow", "pypcre", "requests", "safetensors", "threadpoolctl", "tokenicer", "torchao==0.18.0",
    "transformers==5.23.0",
)  # fmt: skip
PEERS: dict[str, Peer] = {
    "GPTQModel": _peer("with_gptqmodel.py", True, *_GPTQMODEL, no_deps=("gptqmodel==7.7.0",)),
    "llm-compressor": _peer("with_llmcompressor.py", True, "llmcompressor==0.14.0.1"),
    "AutoRound": _peer("with_autoround.py", True, "auto-round==0.16.1", TRANSFORMERS),
    "HQQ": _peer("with_hqq.py", False, "hqq==0.2.8.post1", TRANSFORMERS, "accelerate", "safetensors"),
    "optimum-quanto": _peer("with_quanto.py", False, "optimum-quanto==0.2.7", TRANSFORMERS, "accelerate"),
    "torchao": _peer("with_torchao.py", False, "torchao==0.18.0", TRANSFORMERS, "accelerate"),
    "bitsandbytes": _peer("with_bitsandbytes.py", False, "bitsandbytes==0.50.2", TRANSFORMERS, "accelerate"),
    "llama.cpp": _peer("with_llama_cpp.py", True, "xllamacpp==2026.10.11549", TRANSFORMERS, "numpy"),
}

# (row, peer) -> why it has no entry there.
ABSENT = {
    ("W4 g128", "llama.cpp"): "its 4-bit types take 4.5 bits or more: see W4 g64",
    ("W3 g64", "optimum-quanto"): "has 2, 4 and 8 bits, not 3",
    ("W3 g64", "bitsandbytes"): "NF4 and FP4 are 4-bit",
    ("W2 g64", "bitsandbytes"): "NF4 and FP4 are 4-bit",
}


def _groups(row: Row) -> tuple[int, ...]:
    """The group sizes of `row` that divide the embedded model's linears."""
    return (96, 192) if row.group_size == 128 else (row.group_size,)


def _of(row: Row) -> list[Contestant]:
    found: list[Contestant] = []

    def add(peer: str, label: str, **options: Any) -> None:
        found.append(Contestant(row=row.name, peer=peer, label=label, options=options))

    width, exact = {"bits": row.bits, "group_size": row.group_size}, _groups(row)
    for size in exact:
        own = {"bits": row.bits, "group_size": size}
        for symmetric in (True, False):
            kind = "sym" if symmetric else "asym"
            add("llm-compressor", f"GPTQ g{size} {kind}", **own, sym=symmetric, method="gptq")
        add("llm-compressor", f"AWQ g{size} asym", **own, sym=False, method="awq")
        add("torchao", f"g{size} asym", **own, algorithm="affine")
        add("torchao", f"g{size} HQQ scales", **own, algorithm="hqq_scale_only")
    for symmetric in (True, False):
        kind = "sym" if symmetric else "asym"
        add("GPTQModel", f"GPTQ g{row.group_size} {kind}", **width, sym=symmetric)
        add("AutoRound", f"g{row.group_size} {kind}", **width, sym=symmetric)
    for axis in (1, 0):
        add("HQQ", f"g{row.group_size} axis {axis}", **width, axis=axis)
    if row.bits != 3:
        add("optimum-quanto", f"qint{row.bits}", **width)
        add("optimum-quanto", f"qint{row.bits} HQQ", **width, optimizer="hqq")
    if row.bits == 4:
        add("bitsandbytes", f"NF4 g{row.group_size}", **width)
        add("bitsandbytes", f"NF4 g{row.group_size} double", **width, double_quant=True)
    if row.group_size == 64:
        named = {4: ("Q4_K", "IQ4_NL", "Q4_0"), 3: ("Q3_K",), 2: ("Q2_K",)}[row.bits]
        for name in named:
            add("llama.cpp", name, **width, type=name)
    found += _ours(row)
    return found


# Learned rounding, and where its bits are best spent: no more than the best peer of the row stores.
_LEARNED = {"W4 g128": "lloyd4-g96", "W4 g64": "lloyd4-g64", "W3 g64": "lloyd3-g64", "W2 g64": "int2-asym-g96"}
_THOROUGH = {"iterations": 150, "tokens": 2048}


def _ours(row: Row) -> list[Contestant]:
    found = []

    def add(label: str, scheme: str, method: str, copies: int = 0, **method_options: Any) -> None:
        options: dict[str, Any] = {"scheme": scheme, "method": method, "method_options": method_options}
        if copies:
            options["continuations"] = copies
        found.append(Contestant(row=row.name, peer=OURS, label=label, options=options))

    for kind, zero in (("asym", "-asym"), ("sym", "")):
        scheme = f"int{row.bits}{zero}-g{row.group_size}"
        for method in ("gptq", "rtn"):
            add(f"{method.upper()} {kind}", scheme, method)
        add(f"GPTAQ {kind}", scheme, "gptaq")
    if row.name == "W3 g64":  # compositions, and methods on their own
        for method in ("hqq", "awq", "awq,gptq", "gptq,refine", "gptaq,refine", "gptq,lowrank"):
            add(f"{method} asym", "int3-asym-g64", method, **({"rank": 8} if "lowrank" in method else {}))
    best = _LEARNED[row.name]
    add(f"GPTQ {best}", best, "gptq")
    add(f"learned {best}", best, "gptq,learned", 3, **_THOROUGH)
    return found


CONTESTANTS: tuple[Contestant, ...] = tuple(contestant for row in ROWS for contestant in _of(row))
