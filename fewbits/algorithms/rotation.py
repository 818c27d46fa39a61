"""Rotations of a vector space, and what becomes of a weight when the spaces it connects are rotated.

    x' = x R,  R = diag(+-1) H,  R R^T = I

- a linear that reads x:   y = W x    = (W R) x'          its columns are rotated
- a linear that writes x:  x' = y R   = (R^T W) ...       its rows are, and its bias

R is a Hadamard transform behind random signs (formats/hadamard.py). The signs matter: without them a weight that is
constant along a row would become a single spike. Where no Hadamard matrix of the size is known, an odd part of the size
is rotated by a random orthogonal matrix (QR of a Gaussian) and the power of two in it by Hadamard: as good a rotation,
but not one that a reader could compute anew, so only for what is folded into weights.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.core.errors import Unsupported
from fewbits.formats import hadamard

MAX_ODD = 4096  # rows of a random orthogonal factor


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """x -> x diag(signs) (M_1 (x) M_2 ...), blockwise over the last dimension; no matrices: only the signs."""

    signs: Tensor  # [n], float32
    matrices: Sequence[Tensor] = ()  # [m, m] each, orthogonal, float32

    def columns(self, weight: Tensor) -> Tensor:
        """W R for `weight` [..., in], or a bias or hidden state x R."""
        turned = (weight.reshape(-1, len(self.signs)) * self.signs.to(weight.device)).view(weight.shape)
        if not self.matrices:
            return turned
        return hadamard.multiply(turned, [matrix.to(weight.device) for matrix in self.matrices])

    def rows(self, weight: Tensor) -> Tensor:
        """R^T W for `weight` [out, in]; a bias [out] as `columns`."""
        if weight.dim() == 1:
            return self.columns(weight)
        return self.columns(weight.t().contiguous()).t().contiguous()


@functools.lru_cache(maxsize=64)
def random_signs(size: int, seed: str) -> Tensor:
    """[size] of +-1, decided by `seed`: the same on every machine and for every version of torch."""
    source = random.Random(seed)
    return torch.tensor([1.0 if source.getrandbits(1) else -1.0 for _ in range(size)])


def hadamard_rotation(size: int, orders: Sequence[int], seed: str) -> Rotation:
    """Random signs, then Hadamard factors of `orders`, in blocks where they cover less than `size`."""
    return Rotation(signs=random_signs(size, seed), matrices=tuple(hadamard.normalised(order) for order in orders))


@functools.lru_cache(maxsize=16)
def rotation(size: int, seed: str) -> Rotation:
    """The rotation of `size` numbers that mixes all of them, Hadamard where one is known."""
    orders = hadamard.factors(size)
    if orders is not None:
        return hadamard_rotation(size, orders, seed)
    power = size & -size
    if size // power > MAX_ODD:
        raise Unsupported(
            f"no rotation of {size} numbers: no Hadamard matrix is known, and its odd part is above {MAX_ODD}"
        )
    odd = random_orthogonal(size // power, seed)
    return Rotation(signs=random_signs(size, seed), matrices=(odd, hadamard.normalised(power)))


def random_orthogonal(size: int, seed: str) -> Tensor:
    """A uniformly random orthogonal matrix [size, size], float32."""
    source = random.Random(f"orthogonal {seed}")
    gaussian = torch.tensor([source.gauss(0, 1) for _ in range(size * size)], dtype=torch.float64).view(size, size)
    q, r = torch.linalg.qr(gaussian)
    return (q * torch.sign(r.diagonal())).float()
