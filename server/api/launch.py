"""Processes of the server: the engine's is started with settings on its stdin, ended by signals."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import zmq

from server.settings import Settings

log = logging.getLogger(__name__)

TERM_SECONDS = 5.0  # how long the engine may take to obey SIGTERM


def python() -> list[str]:
    """This interpreter for a process of the server. It imports nothing out of the directory where
    the server was started, unless the server itself lies there."""
    at_home = Path(__file__).resolve().parents[2] == Path.cwd()
    return [sys.executable] if at_home else [sys.executable, "-P"]


async def launch(settings: Settings, directory: Path, command: list[str] | None = None) -> Process:
    """Start the engine process, whose sockets will lie in the directory."""
    command = command or [*python(), "-m", "server.engine"]
    process = await asyncio.create_subprocess_exec(
        *command, "--directory", str(directory), stdin=PIPE
    )
    assert process.stdin is not None
    public = settings.keyless.model_copy(update={"hub_token": None})  # it needs no secret
    process.stdin.write(public.model_dump_json().encode())
    process.stdin.close()  # after what was written
    return process


async def end(process: Process) -> None:
    """End the engine process: SIGTERM, then SIGKILL."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), TERM_SECONDS)
    except TimeoutError:
        log.warning("the engine did not obey SIGTERM for %g s: killing it", TERM_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def new_directory() -> Path:
    """A directory of mode 0700 for the sockets, under /tmp where their paths would be too long."""
    parent = tempfile.gettempdir()
    length = len(os.fsencode(parent)) + len("/steadystate-12345678/outbox-63")
    if length > zmq.IPC_PATH_MAX_LEN and os.path.isdir("/tmp"):
        parent = "/tmp"
    return Path(tempfile.mkdtemp(prefix="steadystate-", dir=parent))
