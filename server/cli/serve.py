"""`steadystate serve`: the HTTP server in this process, the engine in a child of it. With several
API processes these are children too, and this process looks after them.

Exit codes: 0 after SIGTERM or SIGINT, once running requests have ended or were ended; 1 when the
engine could not start or died, or one of several API processes did; 2 for settings that make no
sense.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
from functools import partial
from typing import Any

from server.cli.flags import FLAG_PREFIX, add_flags, settings_of
from server.settings import Settings

BACKLOG = 2048


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
    from server.cli.supervisor import supervise
    from server.logs import configure, log

    configure(settings.log_level)
    try:
        listeners = _listeners(settings.host, settings.port, settings.api_workers)
    except OSError as error:
        print(f"cannot listen on {settings.host}:{settings.port}: {error}", file=sys.stderr)
        return 1
    port = listeners[0].getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{port}"
    log.info("listening", extra={"fields": {"url": url, "port": port}})
    if settings.api_workers > 1:
        return asyncio.run(supervise(settings, listeners, url, command))

    from server.api.client import EngineClient
    from server.api.draining import DrainingServer
    from server.api.service import Service

    service = Service(settings, partial(EngineClient.start, command=command))
    return DrainingServer(service, url).run_on(listeners[0])


def _listeners(host: str, port: int, count: int) -> list[socket.socket]:
    """A socket for each API process, among which the system spreads connections (Linux), or one
    that all share."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The first attempt fails if anybody listens there, which sockets that may share do not.
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listeners = [listener] * count
    if count > 1 and sys.platform == "linux":
        port = listener.getsockname()[1]
        listener.close()
        listeners = [
            socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=True)
            for _ in range(count)
        ]
    for listener in listeners:
        listener.setblocking(False)
    return listeners
