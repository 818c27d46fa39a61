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
from fewbits.formats import Format, parse_format
from fewbits.planner.allocate import Option, allocate
from fewbits.planner.candidates import Group, why_not
from fewbits.planner.explain import price, reason
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
        return sorted(set(self.layers.values()), key=lambda name: parse_format(name).bits_per_weight((4096, 4096)))

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
            parse_format(format)
        except BadInput as error:
            raise BadInput(f"'{path}': {name}: {error}") from error
    return Plan(source=source, layers=dict(layers), raw=raw)


def make_plan(
    measured: Measurements, formats: Sequence[Format], bits: float, *, target: str, device: torch.device, model: str
) -> Plan:
    """The best choice among `formats` that takes `bits` per weight on average, or less.

    Raises BadInput where that is below what the formats can do.
    """
    if not (math.isfinite(bits) and LEAST_BITS <= bits <= MOST_BITS):
        raise BadInput(f"{bits:g} bits per weight; an average from 2 to 8 is useful")
    groups = list(measured.groups.values())
    refused = {group.name: _refused(group, formats, target, device) for group in groups}
    menus = [_menu(measured, group, formats, refused[group.name], target) for group in groups]
    total = sum(group.weights for group in groups)
    least = sum(min(option.bits for option in menu) for menu in menus) / total
    if least > bits:
        raise BadInput(
            f"{bits:g} bits per weight: these formats take {least:.3f} at the least, scales included; "
            f"ask for more bits, or for larger groups (--group-size 128) or smaller formats (--format)"
        )
    found = allocate(menus, math.floor(bits * total + 1e-6))
    going = price(menus, found.chosen)
    entries = [
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
            "why": reason(menu, option, going),
            "refused": refused[group.name],
        }
        for group, menu, option in zip(groups, menus, found.chosen, strict=True)
    ]
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


def _refused(group: Group, formats: Sequence[Format], target: str, device: torch.device) -> dict[str, str]:
    reasons = {format.name: why_not(format, group, target, device) for format in formats}
    return {name: why for name, why in reasons.items() if why is not None}


def _menu(
    measured: Measurements, group: Group, formats: Sequence[Format], refused: dict[str, str], target: str
) -> list[Option]:
    costs = measured.costs[group.name]
    menu = [
        Option(format=format.name, bits=costs[format.name].bits, loss=costs[format.name].loss)
        for format in formats
        if format.name not in refused
    ]
    if not menu:
        name, why = next(iter(refused.items()))
        raise BadInput(
            f"{group.name} can have none of the formats for target {target!r} ({name}: {why}); "
            "name others with --format, or ignore the layer"
        )
    return menu
