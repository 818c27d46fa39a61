"""Statistics of activations: sums over batches equal the definition; outlier features by LLM.int8()'s criterion."""

from __future__ import annotations

import pytest
import torch
from tiny_runtime_models import tiny_llama

from fewbits.calibration.activations import ChannelStats, outlier_dimensions, watched
from fewbits.calibration.collect import input_stages
from fewbits.core.errors import FewbitsError
from fewbits.models.walk import blocks, linears


def layer(large: dict[int, float], channels: int = 8, tokens: int = 100) -> ChannelStats:
    """Statistics of a layer in which each channel of `large` reaches 6 in that share of the tokens."""
    x = torch.ones(tokens, channels)
    for channel, share in large.items():
        x[: round(share * tokens), channel] = -6.0
    stats = ChannelStats(channels)
    stats.add(x)
    return stats


def test_batches_add_up_to_the_definition() -> None:
    x = 4 * torch.randn(6, 10, 5, generator=torch.Generator().manual_seed(0))
    stats = ChannelStats(5)
    for batch in x.split(2):
        stats.add(batch)
    rows = x.reshape(-1, 5)
    assert stats.tokens == 60
    assert torch.equal(stats.absmax, rows.abs().amax(dim=0))
    assert torch.equal(stats.positions, x.abs().amax(dim=(0, 2)))
    torch.testing.assert_close(stats.large_share, (rows.abs() >= 6).double().mean(dim=0))
    relative = rows.abs() >= 6 * rows.square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(stats.relative_share, relative.double().mean(dim=0))
    torch.testing.assert_close(stats.mean_square, rows.double().square().mean(dim=0))


def test_windows_of_other_lengths_keep_the_longer_positions() -> None:
    stats = ChannelStats(1)
    stats.add(torch.tensor([[[1.0], [5.0]]]))
    stats.add(torch.tensor([[[2.0], [3.0], [4.0]]]))
    assert stats.positions.tolist() == [2.0, 5.0, 4.0]


def test_an_outlier_feature_needs_a_quarter_of_the_layers_and_six_percent_of_the_tokens() -> None:
    quiet = layer({})
    assert outlier_dimensions([layer({3: 0.06}), quiet, quiet, quiet]) == [3]
    assert outlier_dimensions([layer({3: 0.05}), quiet, quiet, quiet]) == []
    assert outlier_dimensions([layer({3: 0.06}), quiet, quiet, quiet, quiet]) == []
    assert outlier_dimensions([]) == []


def test_not_finite_is_refused_by_name() -> None:
    stats = ChannelStats(2)
    stats.add(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(FewbitsError, match=r"layers\.3"):
        stats.check("layers.3")


@pytest.mark.parametrize(("model_type", "extra"), [("llama", {}), ("mixtral", {"num_local_experts": 4})])
def test_every_shared_input_is_seen_once_a_forward(model_type: str, extra: dict) -> None:
    model = tiny_llama(model_type=model_type, **extra)
    refs = linears(blocks(model)[0][1])

    def run() -> None:
        with torch.no_grad():
            model(torch.arange(1, 9)[None])

    stages = input_stages(refs, run)
    seen: list[tuple[str, int]] = []
    with watched(stages, lambda name, x: seen.append((name, x.shape[-1]))):
        run()
    widths = {ref.name: ref.shape[1] for ref in refs}
    assert sorted(seen) == sorted((members[0].name, widths[members[0].name]) for members in stages)
    run()
    assert len(seen) == len(stages)  # the hooks are gone
