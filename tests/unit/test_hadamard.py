"""Every Hadamard matrix known here is one; transforms are what their matrices are; spikes are spread."""

from __future__ import annotations

import math

import pytest
import torch

from fewbits.algorithms.rotation import hadamard_rotation, random_orthogonal, rotation
from fewbits.core.errors import BadInput
from fewbits.formats import hadamard, parse_format

KNOWN = [order for order in range(1, 400) if hadamard.is_known(order)]
# Sizes of residual streams, heads and MLPs of released models, with the factors a reader must agree on.
SIZES = {
    64: (64,),
    576: (12, 12, 4),
    1536: (12, 128),
    896: (28, 32),
    4864: (76, 64),
    8960: (28, 20, 16),
    18944: (148, 128),
    11008: (344, 32),
    13824: (12, 12, 12, 8),
    14336: (28, 512),
    25600: (20, 20, 64),
    29568: (44, 28, 12, 2),
}


@pytest.mark.parametrize("order", KNOWN)
def test_rows_of_every_known_order_are_orthogonal(order: int) -> None:
    signs = hadamard.signs(order)
    assert bool((signs.abs() == 1).all())
    assert torch.equal(signs @ signs.t(), order * torch.eye(order, dtype=torch.float64))


def test_which_orders_are_known() -> None:
    assert {12, 20, 24, 28, 36, 44, 48, 52, 60, 68, 76, 100, 344} < set(KNOWN)  # 28, 52, 100, 344 by prime powers or II
    assert not any(hadamard.is_known(order) for order in (0, 3, 6, 10, 14, 40, 92))
    with pytest.raises(BadInput, match="order 6 "):
        hadamard.signs(6)


def test_small_matrices_are_those_of_the_definition() -> None:
    assert hadamard.signs(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    # Paley I over 11: squares are 1, 3, 4, 5, 9, and row 1 looks at a - b = 0, -1, -2, ...
    assert hadamard.signs(12)[1].tolist() == [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]
    assert hadamard.signs(12)[0].tolist() == [1] * 12


@pytest.mark.parametrize("n", SIZES)
def test_transforms_are_rotations(n: int) -> None:
    assert hadamard.factors(n) == SIZES[n] and math.prod(SIZES[n]) == n
    x = torch.randn(3, n, dtype=torch.float64)
    y = hadamard.transform(x, SIZES[n])
    assert torch.allclose(hadamard.transform(y, SIZES[n], inverse=True), x, atol=1e-12)
    assert torch.allclose(y.norm(dim=1), x.norm(dim=1))
    single = hadamard.transform(x.float(), SIZES[n])
    assert single.dtype == torch.float32 and torch.allclose(single.double(), y, atol=1e-5)
    spike = torch.zeros(n, dtype=torch.float64)
    spike[n // 3] = 1000
    assert torch.allclose(hadamard.transform(spike, SIZES[n]).abs(), torch.full_like(spike, 1000 / math.sqrt(n)))


@pytest.mark.parametrize("orders", [(12, 12, 4), (28, 2), (4, 12), (256,), (2, 20)])
def test_the_fast_transform_is_the_matrix(orders: tuple[int, ...]) -> None:
    whole = torch.ones(1, 1, dtype=torch.float64)
    for order in orders:
        whole = torch.kron(whole, hadamard.signs(order) / math.sqrt(order))
    assert torch.allclose(whole @ whole.t(), torch.eye(len(whole), dtype=torch.float64), atol=1e-6)
    x = torch.randn(2, 5, 3 * len(whole), dtype=torch.float64)  # three blocks
    expected = (x.view(2, 5, 3, -1) @ whole).view(x.shape)
    assert torch.allclose(hadamard.transform(x, orders), expected, atol=1e-12)
    assert torch.allclose(hadamard.transform(expected, orders, inverse=True), x, atol=1e-12)


def test_large_inputs_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 24)
    whole = hadamard.transform(x, (12, 2))
    monkeypatch.setattr(hadamard, "_CHUNK", 24 * 7)
    assert torch.allclose(hadamard.transform(x, (12, 2)), whole, atol=1e-6)


def test_spikes_of_4096() -> None:
    spike = torch.zeros(4096)
    spike[17] = 1000
    assert torch.allclose(hadamard.transform(spike, (4096,)).abs(), torch.full((4096,), 15.625))


def test_sizes_without_a_hadamard_matrix() -> None:
    assert hadamard.factors(6) is None and hadamard.block_factors(6) == (2,)
    assert hadamard.factors(15 * 32) == (20, 12, 2) and hadamard.factors(7) is None
    with pytest.raises(BadInput, match="no whole blocks"):
        hadamard.transform(torch.ones(30), (4,))
    for size in (6, 7, 200 * 3):
        turn = rotation(size, "0")
        matrix = turn.columns(torch.eye(size))
        assert torch.allclose(matrix @ matrix.t(), torch.eye(size), atol=1e-5)
    assert torch.allclose(random_orthogonal(9, "a").det().abs(), torch.tensor(1.0))


def test_a_rotation_is_decided_by_its_seed() -> None:
    assert torch.equal(rotation(48, "a").columns(torch.eye(48)), rotation(48, "a").columns(torch.eye(48)))
    assert not torch.equal(rotation(48, "a").signs, rotation(48, "b").signs)
    assert rotation(16, "0 residual").signs.tolist() == hadamard_rotation(16, (16,), "0 residual").signs.tolist()


def test_rows_and_columns_cancel() -> None:
    turn = rotation(48, "x")
    writer, reader, x = torch.randn(48, 20), torch.randn(30, 48), torch.randn(5, 20)
    rotated = x @ turn.rows(writer).t() @ turn.columns(reader).t()
    assert torch.allclose(rotated, x @ writer.t() @ reader.t(), atol=1e-3)
    bias = torch.randn(48)
    assert torch.allclose(turn.rows(bias) @ turn.columns(reader).t(), bias @ reader.t(), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "outlier", "gain"),
    [
        ("int3-asym-channel", 8, 5),
        ("int3-asym-g64", 8, 2.3),
        ("int2-asym-channel", 8, 1.5),
        ("int2-asym-g64", 8, 1.5),
        # One far outlier in each group is the end of a range, hit exactly: two bits spent on it beat spreading it.
        ("int2-asym-g64", 30, 0.5),
    ],
)
def test_what_rotation_is_worth_where_channels_stand_out(name: str, outlier: float, gain: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 576)
    weight[:, ::64] *= outlier
    format = parse_format(name)

    def loss(matrix: torch.Tensor) -> float:
        return float((matrix - format.quantize(matrix).dequantize()).square().sum())

    found = loss(weight) / loss(rotation(576, "0").columns(weight))
    assert gain < found < 1.6 * gain
