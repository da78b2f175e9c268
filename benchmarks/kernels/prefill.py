"""lightning_prefill: one sequence of any length, many short ones, and the scratch it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from benchmarks.result import Row
from benchmarks.timing import milliseconds
from kernels.lightning_prefill import lightning_prefill
from kernels.packing import Packing
from model.layers import alibi_slopes

D = 128
LAYERS = 16
MIDDLE = LAYERS // 2
ERROR = 4e-3
SCRATCH_GOAL = 300.0  # MB


@dataclass(slots=True, frozen=True)
class Prefill:
    """N sequences of T rows, H heads; goal: multiple of the floor; at which layers' slopes."""

    N: int
    T: int
    H: int
    goal: float | None = None
    layers: tuple[int, ...] = (MIDDLE,)

    @property
    def name(self) -> str:
        return f"prefill {self.N} x {self.T} tokens, {self.H} heads"

    def floor(self, bandwidth: float) -> float:
        """Milliseconds to copy q, k, v, o and the states that go in and out."""
        rows, states = self.N * self.T * self.H, self.N * self.H
        return (rows * 4 * D * 2 + states * 2 * D * D * 4) / bandwidth * 1e3


EACH = (0, MIDDLE, LAYERS - 1)
SHAPES = [
    Prefill(1, 8192, 16, 2.7, EACH),
    *(Prefill(1, T, 16) for T in (128, 512, 1024, 2048, 32_768)),
    Prefill(1, 131_072, 16, 1.9, EACH),
    Prefill(1, 1_048_576, 16, 1.9, EACH),
    Prefill(64, 2048, 16, 1.9, EACH),
    Prefill(1, 131_072, 64, 1.9, EACH),
    *(Prefill(1, T, H) for H in (8, 64) for T in (128, 8192)),
    Prefill(16, 512, 64),
    Prefill(1, 4_194_304, 8),
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
    errors = []
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
            errors.append(float((actual.double() - sure).norm() / sure.norm()))
    return float(torch.tensor(errors).max())  # NaN if one is


def flas(inputs: list[torch.Tensor], slopes: torch.Tensor, N: int, T: int) -> dict[str, Any]:
    """The same work by flash-linear-attention: in two passes over chunks, and fused in one."""
    from fla.ops import simple_gla

    q, k, v = (x[None] for x in inputs)
    cu_seqlens = torch.arange(0, (N + 1) * T, T, device="cuda") if N > 1 else None
    initial = torch.randn(N, q.shape[2], D, D, device="cuda")

    def work(operation: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: operation(
            q,
            k,
            v,
            g_gamma=-slopes,
            scale=1.0,
            initial_state=initial,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )

    works = {"FLA chunk": work(simple_gla.chunk_simple_gla)}
    if (N, T) == (1, 8192) and hasattr(simple_gla, "fused_chunk_simple_gla"):
        works["FLA fused_chunk"] = work(simple_gla.fused_chunk_simple_gla)
    return works


def peers(
    inputs: list[torch.Tensor], shape: Prefill, slopes: torch.Tensor, deadline: float
) -> dict[str, float]:
    """Milliseconds of others, as long as there is time, and memory for theirs."""
    taken: dict[str, float] = {}
    if time.monotonic() >= deadline:
        return taken
    try:
        works = flas(inputs, slopes, shape.N, shape.T)
    except ImportError:
        return taken
    for name, work in works.items():
        try:
            # with several sequences it asks the device, which no graph can hold
            graphed = shape.N == 1 and shape.T < 100_000
            taken[name] = milliseconds(work, rounds=5, graphed=graphed)
        except torch.OutOfMemoryError:
            print(f"{shape.name}: {name} runs out of memory")
        torch.cuda.empty_cache()
    return taken


def rows(bandwidth: float, deadline: float) -> list[Row]:
    """Each shape beside its floor; others are measured until `deadline`."""
    result = []
    for shape in SHAPES:
        N, T, H = shape.N, shape.T, shape.H
        inputs = [torch.randn(N * T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        packing = Packing(
            (T,) * N,
            torch.tensor([0, *accumulate((T,) * N)], dtype=torch.int32, device="cuda"),
            torch.arange(N, dtype=torch.int32, device="cuda"),
            torch.ones(N, dtype=torch.int64, device="cuda"),
        )
        others = peers(inputs, shape, slopes_of(H, MIDDLE), deadline)
        floor = shape.floor(bandwidth)
        extra = 0
        for layer in shape.layers:
            slopes = slopes_of(H, layer)
            initial = torch.randn(N, H, D, D, device="cuda")
            states = initial.clone()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            o = lightning_prefill(*inputs, slopes, 1.0, states, packing)
            extra = torch.cuda.max_memory_allocated() - before - o.nbytes
            wrong = check(inputs, slopes, initial, o, states, T)
            if not wrong <= ERROR:
                raise AssertionError(f"{shape.name}, layer {layer}: error {wrong:.1e} > {ERROR}")
            del o
            work = partial(lightning_prefill, *inputs, slopes, 1.0, states, packing)
            result.append(
                Row(
                    work=f"{shape.name}, layer {layer} of {LAYERS}",
                    value=milliseconds(work),
                    unit="ms",
                    better="lower",
                    floor=floor,
                    goal=shape.goal and shape.goal * floor,
                    peers=others,
                )
            )
            print(f"{result[-1].work}: {result[-1].value / floor:.2f}x floor, error {wrong:.1e}")
        if T >= 1 << 20:
            scratch = f"scratch of {shape.name}"
            result.append(
                Row(work=scratch, value=extra / 1e6, unit="MB", better="lower", goal=SCRATCH_GOAL)
            )
        del inputs, initial, states, work
        torch.cuda.empty_cache()
    return result
