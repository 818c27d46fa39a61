"""Error of INT8 inputs, with channels kept exact: the two-roundings shortcut equals rounding anew."""

from __future__ import annotations

import pytest
import torch

from fewbits.evaluation.activation_error import (
    SCALINGS,
    InputError,
    error_without,
    errors_without_each,
    largest_of,
    rounding_error,
)


def tokens(outlier: float = 1.0) -> torch.Tensor:
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= outlier
    return x


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("outlier", [1.0, 50.0])
def test_each_channel_left_out_equals_rounding_anew(scaling: str, outlier: float) -> None:
    x = tokens(outlier)
    whole, without = errors_without_each(x, scaling)
    assert whole == pytest.approx(error_without(x, [], scaling)[0], rel=1e-5)
    anew = [error_without(x, [channel], scaling)[0] for channel in range(x.shape[1])]
    assert without.tolist() == pytest.approx(anew, rel=1e-5)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_an_outlier_channel_carries_nearly_all_of_the_error(scaling: str) -> None:
    found = InputError(name="x", block=0, kind="q_proj", residual=True)
    found.add(tokens(200.0))
    carried = found.carried(scaling)
    assert int(carried.argmax()) == 3 and carried[3] > 0.98
    even = InputError(name="x", block=0, kind="q_proj", residual=True)
    even.add(tokens())
    assert even.carried(scaling).max() < 0.5


def test_rounding_is_within_half_a_step_and_zeros_stay() -> None:
    x = torch.cat([tokens(), torch.zeros(1, 12)])
    largest = largest_of(x, "token")
    assert (rounding_error(x, largest).abs() <= largest / 254 * (1 + 1e-5)).all()
    assert not rounding_error(x, largest)[-1].any()


def test_error_of_outputs_is_that_of_the_product() -> None:
    x, weight = tokens(5.0), torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    off = rounding_error(x, largest_of(x, "token"))
    direct = float((off @ weight.T).square().sum())
    assert error_without(x, [], "token", weight.T @ weight)[1] == pytest.approx(direct, rel=1e-4)


def test_the_first_token_is_what_spoils_a_scale_for_the_whole_tensor() -> None:
    x = tokens()
    x[0] *= 1000
    found = InputError(name="x", block=0, kind="down_proj", residual=False)
    found.add(x)
    assert found.others["tensor"] == pytest.approx(found.others_signal)  # all rounded to zero
    assert found.others["token"] < found.others["spared"] < 0.01 * found.others["tensor"]
