"""Low-rank error correction: what quantization lost, as far as a few directions can hold it, kept in 16 bits.

    min over B [out, r], A [r, in] of  tr((D - B A) H (D - B A)^T),      D = W - Q

With H = L L^T this is ||D L - (B A) L||^2, and the best matrix of rank r is the truncated singular value decomposition
of D L = U S V^T:

    B A = U_r S_r V_r^T L^-1  =  U_r U_r^T D                    the loss that is left: sum of S_k^2 over k > r

U_r are the first eigenvectors of D H D^T [out, out]: no factor of H is needed where a linear puts out no more than it
takes in. Where it puts out more, V_r are those of L^T D^T D L [in, in] and A = V_r^T L^-1. H is damped as GPTQ's, so
that directions which calibration hardly saw are not free; without calibration H = I.

*Storage.* A is rounded to 16 bits first, and B is then the least-squares solution for the A that is stored. A row of B
that loses more than it gains once it is rounded is zero. So no row ends worse than without a residual.

*Rounds.* W - B A is quantized again by the same method, B A fitted again to what that leaves, and the best of all
rounds kept. The second Q no longer has to spend its range on what B A holds. Each round costs what the method costs.

*Place.* After refinement, for which the codes are all there is, and before learning, which moves codes to what the
block puts out, with the residual in place. The other way round the residual pulls the layers back to their own outputs
and gains the block little (LOG.md).

*Price.* In a block of the embedded model 16 directions hold two thirds of what rounding to 3 bits leaves, and a seventh
of what GPTQ leaves. They cost .74 bit a weight there, for it is 576 wide: smaller groups do as much for less, a fourth
bit far more. At a width of 4096 they cost an eighth of a bit.

Sources: LQER (Zhang et al. 2024, arXiv 2402.02446) for the residual under a calibration metric; CALDERA (Saha et al.
2024, arXiv 2405.18886) for alternating; the truncation is Eckart and Young's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.algorithms.base import Corrected, Solved, damped_hessian, drifted, need_hessian, proxy_loss
from fewbits.calibration.stats import Inputs
from fewbits.core.errors import BadInput, FewbitsError, unknown
from fewbits.formats.low_rank import DTYPES, LowRank, LowRankSpec


@dataclass(frozen=True, kw_only=True)
class LowRankCorrection:
    """Adds a 16-bit residual of low rank. rank: 0 leaves all as it is; rounds: how often the weight is quantized, the
    residual fitted each time; stored: bfloat16 or float16; damping, strength: as GPTQ's and GPTAQ's."""

    role: ClassVar[str] = "residual"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})

    rank: int = 16
    rounds: int = 1
    stored: str = "bfloat16"
    damping: float = 0.01
    strength: float = 0.25

    def __post_init__(self) -> None:
        if self.rank < 0 or self.rounds < 1 or self.damping <= 0:
            raise BadInput(f"{self}: needs rank >= 0, rounds >= 1 and damping > 0")
        if self.stored not in DTYPES:
            raise unknown("dtype of a residual", self.stored, DTYPES)

    def spec(self, shape: tuple[int, int]) -> LowRankSpec | None:
        """What a linear of `shape` (out, in) gets."""
        rank = min(self.rank, *shape)
        return LowRankSpec(rank=rank, dtype=DTYPES[self.stored]) if rank else None

    def correct(
        self,
        solved: Solved,
        weights: Sequence[Tensor],
        inputs: Inputs,
        name: str,
        again: Callable[[Tensor], Solved],
    ) -> Corrected:
        """A residual for each of `weights` [out, in], whose codes stand one below the other in `solved`."""
        if not self.rank:
            return Corrected(solved=solved, residuals=[None] * len(weights))
        stacked = torch.cat(list(weights))
        hessian = _metric(inputs, self.damping, stacked, name)
        target = drifted(stacked, inputs, hessian, self.strength)
        metric = hessian.to(stacked.dtype)
        found = self._fit(target - solved.quantized.dequantize(stacked.dtype), weights, hessian, name)
        best, kept = solved, found
        least = float(proxy_loss(target - _values(solved, found), metric).sum())
        for _ in range(self.rounds - 1):
            tried = again(stacked - torch.cat([each.dense(stacked.dtype) for each in found]))
            found = self._fit(target - tried.quantized.dequantize(stacked.dtype), weights, hessian, name)
            loss = float(proxy_loss(target - _values(tried, found), metric).sum())
            if loss < least:
                best, kept, least = tried, found, loss
        return Corrected(solved=_accounted(solved, best, kept, stacked, inputs, name), residuals=kept)

    def _fit(self, missing: Tensor, weights: Sequence[Tensor], hessian: Tensor, name: str) -> list[LowRank]:
        """The residual of each linear, of `missing`, its rows one linear's after the other's."""
        found = []
        for delta in missing.split([len(weight) for weight in weights]):
            spec = self.spec((delta.shape[0], delta.shape[1]))
            assert spec is not None
            found.append(stored(delta.double(), hessian, spec, name))
        return found


def closed_form(delta: Tensor, hessian: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in] of the least tr((D - B A) H (D - B A)^T); all float64, `hessian` positive definite."""
    rows, columns = delta.shape
    if rows <= columns:
        _, vectors = torch.linalg.eigh(delta @ hessian @ delta.t())  # ascending
        out = vectors[:, rows - rank :].flip(1)
        return out, out.t() @ delta
    lower = torch.linalg.cholesky(hessian)
    seen = delta @ lower
    _, vectors = torch.linalg.eigh(seen.t() @ seen)
    into = vectors[:, columns - rank :].flip(1)
    return seen @ into, torch.linalg.solve_triangular(lower, into.t(), upper=False, left=False)


