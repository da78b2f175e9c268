"""lightning_prefill: one sequence of any length, many short ones, and the scratch it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
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
LONG = 1 << 20  # tokens from which on scratch is looked at
PIECE = 1 << 18  # tokens that are checked at a time
TUNED_AT = 2048  # tokens at which FLA tunes itself: T is not in its keys
FUSED = 8192  # tokens up to which its other way is measured
SCRATCH_GOAL = 300.0  # MB
ROOM = 6_000_000_000  # bytes beside q, k, v and o


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

    @property
    def works(self) -> list[str]:
        """Names of its rows."""
        names = [f"{self.name}, layer {layer} of {LAYERS}" for layer in self.layers]
        return names + [f"scratch of {self.name}"] * (self.T >= LONG)

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v."""
        shape = self.N * self.T, self.H, D
        return [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    @property
    def bytes(self) -> int:
        """Of q, k, v and o."""
        return self.N * self.T * self.H * 4 * D * 2

    def floor(self, bandwidth: float) -> float:
        """Milliseconds to copy q, k, v, o and the states that go in and out."""
        return (self.bytes + self.N * self.H * 2 * D * D * 4) / bandwidth * 1e3


EACH = (0, MIDDLE, LAYERS - 1)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
SHAPES = [
    *(Prefill(1, T, H) for T in LENGTHS for H in (16, 8, 64)),
    Prefill(1, 8192, 16, 2.7, EACH),
    *(Prefill(1, 8192, H) for H in (8, 64)),
    Prefill(64, 2048, 16, 1.9, EACH),
    Prefill(16, 512, 64),
    Prefill(1, 32_768, 16),
    *(Prefill(1, 131_072, H, 1.9, EACH) for H in (16, 64)),
    Prefill(1, 131_072, 8),
    Prefill(1, 1_048_576, 16, 1.9, EACH),
    Prefill(1, 1_048_576, 8),
    Prefill(1, 4_194_304, 8),
    Prefill(1, 1_048_576, 64),
    Prefill(1, 4_194_304, 16),
]
WORKS = [work for shape in SHAPES for work in shape.works]


def shapes(tokens: Sequence[int] = ()) -> list[Prefill]:
    """Those of sequences of so many tokens; all by default."""
    return [shape for shape in SHAPES if not tokens or shape.T in tokens]


def initial_states(N: int, H: int) -> torch.Tensor:
    """States of sequences that have been read for a while."""
    return torch.randn(N, H, D, D, device="cuda")


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
        q, k, v = (x[-T:, h] for x in inputs)
        s, S = slopes[h].double(), initial[-1, h].double()
        wanted = q[rows].double()
        expected = torch.exp(-s * (rows[:, None] + 1)) * (wanted @ S)
        state = torch.exp(-s * T) * S
        for first in range(0, T, PIECE):
            k_i, v_i = (x[first : first + PIECE].double() for x in (k, v))
            t = torch.arange(first, first + len(k_i), device=o.device, dtype=torch.float64)
            age = rows[:, None] - t
            decay = torch.exp(-s * age.clamp(min=0)) * (age >= 0)
            expected += ((wanted @ k_i.T) * decay) @ v_i
            state += (k_i * torch.exp(-s * (T - 1 - t))[:, None]).T @ v_i
        for actual, sure in ((o[-T:, h][rows], expected), (states[-1, h], state)):
            errors.append(float((actual.double() - sure).norm() / sure.norm()))
    return float(torch.tensor(errors).max())  # NaN if one is


def flas(
    inputs: list[torch.Tensor], slopes: torch.Tensor, initial: torch.Tensor, T: int
) -> dict[str, Callable[[], Any]]:
    """The same work by flash-linear-attention: in two passes over chunks, and fused in one."""
    from fla.ops import simple_gla

    q, k, v = (x[None] for x in inputs)
    N = len(initial)
    operation = partial(
        simple_gla.chunk_simple_gla,
        q,
        k,
        v,
        g_gamma=-slopes,
        scale=1.0,
        initial_state=initial,
        output_final_state=True,
        cu_seqlens=torch.arange(0, (N + 1) * T, T, device="cuda") if N > 1 else None,
    )
    works: dict[str, Callable[[], Any]] = {"FLA chunk": operation}
    if N == 1 and T <= FUSED and hasattr(simple_gla, "fused_chunk_simple_gla"):
        fused = simple_gla.fused_chunk_simple_gla
        works["FLA fused_chunk"] = partial(fused, *operation.args, **operation.keywords)
    return works


def tuned_flas(heads: Sequence[int], deadline: float) -> set[tuple[str, int]]:
    """Ways of FLA, with the numbers of heads that they have tuned themselves for: minutes, once."""
    tuned: set[tuple[str, int]] = set()
    for name in ("FLA chunk", "FLA fused_chunk"):
        for H in heads:
            started = time.monotonic()
            if started > deadline:
                print(f"{name}, {H} heads and what follows: no time to tune it")
                return tuned
            inputs = Prefill(1, TUNED_AT, H).inputs()
            try:
                works = flas(inputs, slopes_of(H, MIDDLE), initial_states(1, H), TUNED_AT)
            except ImportError:
                return tuned
            if name not in works:
                continue
            try:
                works[name]()
                torch.cuda.synchronize()
            except Exception as failure:  # whatever theirs raises, ours is measured
                print(f"{name}, {H} heads: {type(failure).__name__}: {failure}"[:300])
                continue
            tuned.add((name, H))
            print(f"{name}, {H} heads: tuned in {time.monotonic() - started:.0f} s", flush=True)
    return tuned


def peers(
    inputs: list[torch.Tensor], shape: Prefill, tuned: set[tuple[str, int]]
) -> dict[str, float]:
    """Milliseconds of others that are tuned, where there is memory for theirs."""
    taken: dict[str, float] = {}
    if not tuned:
        return taken
    slopes, initial = slopes_of(shape.H, MIDDLE), initial_states(shape.N, shape.H)
    for name, work in flas(inputs, slopes, initial, shape.T).items():
        if (name, shape.H) not in tuned:
            continue
        try:
            o, states = work()
            wrong = check(inputs, slopes, initial, o[0], states, shape.T)
            if not wrong <= 10 * ERROR:
                print(f"{shape.name}: {name} does other work, error {wrong:.1e}")
                continue
            del o, states
            # with several sequences it asks the device, which no graph can hold
            graphed = shape.N == 1 and shape.T < 100_000
            taken[name] = milliseconds(work, rounds=5, graphed=graphed)
        except torch.OutOfMemoryError:
            print(f"{shape.name}: {name} runs out of memory")
        torch.cuda.empty_cache()
    return taken


def rows(bandwidth: float, deadline: float, tokens: Sequence[int] = ()) -> Iterator[Row]:
    """Each shape that fits the card beside its floor, or those of so many tokens; others tune
    themselves until `deadline`."""
    tuned = tuned_flas(list(dict.fromkeys(shape.H for shape in shapes(tokens))), deadline)
    for shape in shapes(tokens):
        torch.cuda.empty_cache()
        if shape.bytes + ROOM > torch.cuda.mem_get_info()[0]:
            print(f"{shape.name}: does not fit the card")
            continue
        yield from measure(shape, bandwidth, tuned)


def measure(shape: Prefill, bandwidth: float, tuned: set[tuple[str, int]]) -> Iterator[Row]:
    """A row for each layer's slopes, and one for the scratch."""
    N, T, H = shape.N, shape.T, shape.H
    inputs = shape.inputs()
    packing = Packing(
        (T,) * N,
        torch.tensor([0, *accumulate((T,) * N)], dtype=torch.int32, device="cuda"),
        torch.arange(N, dtype=torch.int32, device="cuda"),
        torch.ones(N, dtype=torch.int64, device="cuda"),
    )
    others = peers(inputs, shape, tuned)
    floor = shape.floor(bandwidth)
    extra = 0
    for layer, name in zip(shape.layers, shape.works, strict=False):
        slopes = slopes_of(H, layer)
        initial = initial_states(N, H)
        states = initial.clone()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        o = lightning_prefill(*inputs, slopes, 1.0, states, packing)
        extra = torch.cuda.max_memory_allocated() - before - o.nbytes
        wrong = check(inputs, slopes, initial, o, states, T)
        if not wrong <= ERROR:
            raise AssertionError(f"{name}: error {wrong:.1e} > {ERROR}")
        del o
        work = partial(lightning_prefill, *inputs, slopes, 1.0, states, packing)
        value = milliseconds(work)
        print(f"{name}: {value / floor:.2f}x floor, error {wrong:.1e}")
        yield Row(
            work=name,
            value=value,
            unit="ms",
            better="lower",
            floor=floor,
            goal=shape.goal and shape.goal * floor,
            peers=others,
        )
    if T >= LONG:
        yield Row(
            work=shape.works[-1], value=extra / 1e6, unit="MB", better="lower", goal=SCRATCH_GOAL
        )
