"""Where a step's time goes: launches on the GPU by kernel, and the gaps between them.

    python -m benchmarks.trace CONFIG_DIRECTORY [--decode 1 64 256 512] [--prefill 8192]

Random weights, through the engine's loop in this process. Every decoding sequence has read 300
tokens of its own, each drawn at random, so that they meet all experts; a prefill is one such prompt
and its first token. `busy` is the time in which at least one kernel runs and `step` the time from
the first kernel to the last over the steps, both by the profiler's clock; `host` is what the loop
takes of a step when it does not wait for the device, without the profiler. The rows of kernels are
microseconds a step, the longest first.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import msgspec
import torch

from benchmarks.engine import Mailbox
from benchmarks.result import Row, write
from model.chunk import Sampled, Sampling
from model.runner import Launched, ModelRunner, load_runner
from server.engine.loop import Loop
from server.protocol import Abort, Generate, pack_tokens

START = 300  # tokens of every sequence when tracing begins
STEPS = 20
WARM = 5  # steps before those that are traced
TOP = 12  # kernels of a work that get a row


class Engine:
    """The engine's loop, and requests of random prompts for it."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.mailbox = Mailbox()
        self.loop = Loop(runner, self.mailbox)
        self.rng = Random(0)
        self.count = 0
        self.waited = 0.0
        self.host: list[float] = []
        collect = runner.collect

        def timed(launched: Launched) -> list[Sampled | None]:
            begin = time.perf_counter()
            found = collect(launched)
            self.waited += time.perf_counter() - begin
            return found

        runner.collect = timed  # type: ignore[method-assign]

    def request(self, prompt: int, tokens: int) -> bytes:
        """A message that asks for so many tokens after such a prompt."""
        self.count += 1
        ids = [self.rng.randrange(self.runner.capacity.vocab_size) for _ in range(prompt)]
        sampling = Sampling(temperature=1.0, seed=self.count)
        return msgspec.msgpack.encode(
            Generate(
                id=str(self.count), tokens=pack_tokens(ids), sampling=sampling, max_tokens=tokens
            )
        )

    def step(self) -> None:
        """A turn of the loop."""
        begin, self.waited = time.perf_counter(), 0.0
        self.loop.turn()
        self.host.append(time.perf_counter() - begin - self.waited)

    def decode(self, B: int) -> None:
        """Begin B sequences, all of which then decode."""
        self.mailbox.inbox += [self.request(START, 4 * (WARM + STEPS)) for _ in range(B)]
        self.mailbox.steps.clear()
        begun: set[str] = set()
        while len(begun) < B:
            self.step()
            begun = {o.id for _, step in self.mailbox.steps for o in step.outputs if o.tokens}
        self.host.clear()

    def end(self) -> None:
        """End what is under way."""
        ids = [str(i) for i in range(1, self.count + 1)]
        self.mailbox.inbox.append(msgspec.msgpack.encode(Abort(ids=ids)))
        self.step()
        while not self.loop.scheduler.idle:
            self.step()

    def read(self, message: bytes) -> None:
        """Read a prompt to its first token."""
        self.mailbox.inbox.append(message)
        self.step()
        while not self.loop.scheduler.idle:
            self.step()


def short(name: str) -> str:
    """A kernel's name without its return type, arguments and most of its template."""
    name = re.sub(r"^void ", "", name)
    return re.sub(r"[(<].*", "", name)[:70]


def traced(step: Callable[[], None], steps: int) -> tuple[float, float, float, Counter[str]]:
    """A step's milliseconds, those in which the GPU is busy, launches, microseconds by kernel."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(WARM):
        step()
    torch.cuda.synchronize()
    gc.disable()  # what the profiler gathers would be walked again and again
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    gc.enable()
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
    engine = Engine(runner)
    gc.collect()
    gc.freeze()
    for B in options.decode:
        engine.decode(B)
        rows += rows_of(f"decode {B}", engine.step, STEPS)
        engine.host.clear()
        for _ in range(STEPS):
            engine.step()
        host = sorted(engine.host)[len(engine.host) // 2] * 1e3
        rows.append(Row(work=f"decode {B}: host", value=host, unit="ms", better="lower"))
        engine.end()
    for T in options.prefill:
        prompts = iter([engine.request(T, 1) for _ in range(WARM + 3)])
        rows += rows_of(f"prefill {T}", lambda prompts=prompts: engine.read(next(prompts)), 3)  # type: ignore[misc]
    write("trace", rows, name=f"trace-{options.config.name}")


if __name__ == "__main__":
    main()