def stored(delta: Tensor, hessian: Tensor, spec: LowRankSpec, name: str) -> LowRank:
    """The closed form in 16 bits: B fitted to A as it is stored, rows that would end worse left at zero."""
    out, into = closed_form(delta, hessian, spec.rank)
    # A direction's size is shared evenly, so that float16 holds both factors.
    tiny = torch.finfo(torch.float64).tiny
    share = (into.norm(dim=1).clamp(min=tiny) / out.norm(dim=0).clamp(min=tiny)).sqrt()
    into = (into / share[:, None]).to(spec.dtype)
    wide = into.double()
    if bool(torch.isfinite(wide).all()):
        gram = wide @ hessian @ wide.t()
        out = (delta @ hessian @ wide.t() @ torch.linalg.pinv(gram, hermitian=True)).to(spec.dtype)
    if not bool(torch.isfinite(wide).all() and torch.isfinite(out).all()):
        raise FewbitsError(f"{name}: its residual overflows {spec.dtype_name}; choose --option stored=bfloat16")
    worse = proxy_loss(delta - out.double() @ wide, hessian) > proxy_loss(delta, hessian)
    return LowRank(out=out.masked_fill(worse[:, None], 0).contiguous(), into=into.contiguous())


def _metric(inputs: Inputs, damping: float, weight: Tensor, name: str) -> Tensor:
    """The damped Hessian, float64; the identity where there was no calibration, or no token came by."""
    if inputs.hessian is None or not bool(inputs.hessian.any()):
        return torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    return damped_hessian(need_hessian(inputs, "lowrank", name), damping)


def _values(solved: Solved, residuals: Sequence[LowRank]) -> Tensor:
    """Q + B A of all rows."""
    decoded = solved.quantized.dequantize(torch.float32)
    return decoded + torch.cat([each.dense() for each in residuals])


def _accounted(
    first: Solved, taken: Solved, residuals: Sequence[LowRank], weight: Tensor, inputs: Inputs, name: str
) -> Solved:
    """`taken` with the losses of `weight` itself: a later round solved another matrix."""
    if inputs.hessian is None:
        return dataclasses.replace(taken, loss=None, rtn_loss=None, zero_loss=None)
    rtn_loss, zero_loss = first.rtn_loss, first.zero_loss
    if rtn_loss is None or zero_loss is None:
        nearest = taken.quantized.format.quantize(weight, name).dequantize(weight.dtype)
        rtn_loss, zero_loss = proxy_loss(weight - nearest, inputs.hessian), proxy_loss(weight, inputs.hessian)
    loss = proxy_loss(weight - _values(taken, residuals), inputs.hessian)
    return dataclasses.replace(taken, loss=loss, rtn_loss=rtn_loss, zero_loss=zero_loss)
