"""Algorithms that turn a weight into codes. They know no format and no model by name."""

from fewbits.core.registry import Registry

METHODS = Registry(
    "method",
    {
        "inject": "fewbits.algorithms.inject:Inject",
        "rotate": "fewbits.algorithms.rotate:Rotate",
        "embeddings": "fewbits.algorithms.embeddings:Embeddings",
        "preshift": "fewbits.algorithms.preshift:PreShift",
        "smoothquant": "fewbits.algorithms.smoothing:SmoothQuant",
        "awq": "fewbits.algorithms.awq:AWQ",
        "gptq": "fewbits.algorithms.gptq:GPTQ",
        "gptaq": "fewbits.algorithms.gptaq:GPTAQ",
        "hqq": "fewbits.algorithms.hqq:HQQ",
        "llm_fp4": "fewbits.algorithms.llm_fp4:LLMFP4",
        "llm_int8": "fewbits.algorithms.llm_int8:LLMInt8",
        "rtn": "fewbits.algorithms.rtn:RTN",
        "refine": "fewbits.algorithms.refine:Refine",
        "lowrank": "fewbits.algorithms.low_rank:LowRankCorrection",
        "learned": "fewbits.algorithms.learned:LearnedRounding",
    },
)
