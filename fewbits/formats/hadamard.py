"""Hadamard transforms: an outlier in one place becomes a little of everything.

A Hadamard matrix of order m holds +1 and -1 in rows at right angles; divided by sqrt(m) it is a rotation H,
H H^T = I. A lone spike c comes out as c / sqrt(m) everywhere, and behind random signs whatever went in comes out
looking Gaussian: what grids for Gaussian weights are made for.

Orders known here, all computed:

| order m | construction |
|---|---|
| 2^k | Sylvester: [[1, 1], [1, -1]] times itself, Kronecker |
| q + 1, q = 3 mod 4 | Paley I: I + [[0, 1], [-1, Q]] |
| 2 (q + 1), q = 1 mod 4 | Paley II: [[0, 1], [1, Q]] (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] |

q is an odd prime, its square or its cube, and Q[a, b] = chi(a - b) the quadratic character of the field of q
elements. Where both constructions reach an order the first in the table is meant. Kronecker products reach the rest:
576 = 12 x 12 x 4, 11008 = 344 x 32. A transform of n numbers is one small matrix product per factor,
n (m_1 + m_2 + ...) multiplications: n log2 n in spirit, and matrix products are what machines do fast (Sylvester's
matrix of 4096 goes as 64 x 64 for that).

`transform(x, orders)` rotates the last dimension of x in blocks of prod(orders). The order of the factors is part of
what is computed: H = H_1 (x) H_2 (x) ..., the last factor running over neighbours.

Sources: Paley 1933; for rotations in quantization Tseng et al. 2024 (QuIP#, arXiv 2402.04396), Ashkboos et al. 2024
(QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fewbits.core.errors import BadInput

MAX_ORDER = 4096  # of one factor that is no power of two: a dense matrix of that size is multiplied
_POWER_BITS = 7  # Sylvester's matrices are multiplied in even parts of at most 128
_CHUNK = 1 << 24  # numbers transformed at once, to bound what is allocated on the way


def transform(x: Tensor, orders: Sequence[int], *, inverse: bool = False) -> Tensor:
    """x H over the last dimension in blocks of prod(orders), x H^T for `inverse`; dtype as it came.

    Works in float64 for float64, else in float32. BadInput where the blocks do not fit or an order is not known.
    """
    size = math.prod(orders)
    if size < 1 or x.shape[-1] % size:
        raise BadInput(
            f"a Hadamard transform of {' x '.join(map(str, orders))} on {x.shape[-1]} numbers: no whole blocks"
        )
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    return multiply(x, [normalised(order, work, x.device) for order in _split(orders)], inverse=inverse)


def multiply(x: Tensor, matrices: Sequence[Tensor], *, inverse: bool = False) -> Tensor:
    """x (M_1 (x) M_2 (x) ...) over the last dimension, blockwise; the transpose for `inverse`."""
    rows = x.reshape(-1, math.prod(matrix.shape[0] for matrix in matrices))
    per_chunk = max(1, _CHUNK // rows.shape[1])
    if len(rows) <= per_chunk:
        return _multiply(rows, matrices, inverse).to(x.dtype).view(x.shape)
    out = torch.empty_like(rows)
    for source, target in zip(rows.split(per_chunk), out.split(per_chunk), strict=True):
        target.copy_(_multiply(source, matrices, inverse))
    return out.view(x.shape)


def _multiply(rows: Tensor, matrices: Sequence[Tensor], inverse: bool) -> Tensor:
    after, size = rows.shape[1], rows.shape[1]
    for matrix in matrices:
        rows = rows.to(matrix.dtype)
        m = matrix.shape[0]
        after //= m
        turned = matrix.t() if inverse else matrix
        rows = rows.reshape(-1, m) @ turned if after == 1 else turned.t() @ rows.reshape(-1, m, after)
    return rows.reshape(-1, size)


def _split(orders: Sequence[int]) -> list[int]:
    """Large powers of two in even parts: the same matrix, since Sylvester's is a Kronecker product."""
    found = []
    for order in orders:
        if not _is_power(order):
            found.append(order)
            continue
        bits = order.bit_length() - 1
        parts = max(1, -(-bits // _POWER_BITS))
        found += [1 << (bits // parts + (part < bits % parts)) for part in range(parts)]
    return found


@functools.lru_cache(maxsize=64)
def normalised(order: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The rotation [m, m] of a known order: its signs over sqrt(m)."""
    # What is kept must serve outside of inference mode too.
    with torch.inference_mode(False):
        return (signs(order) / math.sqrt(order)).to(dtype).to(device)


@functools.lru_cache(maxsize=64)
def signs(order: int) -> Tensor:
    """The Hadamard matrix of a known order, +-1 in float64. BadInput for others."""
    with torch.inference_mode(False):
        if _is_power(order):
            matrix = torch.ones(1, 1, dtype=torch.float64)
            base = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
            for _ in range(order.bit_length() - 1):
                matrix = torch.kron(matrix, base)
            return matrix
        if _paley(order) == 1:
            return _paley_one(order - 1)
        if _paley(order) == 2:
            return _paley_two(order // 2 - 1)
    raise BadInput(
        f"no Hadamard matrix of order {order} is known here; known: powers of two, 12, 20, 24, 28, 36, 44, …"
    )


def is_known(order: int) -> bool:
    """Whether `signs(order)` exists."""
    return order >= 1 and (_is_power(order) or bool(_paley(order)))


@functools.lru_cache(maxsize=256)
def factors(n: int) -> tuple[int, ...] | None:
    """Known orders with product n, largest first, the power of two last; None where there are none.

    Among the ways, the one with the least work: the smallest sum of orders.
    """
    if n < 1:
        return None
    power = n & -n
    found = _factors(n // power, power.bit_length() - 1)
    if found is None:
        return None
    rest = n // math.prod(found)
    return tuple(sorted(found, reverse=True)) + ((rest,) if rest > 1 or not found else ())


@functools.lru_cache(maxsize=1024)
def _factors(odd: int, twos: int) -> tuple[int, ...] | None:
    """Known orders, no power of two among them, whose product is `odd` times at most 2**twos."""
    if odd == 1:
        return ()
    best: tuple[int, ...] | None = None
    smallest = next(p for p in range(3, odd + 1, 2) if odd % p == 0)
    # The factor that holds the smallest prime, and for it the least power of two that makes it a known order.
    for part in (d for d in range(smallest, odd + 1, 2 * smallest) if odd % d == 0):
        for k in range(2, twos + 1):
            order = part << k
            if order > MAX_ORDER:
                break
            if not _paley(order):
                continue
            rest = _factors(odd // part, twos - k)
            if rest is not None and (best is None or order + sum(rest) < sum(best)):
                best = (order, *rest)
            break
    return best


def block_factors(n: int) -> tuple[int, ...]:
    """`factors` of n, or of the largest power of two in it: the transform then runs over blocks of that size."""
    return factors(n) or (n & -n,)


def _is_power(order: int) -> bool:
    return order >= 1 and order & (order - 1) == 0


def _paley(order: int) -> int:
    """1 or 2: which of Paley's constructions gives this order; 0 for neither."""
    if order % 4 or order > MAX_ORDER:
        return 0
    if (order - 1) % 4 == 3 and _field(order - 1):
        return 1
    return 2 if (order // 2 - 1) % 4 == 1 and _field(order // 2 - 1) else 0


@functools.lru_cache(maxsize=1024)
def _field(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p**k, p an odd prime and k at most 3; None where q is no such number."""
    for k in (1, 2, 3):
        p = round(q ** (1 / k))
        if p > 2 and p**k == q and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p, k
    return None


def _paley_one(q: int) -> Tensor:
    skew = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _characters(q)
    return skew + torch.eye(q + 1, dtype=torch.float64)


def _paley_two(q: int) -> Tensor:
    symmetric = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1, 1, _characters(q)
    off = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    on = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(symmetric, off) + torch.kron(torch.eye(q + 1, dtype=torch.float64), on)


def _characters(q: int) -> Tensor:
    """Q [q, q] of the field of q elements, numbered by their coefficients: c_0 + c_1 p + c_2 p^2."""
    found = _field(q)
    assert found is not None
    p, k = found
    numbers = torch.arange(q)
    digits = torch.stack([numbers // p**i % p for i in range(k)], dim=1)  # [q, k]
    weights = torch.tensor([p**i for i in range(k)])
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[(_squares(digits, p, k) * weights).sum(1)] = 1
    chi[0] = 0
    difference = ((digits[:, None] - digits[None]) % p * weights).sum(-1)
    return chi[difference]


def _squares(digits: Tensor, p: int, k: int) -> Tensor:
    """a * a for every element a [q, k], modulo the first irreducible x^k - r_(k-1) x^(k-1) - ... - r_0."""
    product = torch.zeros(len(digits), 2 * k - 1, dtype=torch.long)
    for i, j in itertools.product(range(k), repeat=2):
        product[:, i + j] += digits[:, i] * digits[:, j]
    reduced = _irreducible(p, k)
    for degree in range(2 * k - 2, k - 1, -1):
        for i, coefficient in enumerate(reduced):
            product[:, degree - k + i] += product[:, degree] * coefficient
    return product[:, :k] % p


def _irreducible(p: int, k: int) -> tuple[int, ...]:
    """(r_0, ...), the first in order of r_(k-1), ..., r_0. Of degree 2 or 3, to have no roots is to have no factors."""
    if k == 1:
        return (0,)
    for high_first in itertools.product(range(p), repeat=k):
        r = high_first[::-1]
        if all((x**k - sum(c * x**i for i, c in enumerate(r))) % p for x in range(p)):
            return r
    raise AssertionError("every finite field has an irreducible polynomial")
