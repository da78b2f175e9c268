"""The engine's line to an API process: messages in, messages out, over ZeroMQ ipc sockets."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import zmq

from server.protocol import FromEngine

LINGER_MS = 1000  # how long the last messages may take to leave when the engine ends


class Line:
    """Binds DIRECTORY/inbox, connects DIRECTORY/outbox; never drops a message."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._context = zmq.Context(1)
        self._context.linger = LINGER_MS
        self._inbox = self._socket(zmq.PULL)
        self._inbox.bind(address(directory, "inbox"))
        self._outbox = self._socket(zmq.PUSH)
        self._outbox.connect(address(directory, "outbox"))
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
        self._outbox.send(self._encoder.encode(message))

    def close(self) -> None:
        """Let the last messages leave, then free the sockets."""
        self._context.destroy()

    def remove(self) -> None:
        """Remove the sockets' files, and their directory if nothing else is in it."""
        for name in ("inbox", "outbox"):
            (self._directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        return socket


def address(directory: Path, name: str) -> str:
    """Where the sockets of an engine lie."""
    return f"ipc://{directory / name}"
