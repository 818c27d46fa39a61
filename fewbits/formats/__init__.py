"""Data types: a grid of levels times a scaling over blocks."""

from fewbits.formats.base import Format, Quantized
from fewbits.formats.blocks import Scaling
from fewbits.formats.grid import Grid
from fewbits.formats.parse import known_formats, parse_format
from fewbits.formats.scheme import SCHEMES, Scheme, parse_scheme

__all__ = [
    "SCHEMES",
    "Format",
    "Grid",
    "Quantized",
    "Scaling",
    "Scheme",
    "known_formats",
    "parse_format",
    "parse_scheme",
]
