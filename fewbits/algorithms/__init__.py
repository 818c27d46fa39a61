"""Algorithms that turn a weight into codes. They know no format and no model by name."""

from fewbits.core.registry import Registry

METHODS = Registry(
    "method",
    {
        "gptq": "fewbits.algorithms.gptq:GPTQ",
        "rtn": "fewbits.algorithms.rtn:RTN",
    },
)
