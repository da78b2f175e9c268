"""Load on a server: streams of /v1/completions as they come, by raw sockets on uvloop.

    python -m benchmarks.load     one process of clients

It reads a load, a line of JSON, prepares its requests and says that it is ready. All begin together
at the time that it reads then, and a line of JSON tells what happened. In a closed loop each of
`streams` sends its next request when its last one has ended; in an open one requests come when they
are due, whatever became of those before. Times are time.monotonic().
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import uvloop

STARTING_SECONDS = 0.1  # for all processes to hear when they begin
READY = "ready"


@dataclass(slots=True, kw_only=True)
class Load:
    """What one process of clients sends. `dues`: when requests come in an open loop, in seconds
    after the beginning; empty: a closed loop."""

    url: str
    streams: int
    requests: int  # of each stream
    prompt: int
    tokens: int
    vocab: int
    seed: int = 0
    dues: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Reply:
    """When a request was due and sent, when each of its frames came, how many bytes it had."""

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
        self._tail = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._end("the connection was lost")

    def send(self, data: bytes, due: float) -> asyncio.Future[None]:
        self.done = asyncio.get_running_loop().create_future()
        self.reply = Reply(due, time.monotonic())
        self._tail = b""
        self._transport.write(data)
        return self.done

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        reply = self.reply
        if reply is None:
            return
        if not reply.size and not data.startswith(b"HTTP/1.1 200"):
            self._end(data[:2000].decode(errors="replace"))
            return
        reply.size += len(data)
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


def streamed(host: str, rng: random.Random, prompt: int, tokens: int, vocab: int) -> bytes:
    """A request for so many tokens behind a prompt of drawn ids, as it is sent."""
    body = {
        "prompt": drawn(rng, prompt, vocab),
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 1.0,
        "seed": rng.randrange(2**31),
        "stream": True,
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

    def requests(count: int) -> list[bytes]:
        ask = (parts.netloc, rng, load.prompt, load.tokens, load.vocab)
        return [streamed(*ask) for _ in range(count)]

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
        datas = requests(len(load.dues))
        begin = await asyncio.to_thread(_agreed)
        dues = (begin + due for due in load.dues)
        await asyncio.gather(*map(opened, datas, dues))
    else:
        works = [(await connect(), requests(load.requests)) for _ in range(load.streams)]
        begin = await asyncio.to_thread(_agreed)
        await asyncio.gather(*(closed(*work, begin) for work in works))
    return replies


def _agreed() -> float:
    """Say that this process is ready; when all begin."""
    gc.collect()
    gc.freeze()  # else to walk what was prepared makes gaps of its own
    print(READY, flush=True)
    return float(sys.stdin.readline())


def run(load: Load, processes: int) -> list[Reply]:
    """The load, shared among processes of clients."""
    started: list[subprocess.Popen[str]] = []
    for number in range(processes):
        share = asdict(load) | {
            "streams": len(range(number, load.streams, processes)),
            "dues": load.dues[number::processes],
            "seed": load.seed * 1000 + number,
        }
        if not share["dues"] and (load.dues or not share["streams"]):
            continue
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(share) + "\n")
        process.stdin.flush()
        started.append(process)
    for process in started:
        assert process.stdout is not None
        if process.stdout.readline().strip() != READY:
            raise RuntimeError("a client did not get ready")
    begin = time.monotonic() + STARTING_SECONDS
    for process in started:
        assert process.stdin is not None
        process.stdin.write(f"{begin}\n")
        process.stdin.close()
    replies: list[Reply] = []
    for process in started:
        assert process.stdout is not None
        replies += [Reply(**reply) for reply in json.loads(process.stdout.read())]
        if process.wait():
            raise RuntimeError(f"a client ended with exit code {process.returncode}")
    errors = [reply.error for reply in replies if reply.error]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(replies)} requests failed: {errors[0]}")
    return replies


def allow_files() -> None:
    """Let this process and those that it starts have as many connections as there may be."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    load = Load(**json.loads(sys.stdin.readline()))
    replies = uvloop.run(play(load))
    json.dump([asdict(reply) for reply in replies], sys.stdout)


if __name__ == "__main__":
    main()
