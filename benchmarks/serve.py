"""The server through HTTP: streams of /v1/completions, beside the engine alone in the same run.

    python -m benchmarks.serve [MODEL] [--streams 1 8 64 256 512] [--api-workers 1] [--clients 1]

MODEL is a bundled model, a checkpoint, or a directory with a config.json alone, which gets random
weights. Prompts are ids, drawn; every request generates the same number of tokens and ends of
itself nowhere. In a closed loop so many streams each send their next request when their last one
has ended; the engine alone does the same work in one process, ids in and out. In an open loop
requests come at random (Poisson), at shares of the most requests per second that the closed loops
brought. ITL is the time between two frames, as a client sees it; a frame may carry several tokens,
so the mean time per token stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import deque

import msgspec
import numpy

from benchmarks.load import Load, Reply, run
from benchmarks.result import Row, write
from benchmarks.served import checkpoint, engine_command, served
from model.chunk import Sampling
from server.protocol import FromEngine, Generate, Step, pack_tokens
from server.settings import Settings

SHARES = (0.25, 0.5, 0.75, 0.9)  # of the most requests per second, for open loops
PERCENTILES = (50, 90, 99)


class Mailbox:
    """What a line is to the engine's loop, in memory: sends the next request for each that ends."""

    def __init__(self, waiting: deque[bytes], running: int) -> None:
        self.inbox = [waiting.popleft() for _ in range(running)]
        self.ended = 0
        self._waiting = waiting

    def receive(self, timeout: float) -> list[bytes]:
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, message: FromEngine) -> None:
        if not isinstance(message, Step):
            return
        for output in message.outputs:
            if output.error:
                raise RuntimeError(output.error)
            if output.finish is not None:
                self.ended += 1
                if self._waiting:
                    self.inbox.append(self._waiting.popleft())


def alone(
    settings: Settings, loads: list[tuple[int, int]], prompt: int, tokens: int
) -> list[float]:
    """Tokens per second of the engine's loop alone, for so many streams of so many requests."""
    from server.engine.__main__ import load
    from server.engine.loop import Loop

    seed = None if engine_command(settings) is None else 0
    runner = load(settings, seed=seed)
    encode = msgspec.msgpack.Encoder().encode
    rates = []
    for streams, requests in [loads[0], *loads]:  # the first one warms up
        rng = random.Random(streams)
        count = streams * requests
        waiting = deque(
            encode(
                Generate(
                    id=f"{streams}-{number}",
                    tokens=pack_tokens([rng.randrange(256) for _ in range(prompt)]),
                    sampling=Sampling(seed=number),
                    max_tokens=tokens,
                )
            )
            for number in range(count)
        )
        mailbox = Mailbox(waiting, streams)
        loop = Loop(runner, mailbox)
        begin = time.perf_counter()
        while mailbox.ended < count:
            loop.turn()
        rates.append(count * tokens / (time.perf_counter() - begin))
    return rates[1:]


def rows_of(name: str, replies: list[Reply], tokens: int) -> list[Row]:
    """Percentiles in milliseconds: first token, between frames, per token, whole."""
    first = [reply.frames[0] - reply.due for reply in replies]
    gaps = numpy.concatenate([numpy.diff(reply.frames) for reply in replies])
    per_token = [(r.frames[-1] - r.frames[0]) / max(1, tokens - 1) for r in replies]
    whole = [reply.frames[-1] - reply.due for reply in replies]
    kinds = {"TTFT": first, "ITL": gaps, "time per token": per_token, "E2E": whole}
    return [
        Row(
            work=f"{kind} p{percent}, {name}",
            value=float(numpy.percentile(values, percent)) * 1e3,
            unit="ms",
            better="lower",
        )
        for kind, values in kinds.items()
        for percent in PERCENTILES
    ]


def measure(options: argparse.Namespace, settings: Settings) -> list[Row]:
    loads = [(streams, max(2, -(-options.least // streams))) for streams in options.streams]
    spec = json.dumps(
        {"settings": settings.model_dump(mode="json"), "loads": loads,
         "prompt": options.prompt, "tokens": options.tokens}
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve", "--alone"],
        input=spec, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    rates: list[float] = json.loads(done.stdout.splitlines()[-1])
    rows: list[Row] = []
    vocab = json.loads((settings.model_path / "config.json").read_text())["vocab_size"]
    most = 0.0
    with served(settings) as url:

        def load(streams: int, requests: int, dues: list[float]) -> Load:
            return Load(
                url=url, begin=0.0, streams=streams, requests=requests, prompt=options.prompt,
                tokens=options.tokens, vocab=vocab, seed=streams + len(dues), dues=dues,
            )  # fmt: skip

        run(load(options.streams[0], 2, []), options.clients)  # warms up
        for (streams, requests), rate in zip(loads, rates, strict=True):
            replies = run(load(streams, requests, []), options.clients)
            begin = min(reply.sent for reply in replies)
            seconds = max(reply.frames[-1] for reply in replies) - begin
            value = len(replies) * options.tokens / seconds
            most = max(most, len(replies) / seconds)
            name = f"{streams} streams"
            frames = sum(len(reply.frames) for reply in replies)
            rows += [
                Row(work=f"throughput, {name}", value=value, unit="tokens/s", better="higher",
                    goal=0.95 * rate, peers={"engine alone": rate}),
                Row(work=f"tokens a frame, {name}", unit="", better="higher",
                    value=len(replies) * options.tokens / frames),
                *rows_of(name, replies, options.tokens),
            ]  # fmt: skip
            print(f"{name}: {value:,.0f} tokens/s, the engine alone {rate:,.0f}", flush=True)
        for share in SHARES:
            rng = random.Random(share)
            rate = share * most
            dues: list[float] = []
            at = rng.expovariate(rate)
            while at < options.seconds:
                dues.append(at)
                at += rng.expovariate(rate)
            replies = run(load(0, 0, dues), options.clients)
            name = f"open loop at {rate:.3g} requests/s ({share:.0%})"
            rows += rows_of(name, replies, options.tokens)
            print(f"{name}: {len(replies)} requests", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="recall")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64, 256, 512])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--least", type=int, default=16, help="requests of a closed loop, at least")
    parser.add_argument("--seconds", type=float, default=20.0, help="of an open loop")
    parser.add_argument("--api-workers", type=int, default=1)
    parser.add_argument("--clients", type=int, default=1, help="processes that send the load")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        spec = json.loads(sys.stdin.read())
        settings = Settings.model_validate_json(json.dumps(spec.pop("settings")))
        print(json.dumps(alone(settings, **spec)))
        return
    with checkpoint(options.model) as settings:
        settings = settings.model_copy(
            update={
                "device": options.device, "port": 0, "api_workers": options.api_workers,
                "max_running": max(options.streams), "log_level": "warning",
                "threads": options.threads or len(os.sched_getaffinity(0)),
                "max_queue_requests": 100_000, "max_model_len": None, "prefix_caching": False,
            }
        )  # fmt: skip
        rows = measure(options, settings)
    write("serve", rows)


if __name__ == "__main__":
    main()
