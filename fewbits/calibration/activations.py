"""What flows through a model, channel by channel: enough to see outliers without keeping a single activation.

For inputs X [tokens, channels] of one linear, or of one block, the sums kept are

    absmax_c   = max_t |x_tc|            mean_square_c = mean_t x_tc^2
    large_c    = share of tokens with |x_tc| >= 6       position_p = max over windows and channels at position p
    relative_c = share of tokens with |x_tc| >= 6 rms(x_t)

LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) calls a hidden dimension an *outlier feature* when its
magnitude reaches 6 at one and the same dimension, in at least 25 % of the layers and 6 % of the tokens. The
threshold is theirs: below it, 8-bit rounding of what remains was found to cost nothing. It is an absolute
number and depends on how a model was scaled; the criterion is a convention, not a law. `relative` measures a value by
the rms of its own token instead, which no scale changes; behind a norm of unit gain the two are the same.

Memory is O(channels) a layer, whatever the length of the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from fewbits.calibration.collect import Ref
from fewbits.core.errors import FewbitsError
from fewbits.models.walk import ExpertRef, LinearRef

THRESHOLD = 6.0  # of a magnitude
TOKEN_SHARE = 0.06  # of the tokens a dimension must be large in
LAYER_SHARE = 0.25  # of the layers


class ChannelStats:
    """Running statistics of activations [..., channels]; `positions` only grows from inputs [B, T, channels]."""

    def __init__(self, channels: int) -> None:
        self.absmax = torch.zeros(channels)
        self.squares = torch.zeros(channels, dtype=torch.float64)
        self.large_tokens = torch.zeros(channels, dtype=torch.int64)
        self.relative_tokens = torch.zeros(channels, dtype=torch.int64)
        self.positions = torch.zeros(0)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Adds activations `x` [..., channels]."""
        magnitude = x.detach().abs().float()
        if magnitude.dim() == 3:
            self._add_positions(magnitude.amax(dim=(0, 2)).cpu())
        rows = magnitude.reshape(-1, magnitude.shape[-1])
        if not len(rows):
            return
        self.absmax = torch.maximum(self.absmax, rows.amax(dim=0).cpu())
        self.squares += rows.double().square().sum(dim=0).cpu()
        self.large_tokens += (rows >= THRESHOLD).sum(dim=0).cpu()
        rms = rows.square().mean(dim=1, keepdim=True).sqrt()
        self.relative_tokens += (rows >= THRESHOLD * rms.clamp(min=torch.finfo(rms.dtype).tiny)).sum(dim=0).cpu()
        self.tokens += len(rows)

    def _add_positions(self, found: Tensor) -> None:
        shared = min(len(found), len(self.positions))
        longer = found if len(found) > len(self.positions) else self.positions
        both = torch.maximum(found[:shared], self.positions[:shared])
        self.positions = torch.cat([both, longer[shared:]])

    @property
    def large_share(self) -> Tensor:
        """Share of the tokens in which each channel reaches the threshold, float64 [channels]."""
        return self.large_tokens.double() / max(self.tokens, 1)

    @property
    def relative_share(self) -> Tensor:
        """Share of the tokens in which each channel reaches the threshold times the token's rms, float64 [channels]."""
        return self.relative_tokens.double() / max(self.tokens, 1)

    @property
    def mean_square(self) -> Tensor:
        """Mean square of each channel, float64 [channels]."""
        return self.squares / max(self.tokens, 1)

    def check(self, name: str) -> None:
        """FewbitsError naming the layer when a NaN or an infinity came by."""
        if not bool(torch.isfinite(self.squares).all()):
            raise FewbitsError(f"{name}: activations are NaN or infinite; run in float32 or bfloat16")


def outlier_dimensions(streams: Sequence[ChannelStats], *, relative: bool = False) -> list[int]:
    """The outlier features among the dimensions that `streams`, one entry a layer, have in common.

    A layer counts for a dimension when it reaches the threshold in at least 6 % of the layer's tokens, and a
    dimension counts when at least 25 % of the layers do. Ordered by the mean over layers of their absmax.
    relative: a value is measured by the rms of its token.
    """
    if not streams:
        return []
    shares = [stats.relative_share if relative else stats.large_share for stats in streams]
    layers = torch.stack([share >= TOKEN_SHARE for share in shares]).double().mean(dim=0)
    strength = torch.stack([stats.absmax for stats in streams]).mean(dim=0)
    found = (layers >= LAYER_SHARE).nonzero().flatten().tolist()
    return sorted(found, key=lambda dimension: -float(strength[dimension]))


@contextlib.contextmanager
def watched(stages: Sequence[Sequence[Ref]], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, `see(name of the stage's first linear, its input)` is called for every forward.

    `stages` come from `input_stages`: members of one stage receive the same tensor, which is seen once.
    Of experts, gate and up see all tokens their owner receives, down the rows of every expert together.
    """
    handles = [_hook(members, see) for members in stages]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(members: Sequence[Ref], see: Callable[[str, Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    head = members[0]

    def linear(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(head.name, args[0])

    def owner(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        experts = [ref for ref in members if isinstance(ref, ExpertRef)]
        down = head.kind == "down_proj"
        see(head.name, torch.cat([ref.inputs(*args) for ref in experts]) if down else args[0])

    if isinstance(head, LinearRef):
        return head.module.register_forward_pre_hook(linear)
    return head.owner.register_forward_pre_hook(owner)
