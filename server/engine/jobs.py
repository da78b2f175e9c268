"""Work in threads: what it came to is told on the thread that asks, when it asks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Jobs:
    """A few threads for files."""

    def __init__(self, threads: int = 2) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="files")
        self._jobs: list[tuple[Future[Any], Callable[[Future[Any]], None]]] = []

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._jobs)

    def start(self, work: Callable[[], T], end: Callable[[Future[T]], None]) -> None:
        """Do the work in a thread; `end` is told of it by done()."""
        self._jobs.append((self._pool.submit(work), end))

    def done(self) -> None:
        """Tell what has come of those that have ended."""
        jobs, self._jobs = self._jobs, []
        for future, end in jobs:
            if future.done():
                end(future)
            else:
                self._jobs.append((future, end))

    def wait(self) -> None:
        """Wait for all, and tell what came of them."""
        while self._jobs:
            for future, _ in self._jobs:
                future.exception()
            self.done()

    def close(self) -> None:
        """Finish what has begun, drop what has not."""
        self._pool.shutdown(wait=True, cancel_futures=True)
