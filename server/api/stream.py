"""Server-sent events: frames, errors inside a stream, [DONE], comments while nothing is said."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from sse_starlette import EventSourceResponse
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.api.generate import Generation
from server.api.logs import Record
from server.errors import SteadystateError
from server.logs import log

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


class JSON(Response):
    """A body of plain values."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return msgspec.json.encode(content)


class EventStream(EventSourceResponse):
    """Frames, and a comment after keepalive_seconds of silence. The generation ends with it in any
    case."""

    def __init__(
        self,
        frames: AsyncIterator[object],
        generation: Generation,
        record: Record,
        *,
        keepalive_seconds: float,
    ) -> None:
        super().__init__(
            _events(frames, record),
            sep="\n",
            ping=keepalive_seconds,
            ping_message_factory=self._keep_alive,
        )
        self._generation = generation
        self._keepalive_seconds = keepalive_seconds
        self._spoken = time.monotonic()
        record.stream = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_noted(message: Message) -> None:
            if message.get("body"):
                self._spoken = time.monotonic()
            await send(message)

        try:
            await super().__call__(scope, receive, send_noted)
        finally:
            self._generation.close()

    def _keep_alive(self) -> Any:
        """Bytes: the comment if it is due, else none; the next ping comes when it may be."""
        left = self._spoken + self._keepalive_seconds - time.monotonic()
        self.ping_interval = left if left > 0 else self._keepalive_seconds
        return b"" if left > 0 else KEEP_ALIVE


async def _events(frames: AsyncIterator[object], record: Record) -> AsyncIterator[bytes]:
    """Frames as bytes. The status has been sent, so an error is a frame like any other."""
    try:
        async for frame in frames:
            yield b"data: " + msgspec.json.encode(frame) + b"\n\n"
    except SteadystateError as error:
        record.error = error.message
        yield b"data: " + msgspec.json.encode(error.body()) + b"\n\n"
    except Exception as error:
        record.error = repr(error)
        log.exception("request %s failed in its stream", record.request_id)
        body = SteadystateError("internal error").body()
        yield b"data: " + msgspec.json.encode(body) + b"\n\n"
    yield DONE
