"""Load on a server: streams of /v1/completions as they come, by raw sockets on uvloop.

    python -m benchmarks.load     one process of clients

It reads a load, a line of JSON, prepares its requests and says that it is ready. All begin together
at the time that it reads then, and a line of JSON tells what happened; then it reads the next load.
In a closed loop each of `streams` sends its next request when its last one has ended; in an open
one requests come when they are due, whatever became of those before. Times are time.monotonic().
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Self
from urllib.parse import urlsplit

import uvloop

STARTING_SECONDS = 0.1  # for all processes to hear when they begin
READY = "ready"
LENGTH = re.compile(rb"content-length: *(\d+).*?\r\n\r\n", re.IGNORECASE | re.DOTALL)


@dataclass(slots=True, kw_only=True)
class Load:
    """What one process of clients sends. `dues`: when requests come in an open loop, in seconds
    after the beginning; empty: a closed loop. With a `spread` a stream's requests have in turn more
    and fewer tokens, by up to so many, each stream by another number: they end one by one, and
    after an even number of requests all streams end together. `whole`: answers are not streamed.
    """

    url: str
    streams: int
    requests: int  # of each stream
    prompt: int
    tokens: int
    vocab: int
    seed: int = 0
    dues: list[float] = field(default_factory=list)
    spread: int = 0
    whole: bool = False


@dataclass(slots=True)
class Reply:
    """When a request was due and sent, when each of its frames came, how many bytes it had. An
    answer in one piece is one frame."""

    due: float
    sent: float
    frames: list[float] = field(default_factory=list)
    size: int = 0
    error: str = ""


class Stream(asyncio.Protocol):
    """A connection that is kept, with one request at a time."""

    def __init__(self) -> None:
        self.reply: Reply | None = None
        self.done: asyncio.Future[None] | None = None
        self._head = b""  # of an answer, as far as it has come
        self._tail = b""
        self._whole = 0  # bytes of an answer that says how long it is
        self._transport: asyncio.Transport

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._end("the connection was lost")

    def send(self, data: bytes, due: float) -> asyncio.Future[None]:
        self.done = asyncio.get_running_loop().create_future()
        self.reply = Reply(due, time.monotonic())
        self._head = self._tail = b""
        self._transport.write(data)
        return self.done

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        reply = self.reply
        if reply is None:
            return
        if not reply.size:
            data = self._head + data
            self._head = b"" if b"\r\n\r\n" in data else data
            if self._head:
                return  # more of it comes
            if not data.startswith(b"HTTP/1.1 200"):
                self._end(data[:2000].decode(errors="replace"))
                return
            head = LENGTH.search(data)
            self._whole = head.end() + int(head[1]) if head else 0
        reply.size += len(data)
        if self._whole:
            if reply.size >= self._whole:
                reply.frames.append(time.monotonic())
                self._end("")
            return
        frames = data.count(b"data: {")
        if frames:
            reply.frames += [time.monotonic()] * frames
        window = self._tail + data[-64:]
        self._tail = data[-64:]
        if b'data: {"error"' in data:
            self._end(data.decode(errors="replace"))
        elif window.endswith(b"0\r\n\r\n"):
            self._end("")

    def _end(self, error: str) -> None:
        if self.done is not None and not self.done.done():
            assert self.reply is not None
            self.reply.error = error
            self.done.set_result(None)


def drawn(rng: random.Random, count: int, vocab: int) -> list[int]:
    """Ids of a prompt; letters of a model of bytes."""
    low, high = (256, vocab) if vocab > 1000 else (97, 123)
    return [rng.randrange(low, high) for _ in range(count)]


def lengths(load: Load, stream: int) -> list[int]:
    """Tokens of each request of a stream of a closed loop."""
    more = round(load.spread * (2 * stream / max(1, load.streams - 1) - 1))
    return [load.tokens + (-more if number % 2 else more) for number in range(load.requests)]


def completion(
    host: str, rng: random.Random, prompt: int, tokens: int, vocab: int, *, whole: bool = False
) -> bytes:
    """A request for so many tokens behind a prompt of drawn ids, as it is sent; the answer comes
    streamed, or whole."""
    body = {
        "prompt": drawn(rng, prompt, vocab),
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 1.0,
        "seed": rng.randrange(2**31),
        "stream": not whole,
    }
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def play(load: Load) -> list[Reply]:
    """Prepare it, wait for the word, send it all and gather the replies."""
    parts = urlsplit(load.url)
    rng = random.Random(load.seed)
    loop = asyncio.get_running_loop()
    replies: list[Reply] = []

    def requests(counts: Iterable[int]) -> list[bytes]:
        return [
            completion(parts.netloc, rng, load.prompt, tokens, load.vocab, whole=load.whole)
            for tokens in counts
        ]

    async def connect() -> Stream:
        _, stream = await loop.create_connection(Stream, parts.hostname, parts.port)
        return stream

    async def ask(stream: Stream, data: bytes, due: float) -> None:
        await stream.send(data, due)
        assert stream.reply is not None
        replies.append(stream.reply)

    async def closed(stream: Stream, own: list[bytes], begin: float) -> None:
        await asyncio.sleep(begin - time.monotonic())
        for data in own:
            await ask(stream, data, time.monotonic())
        stream.close()

    async def opened(data: bytes, due: float) -> None:
        await asyncio.sleep(due - time.monotonic())
        stream = await connect()
        await ask(stream, data, due)
        stream.close()  # else there are as many as there were requests

    if load.dues:
        datas = requests([load.tokens] * len(load.dues))
        begin = await asyncio.to_thread(_agreed)
        dues = (begin + due for due in load.dues)
        await asyncio.gather(*map(opened, datas, dues))
    else:
        works = [(await connect(), requests(lengths(load, n))) for n in range(load.streams)]
        begin = await asyncio.to_thread(_agreed)
        await asyncio.gather(*(closed(*work, begin) for work in works))
    return replies


def _agreed() -> float:
    """Say that this process is ready; when all begin."""
    gc.collect()
    gc.freeze()  # else to walk what was prepared makes gaps of its own
    print(READY, flush=True)
    return float(sys.stdin.readline())


class Clients:
    """Processes of clients that play one load after another, shared among them."""

    def __init__(self, processes: int) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.load"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for _ in range(processes)
        ]  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()  # nothing more is asked: it ends
            process.stdout.close()
            process.wait()

    def run(self, load: Load) -> list[Reply]:
        """All that came of a load. RuntimeError: a request failed."""
        count, playing = len(self._processes), []
        for number, process in enumerate(self._processes):
            share = asdict(load) | {
                "streams": len(range(number, load.streams, count)),
                "dues": load.dues[number::count],
                "seed": load.seed * 1000 + number,
            }
            if share["dues"] or (share["streams"] and not load.dues):
                _tell(process, json.dumps(share))
                playing.append(process)
        for process in playing:
            if _heard(process).strip() != READY:
                raise RuntimeError("a client did not get ready")
        begin = time.monotonic() + STARTING_SECONDS
        for process in playing:
            _tell(process, str(begin))
        replies = [Reply(**reply) for process in playing for reply in json.loads(_heard(process))]
        errors = [reply.error for reply in replies if reply.error]
        if errors:
            raise RuntimeError(f"{len(errors)} of {len(replies)} requests failed: {errors[0]}")
        return replies


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a client ended with exit code {process.wait()}")
    return line


def run(load: Load, processes: int) -> list[Reply]:
    """One load by so many processes of clients."""
    with Clients(processes) as clients:
        return clients.run(load)


def allow_files() -> None:
    """Let this process and those that it starts have as many connections as there may be."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _write(line: str) -> None:
    """To standard output, all of it: where that is not buffered, print() loses what a pipe does not
    take at once."""
    rest = memoryview(f"{line}\n".encode())
    while rest:
        rest = rest[os.write(sys.stdout.fileno(), rest) :]


def main() -> None:
    while line := sys.stdin.readline():
        replies = uvloop.run(play(Load(**json.loads(line))))
        _write(json.dumps([asdict(reply) for reply in replies]))


if __name__ == "__main__":
    main()
