"""A stream's frames, and comments where it is silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from server.api.generate import Generation
from server.api.logs import Record
from server.api.stream import DONE, KEEP_ALIVE, EventStream


def sent(pauses: list[float], keepalive_seconds: float) -> list[bytes]:
    """What a stream sends that pauses before each of its frames."""
    sent: list[bytes] = []

    async def frames() -> AsyncIterator[int]:
        for number, pause in enumerate(pauses):
            await asyncio.sleep(pause)
            yield number

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message.get("body"):
            sent.append(message["body"])

    record = Record("a", "POST", "/")
    stream = EventStream(
        frames(), Generation([], 1, record), record, keepalive_seconds=keepalive_seconds
    )
    asyncio.run(stream({"type": "http", "method": "POST"}, receive, send))
    return sent


def frame(number: int) -> bytes:
    return b"data: %d\n\n" % number


def test_a_busy_stream_has_no_comments() -> None:
    assert sent([0.03] * 30, 0.3) == [*(frame(number) for number in range(30)), DONE]


def test_each_silence_has_its_comments() -> None:
    first, *rest = sent([0.1, 1.0, 0.1], 0.4)
    assert first == frame(0)
    assert rest == [KEEP_ALIVE, KEEP_ALIVE, frame(1), frame(2), DONE]
