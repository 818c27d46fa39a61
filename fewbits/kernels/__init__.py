"""Products with quantized weights: one definition (`reference`), several fast ways, a choice explained."""

from fewbits.kernels.base import Kernel, LinearSpec, No, Packed, Yes
from fewbits.kernels.dispatch import KERNELS, choose, explain

__all__ = ["KERNELS", "Kernel", "LinearSpec", "No", "Packed", "Yes", "choose", "explain"]
