"""What clients send, and how they see that an answer has come."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

from benchmarks.load import Load, Stream, _heard, lengths


class Transport:
    def write(self, data: bytes) -> None:
        self.data = data


def test_streams_of_a_spread_end_one_by_one_and_then_together() -> None:
    load = Load(url="", streams=5, requests=4, prompt=1, tokens=10, spread=4, vocab=97)
    found = [lengths(load, stream) for stream in range(5)]
    assert found[0] == [6, 14, 6, 14] and found[2] == [10] * 4
    assert [own[0] for own in found] == [6, 8, 10, 12, 14]
    assert all(sum(own) == 40 for own in found)


def test_more_than_a_pipe_holds_is_heard_whole() -> None:
    """Whether a client's output is buffered or not."""
    code = "from benchmarks.load import _write; _write('x' * 300_000)"
    for unbuffered in ("", "1"):
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert _heard(process) == "x" * 300_000 + "\n"
        assert process.wait() == 0


def test_an_answer_in_one_piece_ends_where_it_says() -> None:
    async def see(*pieces: bytes) -> list[bool]:
        stream, seen = Stream(), []
        stream.connection_made(Transport())
        for _ in range(2):  # a connection is kept
            done = stream.send(b"", 0.0)
            for piece in pieces:
                stream.data_received(piece)
                seen.append(done.done())
            assert stream.reply is not None and not stream.reply.error
            assert len(stream.reply.frames) == done.done()
        return seen

    head = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nserver: x\r\n\r\n"
    assert asyncio.run(see(head, b"0123", b"456789")) == [False, False, True] * 2
    assert asyncio.run(see(head + b"0123456789")) == [True] * 2
    assert asyncio.run(see(head[:30], head[30:], b"0123456789")) == [False, False, True] * 2
    assert asyncio.run(see(head + b"012345678")) == [False] * 2
