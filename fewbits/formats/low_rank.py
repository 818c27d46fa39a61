"""A low-rank matrix beside a quantized one: W ~ Q + B A.

    B [out, r], A [r, in], both in a 16-bit float:      16 r (out + in) bits,  16 r (1/in + 1/out) per weight
    y = Q x + B (A x)                                   r (out + in) multiplications more per token

At rank 16 in a 4096 x 4096 linear: an eighth of a bit per weight; in a 576 x 576 one almost a whole bit. It is counted
wherever bits are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fewbits.core.errors import BadInput

# Names, not eval: what a step may ask for and a checkpoint may say.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LowRankSpec:
    """What is known of a low-rank matrix before its values are: `rank`, at least 1, and the dtype of the factors."""

    rank: int
    dtype: torch.dtype = torch.bfloat16

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
        """Tensor -> its shape, beside a linear of `shape` (out, in)."""
        return {"residual_out": (shape[0], self.rank), "residual_in": (self.rank, shape[1])}

    def bits(self, shape: tuple[int, int]) -> int:
        """What the factors take."""
        return 8 * self.dtype.itemsize * self.rank * (shape[0] + shape[1])

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """B A, as it is stored: `out` is B [out, r], `into` is A [r, in]."""

    out: Tensor
    into: Tensor

    @property
    def spec(self) -> LowRankSpec:
        return LowRankSpec(rank=self.out.shape[1], dtype=self.out.dtype)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """B A [out, in], the product taken in `dtype`."""
        return self.out.to(dtype) @ self.into.to(dtype)

    def apply(self, x: Tensor) -> Tensor:
        """x [..., in] -> B (A x) [..., out], in x's dtype."""
        return functional.linear(functional.linear(x, self.into.to(x.dtype)), self.out.to(x.dtype))

    def to_state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        return {"residual_out": self.out, "residual_in": self.into}

    @staticmethod
    def from_state(spec: LowRankSpec, shape: tuple[int, int], state: Mapping[str, Tensor]) -> LowRank:
        """The inverse of `to_state`; BadInput where shapes, dtypes or values are not what `spec` says."""
        for name, expected in spec.layout(shape).items():
            found = state[name]
            if tuple(found.shape) != expected or found.dtype != spec.dtype:
                raise BadInput(
                    f"{name} is {found.dtype} {tuple(found.shape)}; rank {spec.rank} beside {shape} has "
                    f"{spec.dtype} {expected}"
                )
            if not bool(torch.isfinite(found).all()):
                raise BadInput(f"{name} holds NaN or infinite values")
        return LowRank(out=state["residual_out"], into=state["residual_in"])
