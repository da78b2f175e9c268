"""Long prompts among chats: what each token of a chat waits for, with and without --target-itl-ms.

    python -m benchmarks.fairness [--shape lightning-1b | --model recall] [--tokens 1000000]

So many chats generate without end; then prompts come, one when the one before has been answered. A
server is started as a user starts it and asked over HTTP, first without a target, then with one.
ITL is the time between two frames of a chat, as its client sees it: `before` the first prompt, and
`during` the reading of any; `lift` is by how much that is longer. The budget of steps is read off
/metrics meanwhile. Without a GPU prompts have 20,000 tokens and chats are 8. The file of results is
written after each server: a run may be ended at any time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import re
import signal
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy

from benchmarks.load import Stream, allow_files, completion
from benchmarks.result import Row, write
from benchmarks.served import checkpoint, served
from server.settings import Settings

SHAPES = Path(__file__).parent / "shapes"
BUDGET = re.compile(r"^steadystate_step_token_budget\{.*\} (\S+)$", re.MULTILINE)
POINTS = 120  # of a line in the picture
PERCENTILES = (50, 99)


@dataclass(slots=True)
class Trace:
    """What was seen; times are seconds after the first long prompt was sent."""

    gaps: list[tuple[float, float]] = field(default_factory=list)  # end and length, of all chats
    budget: list[tuple[float, int]] = field(default_factory=list)
    reads: list[tuple[float, float]] = field(default_factory=list)  # sent, first token

    def during(self) -> list[float]:
        """Gaps that a prompt was read in."""
        return [
            gap for at, gap in self.gaps
            if any(at > sent and at - gap < first for sent, first in self.reads)
        ]  # fmt: skip

    def before(self) -> list[float]:
        return [gap for at, gap in self.gaps if at <= 0]

    def line(self) -> dict[str, list[tuple[float, float]]]:
        """The longest gap of each moment and the budget, in milliseconds and tokens."""
        begin, end = self.gaps[0][0], max(first for _, first in self.reads)
        width = (end - begin) / POINTS
        longest: dict[int, float] = {}
        for at, gap in self.gaps:
            if at <= end:
                moment = int((at - begin) / width)
                longest[moment] = max(longest.get(moment, 0.0), gap)
        thinned = self.budget[:: max(1, len(self.budget) // POINTS)]
        return {
            "longest_itl_ms": [
                (round(begin + moment * width, 4), round(1e3 * gap, 3))
                for moment, gap in sorted(longest.items())
            ],
            "step_token_budget": [(round(at, 4), tokens) for at, tokens in thinned if at <= end],
        }


async def watch(url: str, options: argparse.Namespace, vocab: int) -> Trace:
    """Chats, then prompts among them."""
    parts, loop = urlsplit(url), asyncio.get_running_loop()
    rng, trace = random.Random(0), Trace()
    chats: list[Stream] = []
    budget: list[tuple[float, int]] = []

    def request(prompt: int, tokens: int) -> bytes:
        return completion(parts.netloc, rng, prompt, tokens, vocab)

    async def send(data: bytes) -> tuple[Stream, asyncio.Future[None]]:
        _, stream = await loop.create_connection(Stream, parts.hostname, parts.port)
        return stream, stream.send(data, time.monotonic())

    def check() -> None:
        for chat in chats:
            if chat.done is None or chat.done.done():
                raise RuntimeError(f"a chat ended: {chat.reply and chat.reply.error!r}")

    async def sample() -> None:
        async with httpx.AsyncClient(base_url=url) as client:
            while True:
                found = BUDGET.search((await client.get("/metrics")).text)
                assert found is not None, "the server tells no budget"
                budget.append((time.monotonic(), int(float(found[1]))))
                await asyncio.sleep(options.every)

    gc.collect()
    gc.freeze()  # else to walk what was imported makes gaps of its own
    prompts = [request(options.tokens, 1) for _ in range(options.rounds)]  # before anybody waits
    for _ in range(options.chats):
        chats.append((await send(request(options.prompt, options.chat_tokens)))[0])
    while not all(chat.reply and chat.reply.frames for chat in chats):
        check()
        await asyncio.sleep(0.01)
    settled = time.monotonic()
    sampling = asyncio.create_task(sample())
    await asyncio.sleep(options.seconds)
    reads: list[tuple[float, float]] = []
    for data in prompts:
        long, done = await send(data)
        await done
        assert long.reply is not None
        if long.reply.error:
            raise RuntimeError(f"a long prompt failed: {long.reply.error}")
        check()
        reads.append((long.reply.sent, long.reply.frames[0]))
        long.close()
    await asyncio.sleep(options.seconds / 4)
    sampling.cancel()
    begin = reads[0][0]
    trace.reads = [(sent - begin, first - begin) for sent, first in reads]
    trace.budget = [(at - begin, tokens) for at, tokens in budget]
    for chat in chats:
        assert chat.reply is not None
        frames = [at for at in chat.reply.frames if at >= settled]
        trace.gaps += [(b - begin, b - a) for a, b in pairwise(frames)]
        chat.close()
    trace.gaps.sort()
    return trace


def rows_of(name: str, trace: Trace, tokens: int, target: float | None) -> list[Row]:
    """Percentiles in milliseconds, how long a prompt took, and what a step was allowed."""
    works = {"before": trace.before(), "during": trace.during()}
    rows = [
        Row(
            work=f"ITL p{percent} {when}, {name}",
            value=float(numpy.percentile(gaps, percent)) * 1e3,
            unit="ms",
            better="lower",
            goal=target if when == "during" else None,
        )
        for when, gaps in works.items()
        for percent in PERCENTILES
    ]
    lift = rows[-1].value - rows[len(PERCENTILES) - 1].value
    rows.append(
        Row(work=f"ITL p99 lift, {name}", value=lift, unit="ms", better="lower", goal=target)
    )
    whole = [first - sent for sent, first in trace.reads]
    read = [t for at, t in trace.budget if any(a <= at <= b for a, b in trace.reads)]
    rows.append(
        Row(
            work=f"first token of {tokens:,} tokens, {name}",
            value=float(numpy.median(whole)),
            unit="s",
            better="lower",
        )
    )
    rows.append(
        Row(
            work=f"step budget p50 during, {name}",
            value=float(numpy.median(read)) if read else float("nan"),
            unit="tokens",
            better="higher",
        )
    )
    return rows


def main() -> None:
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", default="recall")
    add("--shape", choices=sorted(path.name for path in SHAPES.iterdir()), help="random weights")
    add("--tokens", type=int, default=1_000_000 if cuda else 20_000, help="of a long prompt")
    add("--rounds", type=int, default=2, help="long prompts, one after another")
    add("--chats", type=int, default=64 if cuda else 8)
    add("--prompt", type=int, default=128, help="tokens of a chat's prompt")
    add("--chat-tokens", type=int, default=10_000_000, help="of a chat, more than it comes to")
    add("--target-itl-ms", type=float, default=25.0)
    add("--max-step-tokens", type=int, default=None)
    add("--seconds", type=float, default=5.0, help="of chats alone")
    add("--every", type=float, default=0.1, help="seconds between looks at the budget")
    add("--threads", type=int, default=None)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # and the server ends as well
    allow_files()
    rows: list[Row] = []
    lines: dict[str, Any] = {}
    with checkpoint(str(SHAPES / options.shape) if options.shape else options.model) as settings:
        vocab = json.loads((settings.model_path / "config.json").read_text())["vocab_size"]
        names = {None: "no target", options.target_itl_ms: f"target {options.target_itl_ms:g} ms"}
        for target, name in names.items():
            asked = {
                "port": 0, "log_level": "warning", "prefix_caching": False,
                "max_running": options.chats + 1, "max_step_tokens": options.max_step_tokens,
                "threads": options.threads or len(os.sched_getaffinity(0)),
                "target_itl_ms": target,
            }  # fmt: skip
            settings = Settings(**settings.model_dump() | asked)
            with served(settings) as url:
                trace = asyncio.run(watch(url, options, vocab))
            rows += rows_of(name, trace, options.tokens, target)
            lines[name] = trace.line()
            missing = [name for name in names.values() if name not in lines]
            write("fairness", rows, missing=missing, model=options.shape or options.model,
                  chats=options.chats, lines=lines)  # fmt: skip
            print(*rows, sep="\n", flush=True)


if __name__ == "__main__":
    main()
