"""A plan: the format of every layer, what it was chosen from, and why. JSON, to be read, edited and reused.

    {"kind": "fewbits plan", "version": 1, "source": identity of the model, "model": its name,
     "bits": 3.5 asked for, "average": 3.49998 met, "predicted_kl": 0.12, ...
     "layers": {"model.layers.0.self_attn.q_proj": "int4-asym-g64", ...},
     "groups": [{"name": ..., "format": ..., "bits": ..., "loss": ..., "why": ..., "refused": {...}}, ...]}

Quantizing takes `source` and `layers`; a plan with edited layers is as good as any. The rest is for the reader.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbits.core.errors import BadInput
from fewbits.core.record import environment, write_json
from fewbits.formats.mix import Weights, parse_weights
from fewbits.planner.allocate import Option, allocate
from fewbits.planner.candidates import Group, size_of, why_not
from fewbits.planner.explain import price, sentence, steps
from fewbits.planner.measurements import Measurements, checked

KIND, VERSION = "fewbits plan", 1
LEAST_BITS, MOST_BITS = 1.0, 16.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """source: identity of the model it is for; layers: name in the model -> format; raw: the whole of the file."""

    source: str
    layers: dict[str, str]
    raw: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the bytes of a checkpoint."""
        return hashlib.sha256(json.dumps(self.layers, sort_keys=True).encode()).hexdigest()

    @property
    def formats(self) -> list[str]:
        """The formats in use, fewest bits first."""
        return sorted(set(self.layers.values()), key=lambda name: size_of(parse_weights(name)))

    def check(self, identity: str, names: Sequence[str]) -> None:
        """BadInput unless the plan is for this model and names exactly the linears `names`."""
        if self.source != identity:
            raise BadInput(
                f"the plan is for another model (identity {self.source[:12]}, this one has {identity[:12]}); "
                "make one with 'fewbits plan MODEL --bits ...'"
            )
        for left, right, what in (
            (names, self.layers, "has no format for {}: add it to its 'layers', or ignore the layer"),
            (self.layers, names, "names {}, which is not quantized: take it out of its 'layers', or do not ignore it"),
        ):
            if missing := sorted(set(left) - set(right)):
                raise BadInput(f"the plan {what.format(missing[0])} ({len(missing)} such layers)")

    def write(self, path: Path) -> None:
        write_json(path, self.raw)


def summary(plan: Plan) -> dict[str, Any]:
    """What a certificate says of the plan: what it was asked for, and what it promised."""
    wanted = ("bits", "average", "predicted_kl", "target")
    return {**{key: plan.raw[key] for key in wanted if key in plan.raw}, "sha256": plan.digest}


def read_plan(path: Path) -> Plan:
    """The plan in `path`; BadInput for a file that is none, is damaged, or names an unknown format."""
    raw = checked(path, KIND, VERSION, "make it again with 'fewbits plan MODEL --bits ...'")
    source, layers = raw.get("source"), raw.get("layers")
    if not isinstance(source, str) or not source:
        raise BadInput(f"'{path}' does not say which model it is for ('source'); make it again with 'fewbits plan'")
    if not isinstance(layers, dict) or not layers:
        raise BadInput(f"'{path}' has no 'layers'; make it again with 'fewbits plan MODEL --bits ...'")
    for name, format in layers.items():
        if not isinstance(format, str):
            raise BadInput(f"'{path}': the format of {name} is {format!r}; a name such as int4-asym-g64 is needed")
        try:
            parse_weights(format)
        except BadInput as error:
            raise BadInput(f"'{path}': {name}: {error}") from error
    return Plan(source=source, layers=dict(layers), raw=raw)


def check_budget(
    groups: Sequence[Group], formats: Sequence[Weights], bits: float, *, target: str, device: torch.device
) -> dict[str, dict[str, str]]:
    """Group -> format -> why it cannot have it. BadInput where a group can have none, or all together need more than
    `bits` per weight."""
    if not (math.isfinite(bits) and LEAST_BITS <= bits <= MOST_BITS):
        raise BadInput(f"{bits:g} bits per weight; an average from 2 to 8 is useful")
    refused, least = {}, 0
    for group in groups:
        reasons = {format.name: why_not(format, group, target, device) for format in formats}
        refused[group.name] = {name: why for name, why in reasons.items() if why is not None}
        if len(refused[group.name]) == len(formats):
            name, why = next(iter(refused[group.name].items()))
            raise BadInput(
                f"{group.name} can have none of the formats for target {target!r} ({name}: {why}); "
                "name others with --format, or ignore the layer"
            )
        least += min(group.bits(format) for format in formats if format.name not in refused[group.name])
    average = least / sum(group.weights for group in groups)
    if average > bits:
        raise BadInput(
            f"{bits:g} bits per weight: these formats take {average:.3f} at the least, scales included; "
            "ask for more bits, or for larger groups (--group-size 128) or smaller formats (--format)"
        )
    return refused


def make_plan(
    measured: Measurements, formats: Sequence[Weights], bits: float, *, target: str, device: torch.device, model: str
) -> Plan:
    """The best choice among `formats` that takes `bits` per weight on average, or less.

    Raises BadInput where that is below what the formats can do.
    """
    groups = sorted(measured.groups.values(), key=lambda group: group.block)
    refused = check_budget(groups, formats, bits, target=target, device=device)
    menus = [_menu(measured, group, formats, refused[group.name]) for group in groups]
    total = sum(group.weights for group in groups)
    found = allocate(menus, math.floor(bits * total + 1e-6))
    going = price(menus, found.chosen)
    entries: list[dict[str, Any]] = [
        {
            "name": group.name,
            "block": group.block,
            "kinds": list(group.kinds),
            "weights": group.weights,
            "format": option.format,
            "bits": option.bits / group.weights,
            "loss": option.loss,
            "error": measured.costs[group.name][option.format].error,
            "losses": {other.format: other.loss for other in menu},
            **steps(menu, option, going),
            "refused": refused[group.name],
        }
        for group, menu, option in zip(groups, menus, found.chosen, strict=True)
    ]
    for entry in entries:
        entry["why"] = sentence(entry)
    chosen = zip(groups, found.chosen, strict=True)
    layers = {member: option.format for group, option in chosen for member in group.members}
    raw = {
        "kind": KIND,
        "version": VERSION,
        "source": measured.settings["source"],
        "model": model,
        "bits": bits,
        "average": found.bits / total,
        "weights": total,
        "predicted_kl": found.loss,
        "gap": found.gap,
        "price": going,
        "target": target,
        "formats": [format.name for format in formats],
        "settings": measured.settings,
        "layers": layers,
        "groups": entries,
        "environment": environment(),
    }
    return Plan(source=measured.settings["source"], layers=layers, raw=raw)


def _menu(measured: Measurements, group: Group, formats: Sequence[Weights], refused: dict[str, str]) -> list[Option]:
    costs = measured.costs[group.name]
    return [
        Option(format=format.name, bits=costs[format.name].bits, loss=costs[format.name].loss)
        for format in formats
        if format.name not in refused
    ]
