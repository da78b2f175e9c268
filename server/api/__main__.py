"""python -m server.api --directory DIR --worker N --listener FD --url URL: one of several API
processes, which a supervisor starts.

On stdin come the settings, one line of JSON, and then the supervisor's news. That its end comes is
news too: then the supervisor is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from pathlib import Path

import msgspec

from server.api.client import EngineClient
from server.api.draining import DrainingServer
from server.api.service import Service
from server.logs import configure
from server.settings import Settings


class News(msgspec.Struct, omit_defaults=True):
    """From the supervisor: where the checkpoint lies, or that it is over."""

    model: str | None = None
    over: str | None = None


class Worker:
    """Where a service gets its checkpoint and its engine from when others look after both."""

    def __init__(self, directory: Path, number: int) -> None:
        self._directory = directory
        self._number = number
        self._path: asyncio.Future[Path] | None = None
        self._client: EngineClient | None = None
        self._over: str | None = None
        self._reader: asyncio.Task[None] | None = None

    async def fetch(self, settings: Settings) -> Path:
        """The directory with the checkpoint, once the supervisor has it."""
        return await self._known_path()

    async def join(self, settings: Settings) -> EngineClient:
        """The engine, which the supervisor starts."""
        self._known_path()
        self._client = await EngineClient.join(self._directory, self._number)
        if self._over is not None:
            self._client.bury(self._over)
        return self._client

    def _known_path(self) -> asyncio.Future[Path]:
        """Begin to listen to the supervisor."""
        if self._path is None:
            self._path = asyncio.get_running_loop().create_future()
            self._path.add_done_callback(lambda path: path.cancelled() or path.exception())
            self._reader = asyncio.create_task(self._listen(self._path), name="supervisor")
        return self._path

    async def _listen(self, path: asyncio.Future[Path]) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        while line := await reader.readline():
            news = msgspec.json.decode(line, type=News)
            if news.model is not None and not path.done():
                path.set_result(Path(news.model))
            if news.over is not None:
                self._end(path, news.over)
        self._end(path, "the supervisor is gone")

    def _end(self, path: asyncio.Future[Path], why: str) -> None:
        self._over = self._over or why
        if not path.done():
            path.set_exception(ValueError(why))
        if self._client is not None and not self._client.is_dead:
            self._client.bury(why)


def main() -> int:
    parser = argparse.ArgumentParser(prog="server.api", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--worker", type=int, required=True)
    parser.add_argument("--listener", type=int, required=True)
    parser.add_argument("--url", required=True)
    options = parser.parse_args()
    settings = Settings.model_validate_json(_line(0))
    configure(settings.log_level)
    worker = Worker(options.directory, options.worker)
    service = Service(settings, worker.join, fetch=worker.fetch)
    server = DrainingServer(service, options.url, announce=options.worker == 0)
    return server.run_on(socket.socket(fileno=options.listener))


def _line(descriptor: int) -> bytes:
    """A line, and not a byte beyond it."""
    line = bytearray()
    while (byte := os.read(descriptor, 1)) and byte != b"\n":
        line += byte
    return bytes(line)


if __name__ == "__main__":
    sys.exit(main())
