"""An HTTP server that ends by itself, and not before those that it serves are done."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import time
from types import FrameType

import uvicorn

from server import __version__
from server.api.app import create_app
from server.api.service import Service

LAST_WORDS_SECONDS = 2.0  # for errors to reach their clients before the process ends


class DrainingServer(uvicorn.Server):
    """Ends by itself when the service has failed, or when it was told to and nothing runs any more.

    A first SIGTERM or SIGINT drains: the port stays open, new requests are refused and running
    ones may take drain_seconds. After that, or at a second signal, those that still run end with
    an error, for which there are LAST_WORDS_SECONDS.
    """

    def __init__(self, service: Service, url: str, *, announce: bool = True) -> None:
        config = uvicorn.Config(
            create_app(service),
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=round(LAST_WORDS_SECONDS),
        )
        super().__init__(config)
        self._service = service
        self._url = url
        self._announces = announce
        self._ready = False
        self._begun = time.monotonic()
        self._signals = 0
        self._deadline: float | None = None  # of draining
        self._end: float | None = None  # of last words

    def run_on(self, listener: socket.socket) -> int:
        """Serve until told to stop or the service has failed; the exit code."""
        with asyncio.Runner(loop_factory=self.config.get_loop_factory()) as runner:
            runner.run(self.serve(sockets=[listener]))
        return 1 if self._service.failure else 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count a signal; on_tick acts on it."""
        self._signals += 1
        if self._signals > 1 and sig == signal.SIGINT:
            self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end now."""
        await super().on_tick(counter)
        service, now = self._service, time.monotonic()
        if service.state == "ready" and not self._ready:
            self._ready = True
            gc.collect()
            gc.freeze()  # what was loaded stays: to walk it again would hold up every stream
            if self._announces:
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
            f"ready after {time.monotonic() - self._begun:.1f} s ({_phases(service)})"
            + ("" if settings.keys or settings.host in ("127.0.0.1", "localhost", "::1")
               else "; open to all: there is no API key"),
            flush=True,
        )  # fmt: skip


def _phases(service: Service) -> str:
    """What the engine's start took, by phase."""
    seconds = service.client.seconds.items()
    return ", ".join(f"{phase} {value:.1f}" for phase, value in seconds)
