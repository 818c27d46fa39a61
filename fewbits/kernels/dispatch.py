"""Which kernel multiplies: the first in the table that says yes.

Order is preference. `explain` asks every kernel, so a fast path is never lost silently.
"""

from __future__ import annotations

from functools import lru_cache

from fewbits.core.registry import Registry
from fewbits.kernels.base import Kernel, LinearSpec, No, Yes

KERNELS = Registry(
    "kernel",
    {
        "cpu_int4": "fewbits.kernels.cpu_int4:KERNEL",
        "triton_int8": "fewbits.kernels.triton_int8:KERNEL",
        "fp8_mm": "fewbits.kernels.fp8_mm:KERNEL",
        "int8_mm": "fewbits.kernels.int8_mm:KERNEL",
        "cpu_int8": "fewbits.kernels.cpu_int8:KERNEL",
        "cpu_fp16": "fewbits.kernels.cpu_fp16:KERNEL",
        "cuda_fragments": "fewbits.kernels.cuda_fragments:KERNEL",
        "cuda_int4": "fewbits.kernels.cuda_int4:KERNEL",
        "reference": "fewbits.kernels.reference:KERNEL",
    },
)


@lru_cache(maxsize=4096)
def choose(spec: LinearSpec) -> Kernel:
    """The preferred kernel that accepts `spec`; `reference` accepts everything."""
    for _, kernel in KERNELS.items():
        if kernel.accepts(spec):
            return kernel
    raise AssertionError(f"reference refused {spec}")


def explain(spec: LinearSpec) -> list[tuple[str, Yes | No]]:
    """Every kernel's answer to `spec`, in order of preference; the first Yes is what runs."""
    return [(name, kernel.accepts(spec)) for name, kernel in KERNELS.items()]
