"""The outermost layer of every request: id, key, readiness, body bound, last error, log line."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.limits import Keys
from server.api.logs import Record
from server.api.registry import owner_of
from server.api.service import SHUTTING_DOWN, Service
from server.errors import AuthenticationError, EngineDeadError, SteadystateError, TooLargeError
from server.logs import log

OPEN = frozenset({"/health"})  # needs no key
ALWAYS = OPEN | {"/metrics", "/version"}  # answers whether or not the engine is ready
CLIENT_CLOSED = 499  # logged for a client that left; never sent
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Gate:
    """ASGI middleware. A request that passes it is counted in service.active until it ends."""

    def __init__(self, app: ASGIApp, *, service: Service) -> None:
        self.app = app
        self.service = service
        self.keys = Keys(service.settings.keys)
        self.max_body_bytes = service.settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = Record(_request_id(headers), scope["method"], scope["path"])
        scope.setdefault("state", {})["record"] = record

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            await self._pass(scope, self._bounded(receive), send_marked, record)
        except ClientDisconnect:
            record.status = CLIENT_CLOSED
        except asyncio.CancelledError:  # the server ends, and waits no longer
            record.error = "cancelled"
            if record.status is not None:
                raise
            await respond(send_marked, EngineDeadError(SHUTTING_DOWN))
        except Exception as error:
            record.error = repr(error)
            log.exception("request %s failed", record.request_id)
            if record.status is None:
                await respond(send_marked, SteadystateError("internal error"))
        finally:
            quiet = record.path in ALWAYS and record.status in (200, 503)
            log.log(
                logging.DEBUG if quiet else logging.INFO,
                "request",
                extra={"fields": record.fields()},
            )

    async def _pass(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        headers, path = Headers(scope=scope), record.path
        try:
            key = _key(headers)
            if path not in OPEN and not self.keys.accept(key):
                raise AuthenticationError("missing or wrong API key")
            scope["state"]["owner"] = owner_of(key) if self.keys else ""
            if path not in ALWAYS:
                self.service.check()
            declared = headers.get("content-length", "")
            if declared.isdecimal() and int(declared) > 2 * self.max_body_bytes:
                raise self._too_large(f"{int(declared)} bytes")
        except SteadystateError as error:
            record.error = error.message
            await respond(send, error)
            return
        if path in ALWAYS:
            await self.app(scope, receive, send)
            return
        self.service.active += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.service.active -= 1

    def _bounded(self, receive: Receive) -> Receive:
        """Count the body as it comes. Too much of it is read on for a while and thrown away, so
        that a client that is still sending gets to see the answer."""
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self.max_body_bytes:
                    while message.get("more_body") and size <= 2 * self.max_body_bytes:
                        message = await receive()
                        size += len(message.get("body", b""))
                    raise self._too_large(f"at least {size} bytes")
            return message

        return bounded

    def _too_large(self, got: str) -> TooLargeError:
        limit = self.max_body_bytes
        return TooLargeError(f"the body is larger than max_body_bytes = {limit}, got {got}")


async def respond(send: Send, error: SteadystateError) -> None:
    """Answer with an error and close the connection, for the body may be unread."""
    body = msgspec.json.encode(error.body())
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **error_headers(error),
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def error_headers(error: SteadystateError) -> dict[str, str]:
    """Headers that go with an error: when to come again, how to authenticate."""
    if isinstance(error, AuthenticationError):
        return {"www-authenticate": "Bearer"}
    if error.status in (429, 503):
        return {"retry-after": str(getattr(error, "retry_after", 1))}
    return {}


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
