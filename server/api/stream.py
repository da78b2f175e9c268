"""Server-sent events: frames, errors inside a stream, [DONE], comments while nothing is said."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.generate import Generation
from server.api.logs import Record, log
from server.errors import SteadystateError

DONE = b"data: [DONE]\n\n"


class JSON(Response):
    """A body of plain values."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return msgspec.json.encode(content)


class EventStream(EventSourceResponse):
    """Frames, and a comment every keepalive_seconds. The generation ends with it in any case."""

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
            ping_message_factory=lambda: ServerSentEvent(comment="keep-alive", sep="\n"),
        )
        self._generation = generation
        record.stream = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


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
