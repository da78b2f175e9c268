"""Contexts by id: time to first token from each tier, against a cold prefill; what caching costs.

    python -m benchmarks.contexts [--shape lightning-1b | --model recall] [--tokens 1000000]

Servers are started as a user starts them, all at once, and asked over HTTP; a shape gets random
weights, made on the device, and a token a byte. A time is from sending a request to the end of its
answer of one token, the median of several. Before those of the host other prompts take every slot,
before those of the disk all of the host's memory too, and the system forgets what it has read of
the file; before those of the device one other prompt wakes what has slept.
/metrics must say that the state was taken from the tier that is named.

What caching costs is measured on pairs of servers, with and without, by prompts that are never
asked again, once the memory of the host has been full. In a round of decoding both have the same
load, of streams that are busy from the beginning to the end, by turns: see benchmarks.turns. Long
prompts are read one after another, and one in three is held against the mean of those around it.
A share is the mean over the pairs of the median over rounds. Its standard error is that of a median
of all rounds or, where that is more, of a mean over the pairs: servers that are alike differ too,
by some percent, by where their memory happens to lie.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import Clients, Load
from benchmarks.result import Row, write
from benchmarks.served import checkpoint, launched
from benchmarks.turns import play
from model.config import Fields
from model.plan import footprint
from server.engine.archive import TEMPORARY
from server.engine.loop import IDLE_SECONDS
from server.settings import Settings

SHAPES = Path(__file__).parent / "shapes"
GOALS = {"device": 30.0, "host": 60.0, "disk": 250.0}  # milliseconds
FILE_GOAL = 22.0  # MB
SLOTS = 4
ROOM = 16  # states that the host holds beside the slots, at least
SAMPLES = 7
DECODERS = 32
DECODED, SPREAD = 256, 128  # tokens of a request, and how many more or fewer some have
REQUESTS = 4  # of each stream in a round, an even number: see Load
PAIRS = 2  # of servers with and without caching
ROUNDS = 4  # of decoding by each pair; half as many of reading

BEGIN = time.monotonic()


def say(what: str) -> None:
    print(f"{time.monotonic() - BEGIN:6.1f} s  {what}", flush=True)


def text(length: int, seed: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz    ,.\n", k=length))


class Server:
    """A server that is up, and how its clients ask it. `group` is that of its processes."""

    def __init__(self, url: str, group: int | None = None) -> None:
        self.url, self.group = url, group
        self.http = httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(max_connections=64))
        self._seed = 0

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        response = self.http.post(path, json=body)
        if response.is_error:
            raise RuntimeError(f"{path}: {response.status_code} {response.text[:500]}")
        answer: dict[str, Any] = response.json()
        return answer

    def first_token(self, **body: Any) -> tuple[float, int]:
        """Milliseconds to an answer of one token, and the tokens that were not read for it."""
        begin = time.perf_counter()
        answer = self.post("/v1/completions", max_tokens=1, temperature=0, **body)
        taken = 1000 * (time.perf_counter() - begin)
        return taken, answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    def hits(self) -> dict[str, float]:
        """How many requests found a state in each tier."""
        found: dict[str, float] = {}
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith("steadystate_checkpoint_hits_total{"):
                name, _, value = line.rpartition(" ")
                found[name.partition('tier="')[2].partition('"')[0]] = float(value)
        return found

    def others(self, count: int) -> None:
        """So many prompts that were never asked."""
        with ThreadPoolExecutor(SLOTS) as pool:
            seeds = range(self._seed, self._seed + count)
            list(pool.map(lambda seed: self.first_token(prompt=text(100, 10_000 + seed)), seeds))
        self._seed += count

    def read(self, tokens: int, seed: int) -> float:
        """Tokens a second of a prompt that was never asked."""
        taken, cached = self.first_token(prompt=text(tokens, 1_000_000 + seed))
        if cached:
            raise RuntimeError(f"{cached} tokens were cached, none is due")
        return 1000 * tokens / taken


def rested(directory: Path) -> None:
    """Return once an idle server has written what it found worth a file, or after a while."""
    seen: set[str] = set()
    changed = begin = time.monotonic()
    while (now := time.monotonic()) < begin + 20:
        names = {path.name for path in (directory / "states").iterdir()}
        if names != seen or any(name.startswith(TEMPORARY) for name in names):
            seen, changed = names, now
        elif now - changed > 2 * IDLE_SECONDS:  # it begins a file when it was idle for so long
            return
        time.sleep(0.1)


def tier(server: Server, name: str, id: str, tokens: int, before: Callable[[], None]) -> float:
    """The median time to first token behind a context that lies in a tier."""
    times = []
    for sample in range(SAMPLES + 1):
        before()
        seen = server.hits()
        taken, cached = server.first_token(context=id, prompt=f"Why {sample}?")
        came = [tier for tier, count in server.hits().items() if count > seen.get(tier, 0)]
        if (cached, came) != (tokens, [name]):
            raise RuntimeError(f"{cached} of {tokens} tokens came from {came}, {name} is due")
        times.append(taken)
    say(f"{name}: {min(times):.1f} to {max(times):.1f} ms")
    return statistics.median(times[1:])


def tiers(server: Server, tokens: int, directory: Path, *, beyond: int) -> list[Row]:
    """Cold, then by id from the device, the host and the disk; and the file's size. `beyond`: as
    many other prompts as fill slots and host."""
    server.first_token(prompt=text(5000, 3))
    document = text(tokens, 1)
    cold, _ = server.first_token(prompt=document + "Why?", cache_salt="cold")
    say(f"cold prefill: {cold:.0f} ms")
    context = server.post("/v1/contexts", text=document)
    if context["tokens"] != tokens:
        raise RuntimeError(f"{context['tokens']} tokens, {tokens} are due: not one a byte")
    [file] = (directory / "states").glob(f"{context['digest']}.*")
    size = len(server.http.get(f"/v1/contexts/{context['id']}/file").content)

    def from_disk() -> None:
        server.others(beyond)
        descriptor = os.open(file, os.O_RDONLY)
        with contextlib.suppress(AttributeError):  # macOS has no such call
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)

    def woken() -> None:
        rested(directory)
        server.others(1)

    befores: dict[str, Callable[[], None]] = {
        "device": woken,
        "host": lambda: server.others(2 * SLOTS),
        "disk": from_disk,
    }
    server.first_token(context=context["id"], prompt="Why?")  # brings it to the device
    rested(directory)
    rows = [
        Row(
            work=f"time to first token, context of {tokens:,} tokens, {name}",
            value=tier(server, name, context["id"], tokens, before),
            unit="ms",
            better="lower",
            goal=GOALS[name],
            peers={"cold prefill": cold},
        )
        for name, before in befores.items()
    ]
    return [
        *rows,
        Row(
            work=f"file of a context of {tokens:,} tokens",
            value=size / 1e6,
            unit="MB",
            better="lower",
            goal=FILE_GOAL,
        ),
    ]


def decoded(pairs: Sequence[tuple[Server, Server]], rounds: int) -> list[list[float]]:
    """Of each pair and round, how fast the one server decodes over the other. Two rounds of each
    pair before them warm up."""
    shares: list[list[float]] = [[] for _ in pairs]
    with Clients(1) as one, Clients(1) as another:
        for number in range((2 + rounds) * len(pairs)):
            turn, pair = divmod(number, len(pairs))
            on, off = pairs[pair]
            order = (on, off) if turn % 2 else (off, on)
            loads = [
                Load(
                    url=server.url, streams=DECODERS, requests=REQUESTS, prompt=100,
                    tokens=DECODED, spread=SPREAD, vocab=256, seed=number, whole=True,
                )
                for server in order
            ]  # fmt: skip
            groups = [server.group for server in order if server.group is not None]
            rates = dict(zip(order, play(groups, (one, another), loads), strict=True))
            shares[pair].append(share(rates[on], rates[off]))
    return [of_pair[2:] for of_pair in shares]


def read(pairs: Sequence[tuple[Server, Server]], tokens: int, rounds: int) -> list[list[float]]:
    """Of each pair and round of three prompts, how fast the one server reads over the other. A
    round of each pair before them warms up."""
    shares: list[list[float]] = [[] for _ in pairs]
    seeds = itertools.count()
    for (on, off), of_pair in zip(pairs, shares, strict=True):
        servers = itertools.cycle((off, on))
        for number in range(1 + rounds):
            before, between, after = (next(servers).read(tokens, next(seeds)) for _ in range(3))
            around = (before + after) / 2
            of_pair.append(share(around, between) if number % 2 else share(between, around))
    return [of_pair[1:] for of_pair in shares]


def share(on: float, off: float) -> float:
    """One rate over the other."""
    say(f"{on:,.0f} against {off:,.0f} tokens/s: {on / off:.4f}")
    return on / off


def rows_of(work: str, shares: list[list[float]]) -> list[Row]:
    """What the rounds of each pair come to, and how far that may be wrong."""
    medians = [statistics.median(of_pair) for of_pair in shares]
    wrong = error(list(itertools.chain(*shares)))
    if len(medians) > 1:
        wrong = max(wrong, statistics.stdev(medians) / math.sqrt(len(medians)))
    work += ", caching on and never hit, over off"
    value = statistics.mean(medians)
    return [
        Row(work=work, value=value, unit="x", better="higher", goal=0.98),
        Row(work=f"{work}: standard error", value=wrong, unit="x", better="lower"),
    ]


def error(values: list[float]) -> float:
    """The standard error of their median, were they normal: the middle half is 1.35 standard
    deviations wide then, and a median errs 1.25 times as much as a mean."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return 1.25 * (high - low) / 1.35 / math.sqrt(len(values))


