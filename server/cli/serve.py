"""`steadystate serve`: the HTTP server in this process, the engine in a child of it.

Exit codes: 0 after SIGTERM or SIGINT, once running requests have ended or were ended; 1 when the
engine could not start or died; 2 for settings that make no sense.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
import time
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from server import __version__
from server.cli.flags import FLAG_PREFIX, add_flags, settings_of
from server.settings import Settings

if TYPE_CHECKING:
    from server.api.service import Service

LAST_WORDS_SECONDS = 2.0  # for errors to reach their clients before the process ends


def add_parser(commands: Any) -> None:
    """Add this command to the console script."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP, with OpenAI's API.",
    )
    parser.add_argument(
        "path",
        metavar="MODEL",
        nargs="?",
        help="checkpoint directory, name of a bundled model, or id on the hub; as --model",
    )
    add_flags(parser)
    parser.set_defaults(run=lambda arguments: _command(parser, arguments))


def _command(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    given = {}
    if arguments.path is not None:
        if hasattr(arguments, FLAG_PREFIX + "model"):
            parser.error("MODEL and --model are the same: give one of them")
        given["model"] = arguments.path
    try:
        settings = settings_of(arguments, **given)
    except ValueError as error:
        parser.error(str(error))
    return run(settings)


def run(settings: Settings, command: list[str] | None = None) -> int:
    """Serve until told to stop, and return the exit code. `command` replaces the engine's."""
    # Imported here so that --help does not wait for the tokenizer libraries.
    from server.api.app import create_app
    from server.api.client import EngineClient
    from server.api.service import Service
    from server.logs import configure, log

    configure(settings.log_level)
    try:
        listener = _listen(settings.host, settings.port)
    except OSError as error:
        print(f"cannot listen on {settings.host}:{settings.port}: {error}", file=sys.stderr)
        return 1
    port = listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}"
    log.info("listening", extra={"fields": {"url": url, "port": port}})

    service = Service(settings, partial(EngineClient.start, command=command))
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=round(LAST_WORDS_SECONDS),
    )
    server = DrainingServer(config, service, url)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(server.serve(sockets=[listener]))
    return 1 if service.failure else 0


class DrainingServer(uvicorn.Server):
    """Ends by itself when the service has failed, or when it was told to and nothing runs any more.

    A first SIGTERM or SIGINT drains: the port stays open, new requests are refused and running
    ones may take drain_seconds. After that, or at a second signal, those that still run end with
    an error, for which there are LAST_WORDS_SECONDS.
    """

    def __init__(self, config: uvicorn.Config, service: Service, url: str) -> None:
        super().__init__(config)
        self._service = service
        self._url = url
        self._announced = False
        self._begun = time.monotonic()
        self._signals = 0
        self._deadline: float | None = None  # of draining
        self._end: float | None = None  # of last words

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count a signal; on_tick acts on it."""
        self._signals += 1
        if self._signals > 1 and sig == signal.SIGINT:
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end now."""
        await super().on_tick(counter)
        service, now = self._service, time.monotonic()
        if service.state == "ready" and not self._announced:
            self._announced = True
            self._announce()
        if self._signals and self._deadline is None:
            service.drain()
            self._deadline = now + service.settings.drain_seconds
        overdue = self._deadline is not None and (now >= self._deadline or self._signals > 1)
        if self._end is None and (overdue or service.failure is not None):
            service.abandon()
            self._end = now + LAST_WORDS_SECONDS
        ending = self._deadline is not None or self._end is not None
        if (ending and service.active == 0) or (self._end is not None and now >= self._end):
            self.should_exit = True
        return self.should_exit

    def _announce(self) -> None:
        service = self._service
        capacity, settings = service.capacity, service.settings
        print(
            f"steadystate {__version__} serves {service.model_id} at {self._url} on "
            f"{capacity.device}: {capacity.slots} slots of {capacity.state_bytes / 1e6:.3g} MB, "
            f"max_model_len {capacity.max_model_len or 'unbounded'}, "
            f"ready after {time.monotonic() - self._begun:.1f} s"
            + ("" if settings.keys or settings.host in ("127.0.0.1", "localhost", "::1")
               else "; open to all: there is no API key"),
            flush=True,
        )  # fmt: skip


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=2048)
    listener.setblocking(False)
    return listener
