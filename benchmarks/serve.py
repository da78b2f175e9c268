"""The server through HTTP: streams of /v1/completions, beside the engine alone in the same run.

    python -m benchmarks.serve [MODEL] [--streams 1 8 64 256 512] [--api-workers N] [--clients N]

MODEL is a bundled model, a checkpoint, or a directory with a config.json alone, which gets random
weights. Prompts are ids, drawn; every request generates the same number of tokens and ends of
itself nowhere. In a closed loop so many streams each send their next request when their last one
has ended; the engine alone does the same work in one process, ids in and out, and its times are the
floor of those through HTTP. That of tokens per second is the card's: prompts read at the rate of a
GEMM and decode steps at that of a copy, measured in the same run (see benchmarks.engine). In an
open loop requests come at random (Poisson), at shares of the most requests per second that
the closed loops brought. ITL is the time between two frames, as a client sees it; a frame may carry
several tokens, so the mean time per token stands beside it. The file of results is written after
each loop and names those that are still to come: a run may be ended at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy

from benchmarks.load import Load, Reply, allow_files, drawn, run
from benchmarks.result import Row, write
from benchmarks.served import checkpoint, engine_command, served
from model.chunk import Sampling
from server.protocol import FromEngine, Generate, Step, pack_tokens
from server.settings import Settings

PERCENTILES = (50, 90, 99)


class Mailbox:
    """What a line is to the engine's loop, in memory: sends the next request for each that ends,
    and notes when tokens come."""

    def __init__(self, waiting: deque[bytes], running: int) -> None:
        self.inbox: list[bytes] = []
        self.replies: list[Reply] = []
        self.ended = 0
        self._waiting = waiting
        for _ in range(running):
            self._ask()

    def receive(self, timeout: float) -> list[bytes]:
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, message: FromEngine) -> None:
        if not isinstance(message, Step):
            return
        now = time.monotonic()
        for output in message.outputs:
            if output.error:
                raise RuntimeError(output.error)
            if output.tokens:
                self.replies[int(output.id)].frames.append(now)
            if output.finish is not None:
                self.ended += 1
                if self._waiting:
                    self._ask()

    def _ask(self) -> None:
        now = time.monotonic()
        self.replies.append(Reply(now, now))
        self.inbox.append(self._waiting.popleft())


@dataclass(slots=True, frozen=True)
class Alone:
    """A closed loop through the engine alone. floor: tokens per second that the card allows."""

    replies: list[Reply]
    floor: float | None

    @classmethod
    def read(cls, line: str) -> Alone:
        told = json.loads(line)
        return cls([Reply(**reply) for reply in told["replies"]], told["floor"])


def alone(
    settings: Settings, loads: Sequence[tuple[int, int]], prompt: int, tokens: int
) -> Iterator[dict[str, Any]]:
    """First the rates of the card, then an Alone for so many streams of so many requests each."""
    import torch

    from benchmarks.engine import Rates, Work, floor
    from model.config import Fields
    from server.engine.__main__ import load
    from server.engine.loop import Loop

    rates = Rates.measured() if torch.cuda.is_available() and settings.device != "cpu" else None
    yield {} if rates is None else {
        "copy_TBps": rates.bandwidth / 1e12,
        "gemm_TFLOPs": rates.gemm / 1e12,
    }  # fmt: skip
    seed = None if engine_command(settings) is None else 0
    runner: Any = load(settings, seed=seed)
    fields = Fields.read(settings.model_path)
    encode = msgspec.msgpack.Encoder().encode
    for number, (streams, requests) in enumerate([loads[0], *loads]):  # the first one warms up
        rng = random.Random(streams)
        count = streams * requests
        waiting = deque(
            encode(
                Generate(
                    id=str(number),
                    tokens=pack_tokens(drawn(rng, prompt, runner.capacity.vocab_size)),
                    sampling=Sampling(seed=number),
                    max_tokens=tokens,
                )
            )
            for number in range(count)
        )
        mailbox = Mailbox(waiting, streams)
        loop = Loop(runner, mailbox)
        while mailbox.ended < count:
            loop.turn()
        if not number:
            continue
        most = None
        if rates is not None:
            step = (
                floor(runner, fields, Work("", streams, prompt, tokens, "ms a step"), rates) / 1e3
            )
            read = floor(runner, fields, Work("", streams, prompt, 1, "s"), rates)
            most = streams * tokens / (read + (tokens - 1) * step)
        yield {"replies": [asdict(reply) for reply in mailbox.replies], "floor": most}


def rate_of(replies: list[Reply], tokens: int) -> float:
    """Tokens per second from the first request to the last token."""
    begin = min(reply.sent for reply in replies)
    return len(replies) * tokens / (max(reply.frames[-1] for reply in replies) - begin)


def times_of(replies: list[Reply], tokens: int) -> dict[str, float]:
    """Percentiles in milliseconds: first token, between frames, per token, whole. Where every reply
    came in one frame there is no time between frames: 0."""
    kinds = {
        "TTFT": [reply.frames[0] - reply.due for reply in replies],
        "ITL": numpy.concatenate([numpy.diff(reply.frames) for reply in replies]),
        "time per token": [(r.frames[-1] - r.frames[0]) / max(1, tokens - 1) for r in replies],
        "E2E": [reply.frames[-1] - reply.due for reply in replies],
    }
    return {
        f"{kind} p{percent}": float(numpy.percentile(values, percent)) * 1e3 if len(values) else 0.0
        for kind, values in kinds.items()
        for percent in PERCENTILES
    }


def rows_of(
    name: str, replies: list[Reply], tokens: int, floors: dict[str, float] | None = None
) -> list[Row]:
    """A row for each percentile. `floors`: those of the engine alone."""
    return [
        Row(
            work=f"{work}, {name}",
            value=value,
            unit="ms",
            better="lower",
            floor=None if floors is None else floors[work],
        )
        for work, value in times_of(replies, tokens).items()
    ]


def closed(name: str, replies: list[Reply], tokens: int, other: Alone) -> list[Row]:
    """What a closed loop brought, beside the engine alone."""
    rate = rate_of(other.replies, tokens)
    frames = sum(len(reply.frames) for reply in replies)
    return [
        Row(work=f"throughput, {name}", value=rate_of(replies, tokens), unit="tokens/s",
            better="higher", floor=other.floor, goal=0.95 * rate, peers={"engine alone": rate}),
        Row(work=f"tokens a frame, {name}", unit="", better="higher",
            value=len(replies) * tokens / frames),
        *rows_of(name, replies, tokens, times_of(other.replies, tokens)),
    ]  # fmt: skip


def poisson(rate: float, seconds: float) -> list[float]:
    """When requests come, so many a second on average."""
    rng, dues = random.Random(rate), []
    at = rng.expovariate(rate)
    while at < seconds:
        dues.append(at)
        at += rng.expovariate(rate)
    return dues or [at]


def measure(options: argparse.Namespace, settings: Settings) -> None:
    loads = [(streams, max(2, -(-options.least // streams))) for streams in options.streams]
    spec = json.dumps(
        {"settings": settings.model_dump(mode="json"), "loads": loads,
         "prompt": options.prompt, "tokens": options.tokens}
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve", "--alone"],
        input=spec, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    told, *others = done.stdout.splitlines()[-len(loads) - 1 :]
    vocab = json.loads((settings.model_path / "config.json").read_text())["vocab_size"]
    names = [f"{streams} streams" for streams in options.streams]
    shares = [f"open loop at {share:.0%}" for share in options.shares]
    rows: list[Row] = []
    most = 0.0  # requests per second

    def save(missing: list[str]) -> None:
        write("serve", rows, name=f"serve-{settings.model_path.name}", missing=missing,
              api_workers=options.api_workers, clients=options.clients,
              **json.loads(told))  # fmt: skip

    with served(settings) as url:

        def load(streams: int, requests: int, dues: list[float]) -> Load:
            return Load(
                url=url, streams=streams, requests=requests, prompt=options.prompt,
                tokens=options.tokens, vocab=vocab, seed=streams + len(dues), dues=dues,
            )  # fmt: skip

        run(load(options.streams[0], 2, []), options.clients)  # warms up
        for number, (streams, requests) in enumerate(loads):
            replies = run(load(streams, requests, []), options.clients)
            throughput, *more = closed(
                names[number], replies, options.tokens, Alone.read(others[number])
            )
            rows += [throughput, *more]
            most = max(most, throughput.value / options.tokens)
            print(throughput, flush=True)
            save(names[number + 1 :] + shares)
        for number, share in enumerate(options.shares):
            rate = share * most
            replies = run(load(0, 0, poisson(rate, options.seconds)), options.clients)
            name = f"open loop at {rate:.3g} requests/s ({share:.0%})"
            rows += rows_of(name, replies, options.tokens)
            print(f"{name}: {len(replies)} requests", flush=True)
            save(shares[number + 1 :])


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="recall")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64, 256, 512])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--least", type=int, default=16, help="requests of a closed loop, at least")
    parser.add_argument("--seconds", type=float, default=10.0, help="of an open loop")
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[0.25, 0.5, 0.75, 0.9],
        help="of the most requests per second, for open loops",
    )  # fmt: skip
    parser.add_argument("--api-workers", type=int, default=max(1, cores // 2))
    parser.add_argument(
        "--clients", type=int, default=max(1, cores // 4), help="processes that send the load"
    )
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        spec = json.loads(sys.stdin.read())
        settings = Settings.model_validate_json(json.dumps(spec.pop("settings")))
        for told in alone(settings, **spec):
            print(json.dumps(told), flush=True)
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # and the server ends as well
    allow_files()
    with checkpoint(options.model) as settings:
        settings = settings.model_copy(
            update={
                "device": options.device, "port": 0, "api_workers": options.api_workers,
                "max_running": max(options.streams), "log_level": "warning",
                "threads": options.threads or cores,
                "max_queue_requests": 100_000, "max_model_len": None, "prefix_caching": False,
            }
        )  # fmt: skip
        measure(options, settings)


if __name__ == "__main__":
    main()
