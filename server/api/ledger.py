"""What every API process has waiting and running, in a file that all of them map.

A row a process, written by it alone; sums over the rows are of the whole server. Bounds that must
hold over all processes are checked and taken up under lock().
"""

from __future__ import annotations

import fcntl
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READY, RUNNING, REQUESTS, TOKENS = range(4)  # the numbers of a row, 64 bits each
ROW = 4


class Ledger:
    """One process's view of it."""

    def __init__(self, path: Path, worker: int) -> None:
        self._file = path.open("r+b")
        self._map = mmap.mmap(self._file.fileno(), 0)
        self._numbers = memoryview(self._map).cast("q")
        self._start = ROW * worker

    @staticmethod
    def create(path: Path, workers: int) -> None:
        """A ledger of so many rows of zeros."""
        path.write_bytes(bytes(8 * ROW * workers))

    def write(self, *, running: int, requests: int, tokens: int) -> None:
        """This process's numbers."""
        self._numbers[self._start + RUNNING] = running
        self._numbers[self._start + REQUESTS] = requests
        self._numbers[self._start + TOKENS] = tokens

    def total(self, number: int) -> int:
        """Of all processes."""
        return sum(self._numbers[number::ROW])

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held for microseconds; a process that ends gives it back."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def ready(self) -> None:
        """Say that this process is ready."""
        self._numbers[self._start + READY] = 1

    @property
    def all_ready(self) -> bool:
        return 0 not in self._numbers[READY::ROW]

    def close(self) -> None:
        self.write(running=0, requests=0, tokens=0)
        self._numbers.release()
        self._map.close()
        self._file.close()
