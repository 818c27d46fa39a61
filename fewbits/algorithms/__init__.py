"""Algorithms that turn a weight into codes. They know no format and no model by name."""

from fewbits.core.registry import Registry

METHODS = Registry(
    "method",
    {
        "rotate": "fewbits.algorithms.rotate:Rotate",
        "awq": "fewbits.algorithms.awq:AWQ",
        "gptq": "fewbits.algorithms.gptq:GPTQ",
        "gptaq": "fewbits.algorithms.gptaq:GPTAQ",
        "hqq": "fewbits.algorithms.hqq:HQQ",
        "rtn": "fewbits.algorithms.rtn:RTN",
        "refine": "fewbits.algorithms.refine:Refine",
        "learned": "fewbits.algorithms.learned:LearnedRounding",
    },
)
