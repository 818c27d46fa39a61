"""What every format costs every group, on disk: measured once, good for any budget.

    {"kind": "fewbits measurements", "version": 1,
     "settings": {"source": identity, "method": ..., "text": sha256, "seed": ..., "dtype": of the scales, ...},
     "groups": {"model.layers.0.self_attn.q_proj+k_proj+v_proj":
        {"block": 0, "kinds": [...], "members": {"model.layers.0.self_attn.q_proj": [out, in], ...},
         "options": {"int3-asym-g64": {"bits": 2188800, "loss": 0.0031, "error": 0.012}, ...}}},
     "environment": {...}}

`settings` are what the losses depend on; a file with other settings is refused, not mixed with. Formats that a file
lacks are measured and added. The file is written after every block, so that a killed measurement continues there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbits.checkpoints.base import read_json
from fewbits.checkpoints.native import SCALE_DTYPES
from fewbits.core.errors import BadInput
from fewbits.core.record import environment, write_json
from fewbits.formats.mix import parse_weights
from fewbits.planner.candidates import Group

KIND, VERSION = "fewbits measurements", 1


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One format on one group: bits it takes, nats per token it costs the model, relative error of the outputs."""

    bits: int
    loss: float
    error: float


@dataclass(kw_only=True)
class Measurements:
    """settings: JSON that decides the losses. groups: by name; costs: group -> format -> Cost."""

    settings: dict[str, Any]
    groups: dict[str, Group] = field(default_factory=dict)
    costs: dict[str, dict[str, Cost]] = field(default_factory=dict)

    def add(self, group: Group, format: str, cost: Cost) -> None:
        self.groups[group.name] = group
        self.costs.setdefault(group.name, {})[format] = cost

    def of(self, group: Group) -> dict[str, Cost]:
        """What has been measured of `group`, by format."""
        return self.costs.get(group.name, {})

    def write(self, path: Path) -> None:
        write_json(path, {
            "kind": KIND,
            "version": VERSION,
            "settings": self.settings,
            "groups": {
                name: {
                    "block": group.block,
                    "kinds": list(group.kinds),
                    "members": {member: list(shape) for member, shape in group.members.items()},
                    "options": {
                        format: {"bits": cost.bits, "loss": cost.loss, "error": cost.error}
                        for format, cost in self.costs[name].items()
                    },
                }
                for name, group in self.groups.items()
            },
            "environment": environment(),
        })  # fmt: skip


def read_measurements(path: Path, settings: dict[str, Any]) -> Measurements:
    """The measurements in `path`, which must be of these `settings`; empty ones where there is no file.

    Raises BadInput for a file that is damaged, of another version, or of another model, text or method.
    """
    if not path.exists():
        return Measurements(settings=settings)
    raw = checked(path, KIND, VERSION, "measure again into another file")
    known = raw.get("settings")
    if not isinstance(known, dict):
        raise BadInput(f"'{path}' has no settings; measure again into another file")
    if changed := sorted(key for key in settings.keys() | known.keys() if settings.get(key) != known.get(key)):
        what = changed[0]
        raise BadInput(
            f"'{path}' was measured with another {what} ({known.get(what)!r}, now {settings.get(what)!r}); "
            "repeat its settings, or measure into another file"
        )
    found = Measurements(settings=settings)
    entries = raw.get("groups")
    if not isinstance(entries, dict):
        raise BadInput(f"'{path}' has no groups; measure again into another file")
    for name, entry in entries.items():
        try:
            group, costs = _group(name, entry, str(settings["dtype"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"'{path}': group {name!r} is damaged ({error}); measure again into another file") from error
        for format, cost in costs.items():
            found.add(group, format, cost)
    return found


def checked(path: Path, kind: str, version: int, way_out: str) -> dict[str, Any]:
    """The JSON object in `path` if it says it is of this kind and version; BadInput with the way out if not."""
    try:
        raw = read_json(path)
    except BadInput as error:
        raise BadInput(f"{error}; {way_out}") from error
    if raw.get("kind") != kind:
        found = f"its kind is {raw['kind']!r}" if "kind" in raw else "it has no kind"
        raise BadInput(f"'{path}' is no file of {kind} ({found}); {way_out}")
    if raw.get("version") != version:
        raise BadInput(f"'{path}' is of version {raw.get('version')!r}; this fewbits reads {version}: {way_out}")
    return raw


def _group(name: str, entry: dict[str, Any], scale_dtype: str) -> tuple[Group, dict[str, Cost]]:
    members = {member: (_size(shape[0]), _size(shape[1])) for member, shape in entry["members"].items()}
    group = Group(name=name, block=int(entry["block"]), kinds=tuple(map(str, entry["kinds"])), members=members)
    costs = {}
    for format, option in entry["options"].items():
        bits = group.bits(parse_weights(format).with_scale_dtype(SCALE_DTYPES[scale_dtype]))
        if option["bits"] != bits:
            raise ValueError(f"{format} takes {bits} bits, the file says {option['bits']}")
        loss, error = float(option["loss"]), float(option["error"])
        if not (math.isfinite(loss) and math.isfinite(error)):
            raise ValueError(f"the loss of {format} is not finite")
        costs[format] = Cost(bits=bits, loss=loss, error=error)
    return group, costs


def _size(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is no dimension")
    return value
