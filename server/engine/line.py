"""The engine's lines to the API processes: messages in, messages out, over ZeroMQ ipc sockets."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

import msgspec
import zmq

from server.protocol import FromEngine, Output, Reply, Step, worker_of

LINGER_MS = 1000  # how long the last messages may take to leave when the engine ends
GAUGES_SECONDS = 0.1  # how often those hear of gauges for whom a step has nothing else


LEDGER, METRICS = "ledger", "metrics"  # beside the sockets: what API processes share


class Line:
    """Binds DIRECTORY/inbox, connects DIRECTORY/outbox-0, -1 ...; never drops a message.

    Outputs go to the process whose request they are of. The first process gets every Step, and so
    can count them; the others those with news for them.
    """

    def __init__(self, directory: Path, workers: int = 1) -> None:
        self._directory = directory
        self._workers = workers
        self._told = [0.0] * workers  # when each was sent gauges last
        self._context = zmq.Context(1)
        self._context.linger = LINGER_MS
        self._inbox = self._socket(zmq.PULL)
        self._inbox.bind(address(directory, "inbox"))
        self._outboxes = [self._socket(zmq.PUSH) for _ in range(workers)]
        for worker, outbox in enumerate(self._outboxes):
            outbox.connect(address(directory, outbox_name(worker)))
        self._encoder = msgspec.msgpack.Encoder()

    def receive(self, timeout: float) -> list[bytes]:
        """All that has arrived; waits up to `timeout` seconds for the first."""
        messages: list[bytes] = []
        if self._inbox.poll(int(timeout * 1000)):
            try:
                while True:
                    messages.append(self._inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                pass
        return messages

    def send(self, message: FromEngine) -> None:
        """Queue a message; never blocks."""
        if self._workers == 1:
            self._outboxes[0].send(self._encoder.encode(message))
        elif isinstance(message, Step):
            self._send_shares(message)
        elif isinstance(message, Reply):
            worker = worker_of(message.id, self._workers)
            self._outboxes[worker].send(self._encoder.encode(message))
        else:
            for outbox in self._outboxes:
                outbox.send(self._encoder.encode(message))

    def _send_shares(self, step: Step) -> None:
        shares: list[list[Output]] = [[] for _ in range(self._workers)]
        for output in step.outputs:
            shares[worker_of(output.id, self._workers)].append(output)
        now = time.monotonic()
        idle = not (step.stats.running or step.stats.waiting)
        for worker, outputs in enumerate(shares):
            stale = idle or now - self._told[worker] >= GAUGES_SECONDS
            if outputs or worker == 0 or stale:
                self._told[worker] = now
                share = Step(outputs=outputs, stats=step.stats)
                self._outboxes[worker].send(self._encoder.encode(share))

    def close(self) -> None:
        """Let the last messages leave, then free the sockets."""
        self._context.destroy()

    def remove(self) -> None:
        """Remove what the processes share, and its directory if nothing else is in it."""
        for name in ("inbox", LEDGER, *map(outbox_name, range(self._workers))):
            (self._directory / name).unlink(missing_ok=True)
        shutil.rmtree(self._directory / METRICS, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        return socket


def outbox_name(worker: int) -> str:
    """The socket on which an API process listens."""
    return f"outbox-{worker}"


def address(directory: Path, name: str) -> str:
    """Where the sockets of an engine lie."""
    return f"ipc://{directory / name}"
