"""Modules that stand in a model where a dense one stood."""

from fewbits.nn.qlinear import QLinear, qlinears

__all__ = ["QLinear", "qlinears"]
