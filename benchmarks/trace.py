"""Where a step's time goes: launches on the GPU by kernel, and the gaps between them.

    python -m benchmarks.trace CONFIG_DIRECTORY [--decode 1 64 256 512] [--prefill 8192]

Random weights. Decode steps are launched one ahead, as the engine does, every sequence at 300
tokens; a prefill is one chunk from position 0. `busy` is the time in which at least one kernel runs
and `step` the time from one step's begin to the next one's, both from the profiler's clock; `host`
is what launching takes the host. The rows of kernels are microseconds a step, the longest first.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.result import Row, write
from model.chunk import PENDING, Chunk, Sampling
from model.runner import BLOCK_SIZE, ModelRunner, load_runner

START = 300  # tokens of every sequence when tracing begins
STEPS = 20
TOP = 12  # kernels of a work that get a row
DRAWN = Sampling(temperature=1.0)


class Decoding:
    """B sequences that decode together; `step` launches one and collects the one before."""

    def __init__(self, runner: ModelRunner, B: int) -> None:
        self.runner = runner
        self.B = B
        self.position = START
        blocks = -(-(START + 8 * STEPS) // BLOCK_SIZE) if runner.capacity.blocks else 0
        self.blocks = [range(blocks * i, blocks * (i + 1)) for i in range(B)]
        for first in range(0, B, 16):
            runner.step(
                [
                    Chunk(tokens=[7] * START, start=0, slot=i, blocks=self.blocks[i])
                    for i in range(first, min(first + 16, B))
                ]
            )
        self.before: Any = None
        self.host: list[float] = []

    def step(self) -> None:
        begin = time.perf_counter()
        launched = self.runner.launch(
            [
                Chunk(
                    tokens=[7 if self.before is None else PENDING],
                    start=self.position,
                    slot=i,
                    blocks=self.blocks[i],
                    sampling=DRAWN,
                    generated=self.position - START,
                    prompt=False,
                )
                for i in range(self.B)
            ]
        )
        self.host.append(time.perf_counter() - begin)
        if self.before is not None:
            self.runner.collect(self.before)
        self.before = launched
        self.position += 1


def short(name: str) -> str:
    """A kernel's name without its return type, arguments and most of its template."""
    name = re.sub(r"^void ", "", name)
    return re.sub(r"[(<].*", "", name)[:70]


def traced(step: Callable[[], None], steps: int) -> tuple[float, float, float, Counter[str]]:
    """A step's milliseconds, those in which the GPU is busy, launches, microseconds by kernel."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(5):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    spans = []
    shares: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        begin, end = event.time_range.start, event.time_range.end
        spans.append((begin, end))
        shares[short(event.name)] += (end - begin) / steps
    spans.sort()
    busy, reached = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    whole = (reached - spans[0][0]) / steps / 1e3
    return whole, busy / steps / 1e3, len(spans) / steps, shares


def rows_of(name: str, step: Callable[[], None], steps: int) -> list[Row]:
    whole, busy, launches, shares = traced(step, steps)
    rows = [
        Row(work=f"{name}: step", value=whole, unit="ms", better="lower"),
        Row(work=f"{name}: busy", value=busy, unit="ms", better="lower"),
        Row(work=f"{name}: launches", value=launches, unit="", better="lower"),
    ]
    rows += [
        Row(work=f"{name}: {kernel}", value=share, unit="us", better="lower")
        for kernel, share in shares.most_common(TOP)
    ]
    print(f"{name}: step {whole:.3f} ms, busy {busy:.3f}, {launches:.0f} launches", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path, help="directory with config.json")
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 64, 256, 512])
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192])
    options = parser.parse_args()
    runner = load_runner(options.config, seed=0, max_running=max([*options.decode, 1]))
    rows = []
    for B in options.decode:
        work = Decoding(runner, B)
        rows += rows_of(f"decode {B}", work.step, STEPS)
        host = sorted(work.host)[len(work.host) // 2] * 1e3
        rows.append(Row(work=f"decode {B}: host", value=host, unit="ms", better="lower"))
        runner.collect(work.before)
    for T in options.prefill:
        blocks = range(-(-T // BLOCK_SIZE)) if runner.capacity.blocks else ()
        chunk = Chunk(tokens=[7] * T, start=0, slot=0, blocks=blocks, sampling=DRAWN)
        rows += rows_of(f"prefill {T}", lambda chunk=chunk: runner.step([chunk]), 3)  # type: ignore[misc]
    write("trace", rows, name=f"trace-{options.config.name}")


if __name__ == "__main__":
    main()
