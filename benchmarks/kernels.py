"""Kernels beside the floor of the card, measured in the same run, and beside FLA if installed.

    python -m benchmarks.kernels [--peer-seconds 120]

A prefill's floor is the time of a copy as large as q, k, v, o and the states that go in and out.
Every work is checked against float64 before it is timed; times are those of a replayed CUDA graph.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from statistics import median
from typing import Any

import torch

from benchmarks.result import Row, write
from kernels.lightning_prefill import lightning_prefill
from kernels.packing import Packing
from model.layers import alibi_slopes

D = 128
LAYERS = 16
ERROR = 4e-3


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

    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            repeat()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    for _ in range(rounds):
        begin.record()
        graph.replay() if graphed else repeat()
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


@dataclass(slots=True, frozen=True)
class Prefill:
    """N sequences of T rows, H heads; goal: multiple of the floor."""

    N: int
    T: int
    H: int
    goal: float | None = None

    def name(self) -> str:
        return f"prefill {self.N} x {self.T} tokens, {self.H} heads"

    def floor(self, bandwidth: float) -> float:
        """Milliseconds."""
        rows, states = self.N * self.T * self.H, self.N * self.H
        return (rows * 4 * D * 2 + states * 2 * D * D * 4) / bandwidth * 1e3


PREFILLS = [
    Prefill(1, 128, 16),
    Prefill(1, 1024, 16),
    Prefill(1, 8192, 16, 2.7),
    Prefill(1, 131_072, 16, 1.9),
    Prefill(1, 131_072, 64, 1.9),
    Prefill(1, 1_048_576, 16, 1.9),
    Prefill(64, 2048, 16, 1.9),
]


def slopes_of(H: int, layer: int) -> torch.Tensor:
    """MiniMax-01's slopes of a layer (arXiv 2501.08313)."""
    return (alibi_slopes(H) * (1 - layer / (LAYERS - 1 + 1e-5) + 1e-5)).float().cuda()


def check(
    inputs: list[torch.Tensor],
    slopes: torch.Tensor,
    initial: torch.Tensor,
    o: torch.Tensor,
    states: torch.Tensor,
    T: int,
) -> float:
    """Greatest error of the last sequence's state and some of its rows, against float64 sums."""
    H = o.shape[1]
    rows = torch.tensor(sorted({0, T // 3, T // 2 + 7, T - 2, T - 1}), device=o.device)
    worst = 0.0
    for h in {0, H // 2, H - 1}:
        q, k, v = (x[-T:, h].double() for x in inputs)
        s, S = slopes[h].double(), initial[-1, h].double()
        t = torch.arange(T, device=o.device, dtype=torch.float64)
        age = rows[:, None] - t
        decay = torch.exp(-s * age.clamp(min=0)) * (age >= 0)
        expected = ((q[rows] @ k.T) * decay) @ v
        expected += torch.exp(-s * (rows[:, None] + 1)) * (q[rows] @ S)
        state = (k * torch.exp(-s * (T - 1 - t))[:, None]).T @ v + torch.exp(-s * T) * S
        for actual, sure in ((o[-T:, h][rows], expected), (states[-1, h], state)):
            worst = max(worst, float((actual.double() - sure).norm() / sure.norm()))
    return worst


def fla(inputs: list[torch.Tensor], slopes: torch.Tensor, N: int, T: int) -> Callable[[], Any]:
    """The same work by flash-linear-attention."""
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v = (x[None] for x in inputs)
    cu_seqlens = torch.arange(0, (N + 1) * T, T, device="cuda") if N > 1 else None
    initial = torch.randn(N, q.shape[2], D, D, device="cuda")

    def work() -> Any:
        with torch.no_grad():
            return chunk_simple_gla(
                q,
                k,
                v,
                g_gamma=-slopes,
                scale=1.0,
                initial_state=initial,
                output_final_state=True,
                cu_seqlens=cu_seqlens,
            )

    return work


def prefill_rows(bandwidth: float, peer_seconds: float) -> list[Row]:
    """Each shape at the slopes of the first, the middle and the last layer."""
    rows = []
    deadline = time.monotonic() + peer_seconds
    for shape in PREFILLS:
        N, T, H = shape.N, shape.T, shape.H
        inputs = [torch.randn(N * T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        packing = Packing(
            (T,) * N,
            torch.tensor([0, *accumulate((T,) * N)], dtype=torch.int32, device="cuda"),
            torch.arange(N, dtype=torch.int32, device="cuda"),
            torch.ones(N, dtype=torch.int64, device="cuda"),
        )
        peers = {}
        if time.monotonic() < deadline:
            try:
                peers["FLA"] = milliseconds(fla(inputs, slopes_of(H, 0), N, T))
            except ImportError:
                deadline = 0.0
            torch.cuda.empty_cache()
        floor = shape.floor(bandwidth)
        for layer in (0, LAYERS // 2, LAYERS - 1):
            slopes = slopes_of(H, layer)
            initial = torch.randn(N, H, D, D, device="cuda")
            states = initial.clone()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            o = lightning_prefill(*inputs, slopes, 1.0, states, packing)
            extra = torch.cuda.max_memory_allocated() - before - o.nbytes
            wrong = check(inputs, slopes, initial, o, states, T)
            if not wrong <= ERROR:
                raise AssertionError(f"{shape.name()}, layer {layer}: error {wrong:.1e} > {ERROR}")
            del o
            work = partial(lightning_prefill, *inputs, slopes, 1.0, states, packing)
            rows.append(
                Row(
                    work=f"{shape.name()}, layer {layer}",
                    value=milliseconds(work),
                    unit="ms",
                    better="lower",
                    floor=floor,
                    goal=shape.goal and shape.goal * floor,
                    peers=peers,
                )
            )
            print(f"{rows[-1].work}: {rows[-1].value / floor:.2f}x floor, error {wrong:.1e}")
        if shape == max(PREFILLS, key=lambda shape: shape.T):
            rows.append(
                Row(
                    work=f"scratch of {shape.name()}",
                    value=extra / 1e6,
                    unit="MB",
                    better="lower",
                    goal=300.0,
                )
            )
        del inputs, initial, states, work
        torch.cuda.empty_cache()
    return rows


# each takes bytes per second of a copy and the seconds that others' kernels may take to measure
ROWS: list[Callable[[float, float], list[Row]]] = [prefill_rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer-seconds", type=float, default=120, help="for FLA, 0: leave it out")
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth, operations = copy_bandwidth(), gemm_rate()
    rows = [row for measure in ROWS for row in measure(bandwidth, options.peer_seconds)]
    write("kernels", rows, copy_TBps=bandwidth / 1e12, gemm_TFLOPs=operations / 1e12)


if __name__ == "__main__":
    main()
