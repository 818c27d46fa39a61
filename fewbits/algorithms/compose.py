"""Compositions: `--method awq,gptq,refine` as one recipe of steps.

Steps run in the order of their roles whatever the order they are named in: rewrites, transforms (as named), the one
method that makes codes (`rtn` if none is named), refinements (as named), a residual, learners. An option goes to every
step that has a field of that name; `gptq.damping` goes to that step alone. Its value must be of the field's type. A
method may bring others along (`brings`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from fewbits.algorithms import METHODS
from fewbits.algorithms.base import ROLES, Learner, Refinement, Residual, Rewrite, Step, Transform, WeightMethod
from fewbits.core.errors import BadInput, unknown

_SPELLED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "none"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to every block. names: of the steps, in the order they are taken."""

    names: tuple[str, ...]
    rewrites: tuple[Rewrite, ...] = ()
    transforms: tuple[Transform, ...]
    weights: WeightMethod
    refinements: tuple[Refinement, ...]
    residual: Residual | None = None
    learners: tuple[Learner, ...] = ()

    @property
    def name(self) -> str:
        return ",".join(self.names)

    @property
    def steps(self) -> dict[str, Step]:
        """name -> step, in the order they are taken."""
        residual = () if self.residual is None else (self.residual,)
        taken = (*self.rewrites, *self.transforms, self.weights, *self.refinements, *residual, *self.learners)
        return dict(zip(self.names, taken, strict=True))

    @property
    def statistics(self) -> frozenset[str]:
        """Everything calibration must collect."""
        return frozenset().union(*(step.statistics for step in self.steps.values()))

    @property
    def keeps_outliers(self) -> bool:
        """Whether some columns of weights and inputs stay in 16 bits beside the codes."""
        return getattr(self.weights, "keeps_outliers", False)

    def describe(self) -> dict[str, Any]:
        """JSON: the options of a single step, or those of each by its name."""
        options = {name: dataclasses.asdict(step) for name, step in self.steps.items()}  # type: ignore[call-overload]
        return {"name": self.name, **(options if len(options) > 1 else options[self.name])}


def compose(names: str | Iterable[str], options: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that `names` ("awq,gptq", or a sequence) spell, with `options`; BadInput says what is wrong."""
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    if len(set(wanted)) != len(wanted):
        raise BadInput(f"method {','.join(wanted)}: a step is named twice")
    kinds = {name: METHODS.get(name) for name in wanted}
    for name in [other for kind in kinds.values() for other in getattr(kind, "brings", ())]:
        kinds.setdefault(name, METHODS.get(name))
    wanted = list(kinds)
    solvers = [name for name in wanted if kinds[name].role == "weights"]
    if len(solvers) > 1:
        raise BadInput(f"method {','.join(wanted)}: {' and '.join(solvers)} both make the codes; name one of them")
    residuals = [name for name in wanted if kinds[name].role == "residual"]
    if len(residuals) > 1:
        raise BadInput(f"method {','.join(wanted)}: {' and '.join(residuals)} both add a residual; name one of them")
    after = [name for name in wanted if kinds[name].role in ("refine", "residual", "learn")]
    if after and any(getattr(kinds[name], "keeps_outliers", False) for name in solvers):
        raise BadInput(
            f"method {','.join(wanted)}: {solvers[0]} keeps columns beside the codes that {after[0]} knows nothing of; "
            "leave one of them out"
        )
    if not solvers:
        kinds["rtn"] = METHODS.get("rtn")
        solvers = ["rtn"]
    ordered = sorted(kinds, key=lambda name: ROLES.index(kinds[name].role))  # stable: as named within a role
    taken = _assign(ordered, kinds, dict(options or {}))
    made = {name: kinds[name](**taken[name]) for name in ordered}

    def of(role: str) -> tuple[Any, ...]:
        return tuple(made[name] for name in ordered if kinds[name].role == role)

    return Recipe(
        names=tuple(ordered),
        rewrites=of("rewrite"),
        transforms=of("transform"),
        weights=made[solvers[0]],
        refinements=of("refine"),
        residual=made[residuals[0]] if residuals else None,
        learners=of("learn"),
    )


def option_names(method: Any) -> list[str]:
    """Those that text can set; a field that takes a dataclass (`search`) is for Python alone."""
    return [name for name, kinds in _kinds(method).items() if not any(map(dataclasses.is_dataclass, kinds))]


def _assign(ordered: list[str], kinds: Mapping[str, Any], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """step -> its options."""
    fields = {name: {field.name for field in dataclasses.fields(kinds[name])} for name in ordered}
    taken: dict[str, dict[str, Any]] = {name: {} for name in ordered}
    for option, value in options.items():
        step, _, field = option.rpartition(".")
        if step and step not in fields:
            raise unknown("step in a method's option", step, ordered)
        among = [step] if step else ordered
        owners = [name for name in among if field in fields[name]]
        if not owners:
            allowed = {other for name in among for other in option_names(kinds[name])}
            raise unknown(f"option of method {step or ','.join(ordered)}", field, sorted(allowed))
        for name in owners:
            _check_value(option, value, kinds[name])
            taken[name][field] = value
    return taken


def _check_value(option: str, value: Any, method: Any) -> None:
    """BadInput for a value that is not of the type of `method`'s field."""
    name = option.rpartition(".")[2]
    kinds = _kinds(method)[name]
    if any(_fits(value, kind) for kind in kinds):
        return
    allowed = " or ".join(_SPELLED.get(kind) or f"a {kind.__name__} made in Python" for kind in kinds)
    default = next(field.default for field in dataclasses.fields(method) if field.name == name)
    known = type(default) in (int, float, str)
    raise BadInput(f"option {option} {value!r}: {allowed}" + (f", e.g. {default}" if known else ""))


def _kinds(method: Any) -> dict[str, tuple[Any, ...]]:
    """option -> the types that its value may have."""
    hints = get_type_hints(method)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(method)}
    return {
        name: get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,) for name, hint in fields.items()
    }


def _fits(value: Any, kind: Any) -> bool:
    if not isinstance(kind, type):
        return True  # tuple[int, ...], Literal: for the method's own check
    if isinstance(value, bool):
        return kind is bool  # though Python counts it among the integers
    if kind is float:
        return isinstance(value, (int, float)) and value == value
    return isinstance(value, kind)
