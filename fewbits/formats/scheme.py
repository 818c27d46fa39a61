"""Schemes: what the ecosystem calls a pair of formats for weights and activations.

``W4A16`` is 4-bit weights under 16-bit activations; its group size (128) can be overridden. Names and
defaults follow compressed-tensors' presets, so a checkpoint says the same thing to vLLM. Activations, where
quantized, are scaled dynamically per token or per group of a token, unless the name says STATIC or is FP8: then one
scale per linear comes from calibration (rows.py). Any format name is a weight-only scheme of its own (``nf4-g64``), two
names with a slash between them one for weights and activations (``fp4_e2m1-g32/fp8_e4m3-token``).

SmoothQuant's O1, O2 and O3 are one scale per weight tensor with activations per token, per tensor, and per tensor from
calibration: ``int8-tensor/int8-token``, ``int8-tensor/int8-tensor``, ``int8-tensor/int8-tensor-static``.

Case matters where a scheme has the name of a format: ``MXFP4`` is, as in the ecosystem, 4 bits on both sides, and
``mxfp4`` the format of weights alone, which is ``MXFP4A16``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fewbits.core.errors import BadInput, unknown
from fewbits.formats.base import Format
from fewbits.formats.parse import NAMED, known_formats, parse_format
from fewbits.formats.rows import check_rows

SCHEMES: dict[str, tuple[str, str | None]] = {
    "W4A16": ("int4-g128", None),
    "W4A16_ASYM": ("int4-asym-g128", None),
    "W8A16": ("int8-channel", None),
    "W3A16": ("int3-g128", None),
    "W3A16_ASYM": ("int3-asym-g128", None),
    "W2A16": ("int2-g64", None),
    "W2A16_ASYM": ("int2-asym-g64", None),
    "W8A8": ("int8-channel", "int8-token"),
    "INT8": ("int8-channel", "int8-token"),
    "W8A8_STATIC": ("int8-channel", "int8-tensor-static"),
    "W8A8_STATIC_SINKS": ("int8-channel", "int8-tensor-static-sinks"),
    "W4A8": ("int4-g128", "int8-token"),
    "W4A4": ("int4-g128", "int4-token"),
    "W4AFP8": ("int4-g128", "fp8_e4m3-token"),
    "FP8": ("fp8_e4m3-tensor", "fp8_e4m3-tensor-static"),
    "FP8_DYNAMIC": ("fp8_e4m3-channel", "fp8_e4m3-token"),
    "FP8_BLOCK": ("fp8_block", "fp8_e4m3-g128"),
    "FP8_W8A16": ("fp8_e4m3-channel", None),
    "FP4_W4A8": ("fp4_e2m1-g128", "fp8_e4m3-token"),
    "FP4_W4A4": ("fp4_e2m1-g128", "fp4_e2m1-token"),
    "NF4": ("nf4-g64", None),
    "FP4": ("fp4_e2m1-g16", None),
    "MXFP4A16": ("mxfp4", None),
    "MXFP6A16": ("mxfp6", None),
    "MXFP8A16": ("mxfp8", None),
    "MXFP4": ("mxfp4", "mxfp4"),
    "MXFP4XFP8": ("mxfp4", "fp8_e4m3-g128"),
    "MXFP6A8": ("mxfp6", "mxfp8"),
    "MXFP8": ("mxfp8", "mxfp8"),
    "NVFP4A16": ("nvfp4", None),
    "NVFP4": ("nvfp4", "nvfp4"),
    "NVFP4_4OVER6": ("nvfp4_4over6", "nvfp4"),
}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """`weights` and, where the products are quantized on both sides, `activations`."""

    name: str
    weights: Format
    activations: Format | None = None


def parse_scheme(name: str, group_size: int | None = None) -> Scheme:
    """The scheme (or weight-only format) called `name`, with its groups resized to `group_size` if given.

    Raises BadInput for an unknown name (listing the known, nearest first) or a group size that makes no sense.
    """
    if group_size is not None and group_size < 1:
        raise BadInput(f"group size {group_size}; a group holds at least 1 weight: common sizes are 32, 64 and 128")
    lowered = {key.lower(): key for key in SCHEMES}
    found = name if name in SCHEMES else None if name in NAMED else lowered.get(name.lower())
    weights, _, inputs = name.partition("/")
    weights, activations = SCHEMES[found] if found else (weights, inputs or None)
    if not found and weights.split("-")[0] not in {known.split("-")[0] for known in known_formats()}:
        raise unknown("scheme", name, [*SCHEMES, *known_formats()])
    if group_size is not None:
        resized = re.sub(r"-g\d+$", f"-g{group_size}", weights)
        if resized == weights and not weights.endswith(f"-g{group_size}"):
            raise BadInput(
                f"group size {group_size} given, but {name} scales {weights.rpartition('-')[2]}-wise: leave it out"
            )
        weights = resized
    rounded = None if activations is None else parse_format(activations)
    if rounded is not None:
        check_rows(rounded)
    format = parse_format(weights)
    if format.scaling.static:
        raise BadInput(f"weights as {weights}: static scales are for activations; write int8-channel/{weights}")
    return Scheme(name=found or name, weights=format, activations=rounded)
