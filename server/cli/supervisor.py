"""The process that looks after the engine and several API processes, and does nothing else.

They share a directory: the engine's sockets, the ledger of what runs and waits, metrics. Whichever
of them dies takes the others along, after their last words, and the exit code is 1: requests of a
dead API process would go on for nobody, and counts that bounds rely on would be wrong. Whatever
runs this server starts it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path

import msgspec

from server.api.fetch import fetch
from server.api.launch import end, launch, new_directory, python
from server.api.ledger import Ledger
from server.engine.line import LEDGER, METRICS
from server.logs import log
from server.settings import Settings

GRACE_SECONDS = 15.0  # until API processes that were told that it is over are killed


async def supervise(
    settings: Settings,
    listeners: Sequence[socket.socket],
    url: str,
    command: list[str] | None = None,
) -> int:
    """Serve until told to stop or one of the processes dies; the exit code."""
    directory = new_directory()
    try:
        Ledger.create(directory / LEDGER, len(listeners))
        (directory / METRICS).mkdir()
        return await Supervisor(settings, directory, command).run(listeners, url)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Supervisor:
    """Starts them, passes signals on, notices who ends."""

    def __init__(self, settings: Settings, directory: Path, command: list[str] | None) -> None:
        self._settings = settings
        self._directory = directory
        self._command = command
        self._workers: list[Process] = []
        self._engine: Process | None = None
        self._stopping = False  # told to
        self._failure: str | None = None

    async def run(self, listeners: Sequence[socket.socket], url: str) -> int:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self._stop)
        engine = asyncio.create_task(self._run_engine(), name="engine")
        try:
            for number, listener in enumerate(listeners):
                self._workers.append(await self._start(number, listener, url))
            for listener in listeners:
                listener.close()  # else connections would wait for nobody once a worker has ended
            await asyncio.gather(*(self._watch(n, w) for n, w in enumerate(self._workers)))
        finally:
            for worker in self._workers:
                if worker.returncode is None:
                    worker.kill()
            engine.cancel()
            await asyncio.wait((engine,))
            if self._engine is not None:
                await end(self._engine)
        return 1 if self._failure else 0

    async def _start(self, number: int, listener: socket.socket, url: str) -> Process:
        descriptor = listener.fileno()
        worker = await asyncio.create_subprocess_exec(
            *(*python(), "-m", "server.api", "--directory", str(self._directory)),
            *("--worker", str(number), "--listener", str(descriptor), "--url", url),
            stdin=PIPE,
            pass_fds=(descriptor,),
            start_new_session=True,  # a Ctrl-C is passed on, and so counts once
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(self._directory / METRICS)},
        )
        assert worker.stdin is not None
        worker.stdin.write(self._settings.model_dump_json().encode() + b"\n")
        return worker

    async def _run_engine(self) -> None:
        """Fetch the checkpoint where that is due, start the engine, and wait for its end."""
        settings = self._settings
        try:
            if settings.hub_id is not None:
                path = str(await fetch(settings))
                settings = settings.model_copy(update={"model": path, "revision": None})
                self._tell(model=path)
            if not settings.model_path.is_dir():
                raise ValueError(f"model: no checkpoint directory at {str(settings.model_path)!r}")
            self._engine = await launch(settings, self._directory, self._command)
        except (OSError, ValueError) as error:
            self._fail(f"start-up failed: {error}")
            return
        code = await self._engine.wait()
        self._fail(f"the engine process ended with exit code {code}")

    async def _watch(self, number: int, worker: Process) -> None:
        code = await worker.wait()
        if not self._stopping or code not in (0, -signal.SIGTERM):  # it may have been early
            self._fail(f"API process {number} ended with exit code {code}")

    def _stop(self) -> None:
        """A first signal drains, a second one ends what still runs."""
        self._stopping = True
        for worker in self._workers:
            if worker.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.terminate()

    def _fail(self, why: str) -> None:
        if self._failure is not None:
            return
        self._failure = why
        log.critical(why)
        self._tell(over=why)
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._kill)

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    worker.kill()

    def _tell(self, **news: str) -> None:
        for worker in self._workers:
            if worker.returncode is None and worker.stdin is not None:
                worker.stdin.write(msgspec.json.encode(news) + b"\n")
