"""How work on the GPU is timed, and the two rates of a card that floors are made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def milliseconds(work: Callable[[], Any], rounds: int = 7, graphed: bool = True) -> float:
    """Median time of `work`, of many in one graph where it is short."""
    work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    times = max(1, min(20, int(0.01 / (time.perf_counter() - started))))

    def repeat() -> None:
        for _ in range(times):
            work()

    replay: Callable[[], None] = repeat
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            repeat()
        replay = graph.replay
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    for _ in range(rounds):
        begin.record()
        replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / times)
    return median(taken[1:])


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 2 GiB (a graph copies by a slower way)."""
    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    return 2 * a.numel() / milliseconds(lambda: b.copy_(a), graphed=False) * 1e3


def gemm_rate() -> float:
    """Operations per second of a bfloat16 product of 8192 x 8192 matrices."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3
