"""GPTQ: quantize column by column, let the columns still to come repair each error.

    H = (2/n) sum x x^T + damping * mean(diag H) * I,     H^-1 = U^T U,  U upper triangular
    for column i:  err = (w_i - snap(w_i)) / U_ii
                   w_j -= err * U_ij   for every j > i

so that the output error tr(dW H dW^T) comes out as exactly sum(err^2). Updates inside a block of
`block_size` columns are applied at once, those to later blocks in one matrix product (lazy update); the
result does not depend on the block size. Source: Frantar et al. 2022, arXiv 2210.17323, Algorithm 1.

Choices made here:
- U comes from one Cholesky of the reversed H and one triangular inverse, in float64, not from inverting H.
- `act_order` visits columns by falling diag(H): the inputs that matter most are rounded while most other
  columns can still compensate. It implies static groups (each column keeps its group; no index is stored).
- Without static groups a group's range is taken from the *current* weights when its first column comes up.
- A dead column (input always zero) keeps its nearest level, and counts as an average one where ranges are searched;
  zeroing it, as the original code does, would break inputs that calibration did not happen to cover.
- A Cholesky that fails is retried with ten times the damping and the retry noted; after `max_retries` the
  layer is refused. There is no silent fallback to round-to-nearest.
- The result is compared with round-to-nearest on GPTQ's own objective; the better is kept, and noted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.algorithms.base import Solved, need_hessian, proxy_loss, revived
from fewbits.algorithms.clipping import RangeSearch
from fewbits.algorithms.ranges import RANGES, range_params
from fewbits.calibration.stats import Inputs
from fewbits.core.errors import BadInput, FewbitsError
from fewbits.formats import Format, Quantized
from fewbits.formats.scales import State


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """Options of GPTQ; `solve` runs it on one weight.

    damping: share of the mean of diag(H) added to the diagonal.  block_size: columns per lazy update.
    act_order: most important columns first (implies static_groups).  static_groups: ranges fixed up front.
    search: range search for the groups, None for min-max.  range: an estimator of ranges.py in its place.
    max_retries: how often damping may grow tenfold.
    """

    role: ClassVar[str] = "weights"
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})

    damping: float = 0.01
    block_size: int = 128
    act_order: bool = True
    static_groups: bool = True
    search: RangeSearch | None = field(default_factory=RangeSearch)
    range: str | None = None
    max_retries: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise BadInput(f"damping {self.damping}; a positive share of mean(diag H), e.g. 0.01")
        if self.block_size < 1:
            raise BadInput(f"block size {self.block_size}; at least 1 column per update")
        if self.range is not None:
            RANGES.get(self.range)
        if self.act_order and not self.static_groups:
            raise BadInput("act_order needs static_groups: without them columns of one group would be scattered")

    def solve(self, weight: Tensor, format: Format, inputs: Inputs, name: str) -> Solved:
        """Codes for `weight` [out, in] given the Hessian of `inputs` [in, in] (float32 or float64, undamped).

        Works in float64 if the weight is float64, else float32 (the factorisation always in float64).
        Raises BadInput for non-finite values, FewbitsError when no damping makes the Hessian factorable.
        """
        hessian = need_hessian(inputs, type(self).__name__, name)
        format.check(weight, name)
        weight = weight if weight.dtype == torch.float64 else weight.float()
        order = torch.arange(weight.shape[1], device=weight.device)
        if self.act_order:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        upper, notes = self.factor(hessian[order][:, order], name)
        importance = revived(hessian).diagonal()
        format = format.fitted(weight, importance)
        params = self._params(weight, format, importance) if self._static(format) else None
        pull = self._pull(inputs, upper, order)
        pull = None if pull is None else pull.to(weight.dtype)
        quantized = self._sweep(weight, format, upper.to(weight.dtype), order, params, pull)
        return self._keep_better(weight, format, inputs, quantized, notes, name)

    def _pull(self, inputs: Inputs, upper: Tensor, order: Tensor) -> Tensor | None:
        """P [in, in], strictly upper: w_j += w_i P_ij for every j > i, besides the error's update (GPTAQ)."""
        return None

    def _objective(self, delta: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        """What is minimised, per row, for an error `delta` [out, in] of `weight`."""
        assert inputs.hessian is not None
        return proxy_loss(delta, inputs.hessian)

    def _static(self, format: Format) -> bool:
        # Scales that share something are decided together, before the first column is.
        return self.static_groups or format.scaling.group_size is None or format.nested

    def _params(self, weight: Tensor, format: Format, importance: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.range is not None:
            return range_params(self.range, weight, format)
        if self.search is None:
            return format.params(weight)
        return self.search.params(weight, format, importance)

    def factor(self, hessian: Tensor, name: str) -> tuple[Tensor, list[str]]:
        """U (float64, upper triangular) with (H + damping)^-1 = U^T U, and a note per retry."""
        h = hessian.double().clone()
        diagonal = h.diagonal()
        dead = diagonal == 0
        mean = float(diagonal.mean())
        if bool(dead.all()):
            # No calibration token reached this layer. Any positive multiple of I gives nearest rounding.
            return torch.eye(len(h), dtype=h.dtype, device=h.device), [
                "no input reached this layer: rounded to nearest"
            ]
        diagonal[dead] = mean
        notes = []
        damping = self.damping
        for _ in range(self.max_retries + 1):
            damped = h.clone()
            damped.diagonal().add_(damping * mean)
            # H = V V^T with V upper: the Cholesky factor of H with both axes reversed, reversed back.
            lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if int(info) == 0 and bool(torch.isfinite(lower).all()):
                identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
                return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), notes
            notes.append(f"Cholesky failed at damping {damping:g}, retried at {damping * 10:g}")
            damping *= 10
        raise FewbitsError(
            f"{name}: the Hessian cannot be factored even at damping {damping / 10:g}; "
            "use more calibration text, a larger --damp, or method 'rtn'"
        )

    def _sweep(
        self,
        weight: Tensor,
        format: Format,
        upper: Tensor,
        order: Tensor,
        params: tuple[Tensor, Tensor | None] | None,
        pull: Tensor | None = None,
    ) -> Quantized:
        columns = weight.shape[1]
        # Transposed, so that a column of W is a contiguous row: the inner loop touches one after another.
        remaining = weight.t()[order].contiguous()
        codes = torch.empty(remaining.shape, dtype=torch.uint8, device=weight.device)
        size = format.scaling.group_size or columns
        scales: list[Tensor] = []
        zeros: list[Tensor] = []
        scale_columns = zero_columns = None
        stored: State = {}
        if params is not None:
            *params, stored = format.settle(*params)
            shape = (weight.shape[0], columns)
            expanded_scale, expanded_zero = format.expand(*params, shape)
            scale_columns = expanded_scale.to(weight.dtype).expand(shape).t()[order].contiguous()
            if expanded_zero is not None:
                zero_columns = expanded_zero.expand(shape).t()[order].to(weight.dtype).contiguous()
        for start in range(0, columns, self.block_size):
            stop = min(start + self.block_size, columns)
            block = remaining[start:stop]
            errors = torch.empty_like(block)
            for i in range(start, stop):
                if params is None and i % size == 0:
                    group = self._current(remaining, errors, upper, pull, start, stop, i, min(i + size, columns))
                    scale, zero = self._group_params(group.t(), format)
                    scales.append(scale)
                    if zero is not None:
                        zeros.append(zero)
                    scale_i, zero_i = scale[:, 0].to(weight.dtype), None if zero is None else zero[:, 0]
                elif scale_columns is not None:
                    scale_i = scale_columns[i]
                    zero_i = None if zero_columns is None else zero_columns[i]
                column = block[i - start]
                codes[i] = format.encode(column, scale_i, zero_i)
                error = (column - format.decode(codes[i], scale_i, zero_i, column.dtype)) / upper[i, i]
                errors[i - start] = error
                if i + 1 < stop:
                    block[i + 1 - start :].addr_(upper[i, i + 1 : stop], error, alpha=-1)
                    if pull is not None:
                        block[i + 1 - start :].addr_(pull[i, i + 1 : stop], column)
            if stop < columns:
                remaining[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
                if pull is not None:
                    remaining[stop:].addmm_(pull[start:stop, stop:].t(), block)
        if params is None:
            params = torch.cat(scales, dim=1), torch.cat(zeros, dim=1) if zeros else None
        restored = torch.empty_like(codes)
        restored[order] = codes
        return format.quantized(restored.t().contiguous(), params[0], params[1], stored)

    @staticmethod
    def _current(
        remaining: Tensor,
        errors: Tensor,
        upper: Tensor,
        pull: Tensor | None,
        start: int,
        stop: int,
        first: int,
        last: int,
    ) -> Tensor:
        """Columns [first, last) as they stand now: those past this block still owe its errors so far."""
        group = remaining[first:last].clone()
        if last > stop and first > start:
            group[stop - first :] -= upper[start:first, stop:last].t() @ errors[: first - start]
            if pull is not None:
                group[stop - first :] += pull[start:first, stop:last].t() @ remaining[start:first]
        return group

    def _group_params(self, group: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
        if self.range is not None:
            return range_params(self.range, group, format)
        low, high = torch.aminmax(group, dim=1, keepdim=True)
        if self.search is None:
            return format.params_from_range(low, high)
        return self.search.params(group, format)

    def _keep_better(
        self,
        weight: Tensor,
        format: Format,
        inputs: Inputs,
        quantized: Quantized,
        notes: list[str],
        name: str,
    ) -> Solved:
        assert inputs.hessian is not None
        nearest = format.quantize(weight, name)
        ours, rounded = (weight - found.dequantize(weight.dtype) for found in (quantized, nearest))
        rtn_loss = proxy_loss(rounded, inputs.hessian)
        if self._objective(rounded, weight, inputs).sum() < self._objective(ours, weight, inputs).sum():
            quantized, ours = nearest, rounded
            notes = [*notes, "round-to-nearest was better and was kept"]
        loss, zero_loss = proxy_loss(ours, inputs.hessian), proxy_loss(weight, inputs.hessian)
        return Solved(quantized=quantized, notes=notes, loss=loss, rtn_loss=rtn_loss, zero_loss=zero_loss)
