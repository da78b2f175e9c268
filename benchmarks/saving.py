"""What keeping states costs where nothing is ever found: the engine's loop in this process, with
caching and without, by turns.

    python -m benchmarks.saving CONFIG_DIRECTORY [--streams 32] [--requests 192] [--rounds 4]

Random weights, streams that send their next request when their last one has ended, prompts of 100
tokens that are never asked again, 128 to 384 tokens each. A share is the median over rounds, of
which each has the same requests in both ways. The other rows are the loop's own time, milliseconds
a request in the last round: what is no waiting, and is more than the device takes meanwhile, is
time that the device waits.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import torch

from benchmarks.result import Row, write
from benchmarks.serve import Mailbox
from model.chunk import Chunk, Sampling
from model.config import Fields
from model.plan import footprint
from model.runner import ModelRunner, load_runner
from server.engine.loop import Loop
from server.protocol import Generate, pack_tokens

PROMPT, LEAST, MOST = 100, 128, 384  # tokens
KEPT = 4  # states on the host for every slot


def requests(count: int, vocab: int, seed: int) -> tuple[deque[bytes], int]:
    """Messages, and the tokens that they generate together."""
    rng, encode = Random(seed), msgspec.msgpack.Encoder().encode
    lengths = [rng.randint(LEAST, MOST) for _ in range(count)]
    messages = deque(
        encode(
            Generate(
                id=str(number),
                tokens=pack_tokens([rng.randrange(vocab) for _ in range(PROMPT)]),
                sampling=Sampling(seed=number),
                max_tokens=length,
            )
        )
        for number, length in enumerate(lengths)
    )
    return messages, sum(lengths)


class Watch:
    """Seconds that calls take, by name."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def over(self, call: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        """The call, timed under a name that its arguments tell."""

        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            result = call(*args)
            self.seconds[name(*args)] += time.perf_counter() - begin
            return result

        return timed


def play(
    runner: ModelRunner, host_bytes: int, caching: bool, streams: int, count: int, seed: int
) -> tuple[float, Counter[str]]:
    """Tokens a second, and seconds by part of the loop."""
    messages, tokens = requests(count, runner.capacity.vocab_size, seed)
    mailbox, watch = Mailbox(messages, streams), Watch()
    loop: Any = Loop(runner, mailbox, caching=caching, host_bytes=host_bytes)

    def step(chunks: list[Chunk]) -> str:
        reads = any(len(chunk.tokens) > 1 for chunk in chunks)
        return "launching steps that read" if reads else "launching steps that decode"

    scheduler = loop.scheduler
    scheduler.schedule = watch.over(scheduler.schedule, lambda *_: "scheduling")
    scheduler.complete = watch.over(scheduler.complete, lambda *_: "completing")
    names = {"launch": step, "copy": lambda *_: "copying", "collect": lambda *_: "waiting"}
    for name, told in names.items():
        setattr(runner, name, watch.over(getattr(runner, name), told))
    gc.collect()
    begin = time.perf_counter()
    try:
        while mailbox.ended < count:
            loop.turn()
        taken = time.perf_counter() - begin
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a step that nobody asks for any more ends
        for name in names:
            delattr(runner, name)  # what the class has is seen again
        runner.saved.clear()
    return tokens / taken, watch.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path, help="directory with config.json")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--requests", type=int, default=192, help="of a round")
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    host_bytes = KEPT * options.streams * footprint(Fields.read(options.config)).slot
    runner = load_runner(options.config, seed=0, max_running=options.streams, host_bytes=host_bytes)
    rates: dict[bool, list[float]] = {True: [], False: []}
    parts: dict[bool, Counter[str]] = {}
    for number in range(options.rounds + 1):  # the first one fills the host and warms up
        for caching in (True, False) if number % 2 else (False, True):
            rate, parts[caching] = play(
                runner, host_bytes, caching, options.streams, options.requests, number
            )
            if number:
                rates[caching].append(rate)
                print(f"caching {'on' if caching else 'off'}: {rate:,.0f} tokens/s", flush=True)
    shares = [on / off for on, off in zip(rates[True], rates[False], strict=True)]
    rows = [
        Row(
            work=f"decode, {options.streams} streams, caching on and never hit, over off",
            value=statistics.median(shares),
            unit="x",
            better="higher",
            goal=0.98,
        )
    ]
    for caching, seconds in parts.items():
        rows += [
            Row(
                work=f"caching {'on' if caching else 'off'}: {part}",
                value=1e3 * taken / options.requests,
                unit="ms a request",
                better="lower",
            )
            for part, taken in seconds.most_common()
        ]
    write("saving", rows, name=f"saving-{options.config.name}")


if __name__ == "__main__":
    main()
