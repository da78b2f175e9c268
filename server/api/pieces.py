"""A prompt on its way from text to ids: pieces in order, encoded by threads ahead of the reader."""

from __future__ import annotations

import asyncio
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import TypeAlias

Work: TypeAlias = "tuple[int, Callable[[], array[int]]]"  # characters, and what makes them ids


class Pieces:
    """Iterate to get the ids; close when no more are wanted, and threads turn to other work.

    The first piece is encoded by `first`, so that no prompt waits behind the later pieces of
    others. `done` once the last piece has been handed out.
    """

    def __init__(
        self,
        works: Iterator[Work],
        texts: Sequence[str],
        *,
        first: Executor,
        later: Executor,
        ahead: int,
    ) -> None:
        self.characters = sum(map(len, texts))
        self.bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        self.read = 0  # characters of the pieces handed out
        self.count = 0  # their ids
        self.done = False
        self._works = works
        self._first, self._later = first, later
        self._ahead = ahead
        self._begun = False
        self._under_way: deque[tuple[int, asyncio.Future[array[int]]]] = deque()

    @property
    def expected(self) -> int:
        """How many ids there will be in all, if the rest is like what has been read."""
        return self.count if self.done else round(self.count * self.characters / max(1, self.read))

    async def all(self) -> array[int]:
        """All that is left, at once."""
        ids = array("i")
        async for piece in self:
            ids.extend(piece)
        return ids

    def close(self) -> None:
        """Forget what is left."""
        self.done = True
        for _, future in self._under_way:
            future.cancel()
        self._under_way.clear()
        self._works = iter(())

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> array[int]:
        self._fill()
        if not self._under_way:
            self.done = True
            raise StopAsyncIteration
        try:
            characters, future = self._under_way.popleft()
            ids = await future
        except BaseException:
            future.cancel()
            self.close()
            raise
        self._fill()
        self.read += characters
        self.count += len(ids)
        self.done = not self._under_way
        return ids

    def _fill(self) -> None:
        """Keep threads busy, a bounded distance ahead."""
        loop = asyncio.get_running_loop()
        while len(self._under_way) < self._ahead and (work := next(self._works, None)):
            characters, encode = work
            pool = self._later if self._begun else self._first
            self._begun = True
            self._under_way.append((characters, loop.run_in_executor(pool, encode)))