def costs(pairs: Sequence[tuple[Server, Server]], tokens: int, rounds: int) -> list[Row]:
    """Decoding and reading with caching on and never hit, against caching off; so many rounds of
    each pair, half as many of reading."""
    least, most = DECODED - SPREAD, DECODED + SPREAD
    work = f"decode, {DECODERS} concurrent x {least} to {most} tokens"
    rows = rows_of(work, decoded(pairs, rounds))
    rows += rows_of(f"prefill of {tokens:,} tokens", read(pairs, tokens, -(-rounds // 2)))
    for on, _ in pairs:
        if any(on.hits().values()):
            raise RuntimeError(f"states were found, none is due: {on.hits()}")
    return rows


def started(stacks: list[ExitStack], settings: list[Settings]) -> list[Server]:
    """Servers of these settings, started together; each ends with its stack."""

    def start(stack: ExitStack, one: Settings) -> Server:
        return Server(*stack.enter_context(launched(one, apart=True)))

    with ThreadPoolExecutor(len(settings)) as pool:
        return list(pool.map(start, stacks, settings))


def main() -> None:
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--model", default="recall")
    add("--shape", choices=sorted(path.name for path in SHAPES.iterdir()), help="random weights")
    add("--tokens", type=int, default=1_000_000 if cuda else 20_000, help="of the context")
    add("--pairs", type=int, default=PAIRS, help="of servers with and without caching")
    add("--rounds", type=int, default=ROUNDS, help="of each pair, at least 3")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # and the servers end as well
    model = str(SHAPES / options.shape) if options.shape else options.model
    name, tokens = options.shape or options.model, options.tokens
    with ExitStack() as stack:
        usual = stack.enter_context(checkpoint(model))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kinds: dict[str, Any] = {} if cuda else {"dtype": "float32", "ring": 0}
        slot = footprint(Fields.read(usual.model_path), **kinds).slot
        room = 2 * ROOM * slot + 8 * 4 * tokens  # a few of them have all the tokens

        def settings(**fields: Any) -> Settings:
            return Settings(**usual.model_dump() | {"port": 0, "log_level": "warning"} | fields)

        files = settings(max_running=SLOTS, context_directory=directory, host_cache_gb=room / 1e9)
        on = settings(max_running=DECODERS, host_cache_gb=4 * DECODERS * slot / 1e9)
        off = settings(max_running=DECODERS, prefix_caching=False)
        all_of_them = [files, *[on, off] * options.pairs]
        stacks = [stack.enter_context(ExitStack()) for _ in all_of_them]
        with_files, *others = started(stacks, all_of_them)
        pairs = list(zip(others[::2], others[1::2], strict=True))
        say("servers are up")
        rows = tiers(with_files, tokens, directory, beyond=-(-room // slot) + 2 * SLOTS)
        stacks[0].close()
        write("contexts", rows, model=name, missing=["what caching costs"])
        rows += costs(pairs, max(1000, tokens // 4), options.rounds)
    say("done")
    write("contexts", rows, model=name)


if __name__ == "__main__":
    main()
