"""Columns that stay in 16 bits beside a product in INT8: LLM.int8()'s mixed decomposition.

    y = Q(x_R) W_R^T + x_O W_O^T        O: the outlier channels of x, R: the rest

A few channels of a language model's activations are tens of times larger than all others. They set the scale of every
token, and what is left of the others is noise. Taken out of the product and multiplied in 16 bits, they cost little
(one channel in a thousand) and the rest has a scale of its own.

| O is | weights of O | beside the codes | source |
|---|---|---|---|
| found as the model runs | original | the whole weight in 16 bits | the paper |
| found as the model runs | what the codes say | nothing | bitsandbytes |
| fixed by calibration | original | those columns | |
| fixed by calibration | what the codes say | their numbers | |

Found are the channels in which a row of the product reaches `threshold`: what a token becomes then depends on which
others share its product; with fixed columns it does not. Where their weights are kept too, their codes are level 0 and
do not enter the scales of the rows.
Source: Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import BadInput
from fewbits.formats.base import Format
from fewbits.formats.low_rank import DTYPES
from fewbits.formats.rows import Params, round_rows


@dataclass(frozen=True, kw_only=True)
class OutlierSpec:
    """What is known before the values are. columns: how many are fixed, None: found as the model runs.
    dtype: of their weights, None: what the codes say."""

    threshold: float
    columns: int | None = None
    dtype: torch.dtype | None = torch.float16

    def layout(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Tensor -> (shape, dtype), beside a linear of `shape` (out, in)."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.columns is not None:
            found["outlier_columns"] = (self.columns,), torch.int32
        if self.dtype is not None:
            found["outlier_weight"] = (shape[0], shape[1] if self.columns is None else self.columns), self.dtype
        return found

    def bits(self, shape: tuple[int, int]) -> int:
        """What is stored beside the codes."""
        return sum(8 * dtype.itemsize * torch.Size(size).numel() for size, dtype in self.layout(shape).values())

    def entry(self) -> dict[str, object]:
        """JSON; `read_entry` inverts it."""
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return {"threshold": self.threshold, "columns": self.columns, "dtype": dtype}

    @staticmethod
    def read_entry(entry: object, columns: int) -> OutlierSpec:
        """The spec of a linear with so many input `columns`; BadInput if it is damaged."""
        found = entry if isinstance(entry, dict) else {}
        threshold, count, dtype = (found.get(key) for key in ("threshold", "columns", "dtype"))
        known = dtype is None or (isinstance(dtype, str) and dtype in DTYPES)
        counted = count is None or (type(count) is int and 1 <= count <= columns)
        if not isinstance(threshold, int | float) or not threshold > 0 or not known or not counted:
            raise BadInput(
                f"outliers {entry!r}; expected a threshold above 0, columns from 1 to {columns} or null, and a dtype "
                f"of {', '.join(DTYPES)} or null"
            )
        return OutlierSpec(threshold=threshold, columns=count, dtype=None if dtype is None else DTYPES[dtype])


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Which columns of one linear stay in 16 bits. columns: int32 [k], ascending.  weight: [out, k], or [out, in] where
    the columns are not known."""

    threshold: float
    columns: Tensor | None = None
    weight: Tensor | None = None

    @property
    def spec(self) -> OutlierSpec:
        columns = None if self.columns is None else len(self.columns)
        dtype = None if self.weight is None else self.weight.dtype
        return OutlierSpec(threshold=self.threshold, columns=columns, dtype=dtype)

    def find(self, rows: Tensor) -> Tensor:
        """The columns of O for a product of `rows` [tokens, in], int64."""
        if self.columns is not None:
            return self.columns.long()
        return (rows.abs() >= self.threshold).any(0).nonzero().flatten()

    def product(self, rows: Tensor, columns: Tensor) -> Tensor:
        """x_O W_O^T [tokens, out] float32, where the weights of O are kept."""
        assert self.weight is not None
        weight = self.weight if self.columns is not None else self.weight[:, columns]
        return rows[:, columns].float() @ weight.float().t()

    def dense(self, decoded: Tensor) -> Tensor:
        """The weight [out, in] of which `decoded` is what the codes say, but for columns that only the run knows."""
        if self.columns is None or self.weight is None:
            return decoded
        return decoded.index_copy(1, self.columns.long(), self.weight.to(decoded.dtype))

    def to_state(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint."""
        state = {"outlier_columns": self.columns, "outlier_weight": self.weight}
        return {name: tensor for name, tensor in state.items() if tensor is not None}

    @staticmethod
    def from_state(spec: OutlierSpec, shape: tuple[int, int], state: Mapping[str, Tensor]) -> Outliers:
        """The inverse of `to_state`; BadInput where shapes, dtypes or values are not what `spec` says."""
        for name, (size, dtype) in spec.layout(shape).items():
            found = state[name]
            if tuple(found.shape) != size or found.dtype != dtype:
                raise BadInput(f"{name} is {found.dtype} {tuple(found.shape)}; expected {dtype} {size}")
            if dtype.is_floating_point and not bool(torch.isfinite(found).all()):
                raise BadInput(f"{name} holds NaN or infinite values")
        columns = state.get("outlier_columns")
        if columns is not None:
            ascending = bool((columns[1:] > columns[:-1]).all())
            if not ascending or int(columns[0]) < 0 or int(columns[-1]) >= shape[1]:
                raise BadInput(f"outlier_columns are no ascending numbers of {shape[1]} columns")
        return Outliers(threshold=spec.threshold, columns=columns, weight=state.get("outlier_weight"))


def without(rows: Tensor, columns: Tensor) -> Tensor:
    """`rows` [tokens, in] with 0 in `columns`."""
    return rows.index_fill(1, columns, 0)


def round_rest(rows: Tensor, format: Format, columns: Tensor, fixed: Params | None = None) -> Tensor:
    """`rows` [tokens, in] float32, all but `columns` moved to what `format` can say; fixed: see `round_rows`."""
    if len(columns) == rows.shape[1]:
        return rows.float()
    if not len(columns):
        return round_rows(rows, format, fixed)
    rest = round_rows(without(rows, columns), format, fixed)
    return rest.index_copy(1, columns, rows[:, columns].float())


def in_sixteen(weight: Tensor) -> Tensor:
    """`weight` in 16 bits: float16 where it is exact or finite, else bfloat16."""
    half, brain = weight.to(torch.float16), weight.to(torch.bfloat16)
    if torch.equal(half.float(), weight.float()):
        return half
    if torch.equal(brain.float(), weight.float()) or not bool(torch.isfinite(half).all()):
        return brain
    return half
