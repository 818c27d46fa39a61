"""How long a kernel takes on a GPU.

Calls are captured in a CUDA graph, so that launching them costs what it costs a decoding loop, and every call has
buffers of its own that together exceed the L2 cache several times, so that weights come from memory as they do in a
model. The figure is the median of replays, divided by the calls in one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
ROTATE_BYTES = 400 << 20  # of weights in one round: several times the L2 of any GPU today


def copies(size: int) -> int:
    """How many buffers of `size` bytes a round takes."""
    return max(3, -(-ROTATE_BYTES // size))


def microseconds(calls: Sequence[Call], replays: int = 9) -> float:
    """Median time of one of `calls`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # compiles and allocates, which no capture may
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times[2:]) / len(calls)


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that a reduction over 4 GiB reads: the better of a sum and a maximum."""
    data = torch.empty(1 << 30, device=device).normal_()
    fastest = min(microseconds([lambda: torch.amax(data)]), microseconds([lambda: torch.sum(data.view(32, -1), 1)]))
    return data.numel() * data.element_size() / fastest * 1e6
