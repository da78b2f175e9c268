"""What clients send, and how they see that an answer has come."""

from __future__ import annotations

import asyncio

from benchmarks.load import Load, Stream, lengths


class Transport:
    def write(self, data: bytes) -> None:
        self.data = data


def test_streams_of_a_spread_end_one_by_one_and_then_together() -> None:
    load = Load(url="", streams=5, requests=4, prompt=1, tokens=10, spread=4, vocab=97)
    found = [lengths(load, stream) for stream in range(5)]
    assert found[0] == [6, 14, 6, 14] and found[2] == [10] * 4
    assert [own[0] for own in found] == [6, 8, 10, 12, 14]
    assert all(sum(own) == 40 for own in found)


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
    assert asyncio.run(see(head + b"012345678")) == [False] * 2
