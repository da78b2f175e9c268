"""The shelf: a directory of states as files, named by their keys, that outlives the process.

    DIRECTORY/states/KEY.safetensors      a state; written and read by threads of this process
    DIRECTORY/contexts/ID.KEY.json        a named context (server.api.registry): keeps KEY's file
    DIRECTORY/quarantine/                 what was refused
    DIRECTORY/lock                        held while a file is given up or a context is published

Servers of several models, and several servers of one, may share a directory: a file is named by
what is in it, appears whole or not at all, and is given up only while no context names it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

from model.chunk import Capacity, Image
from server.engine import archive
from server.engine.archive import ArchiveError, ForeignError, State
from server.engine.catalogue import Catalogue, Entry
from server.engine.chain import Chain
from server.engine.jobs import Jobs
from server.protocol import Trouble

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
STALE_SECONDS = 3600.0  # a temporary file so old has no writer any more


class Full(OSError):
    """The disk, or the budget of the shelf, has no room for a state."""


class Shelf(Catalogue):
    """States of this model in a directory, least recently used first, within a budget in bytes.

    save(), load() and adopt() work in threads; what has come of them is told by jobs.done().
    """

    def __init__(self, directory: Path, capacity: Capacity, jobs: Jobs, *, budget: int) -> None:
        super().__init__()
        self.directory = directory
        self.capacity = capacity
        self.jobs = jobs
        self.budget = budget
        self.save_seconds: list[float] = []
        self.load_seconds: list[float] = []
        for name in ("states", "contexts", "quarantine"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._tidy()
        self._scan()

    def __contains__(self, key: str) -> bool:
        if key in self.entries and not self.path(key).exists():
            self.leave(key)  # another server has given it up
        return key in self.entries

    def path(self, key: str) -> Path:
        """Where a state lies."""
        return self.directory / "states" / (key + SUFFIX)

    def save(
        self,
        chain: Callable[[], Chain],
        position: int,
        image: Image,
        salt: str,
        then: Callable[[Trouble | None], None],
    ) -> None:
        """Write a state in a thread; `then` is told why it could not be, None when it stands."""
        begin = time.monotonic()

        def end(future: Future[None]) -> None:
            try:
                future.result()
                self.save_seconds.append(time.monotonic() - begin)
                trouble = None
            except OSError as error:
                log.error("state %s was not saved: %s", chain().key(position), error)
                trouble = Trouble(507, f"a state could not be written: {error.strerror or error}")
            then(trouble)

        self.jobs.start(lambda: self._write(chain(), position, image, salt), end)

    def load(self, key: str, then: Callable[[State | Trouble], None]) -> None:
        """Read and check a state in a thread; what is not good is put away."""
        begin = time.monotonic()

        def work() -> State:
            path = self.path(key)
            before = path.stat()
            try:
                state = archive.read(path, self.capacity)
                if state.key != key:
                    raise ArchiveError(f"it is the state {state.key}")
            except ForeignError:
                raise
            except ArchiveError as error:
                self._refuse(path, before, error)
                raise
            with contextlib.suppress(OSError):
                os.utime(path)
            return state

        def end(future: Future[State]) -> None:
            try:
                state = future.result()
                self.load_seconds.append(time.monotonic() - begin)
                self.touch(key)
            except ForeignError as error:
                self.leave(key)
                then(Trouble(410, f"its file is of another server, and was left alone: {error}"))
            except ArchiveError as error:
                then(Trouble(410, f"its file is damaged, and was put away: {error}"))
            except OSError as error:
                self.leave(key)
                then(Trouble(410, f"its file cannot be read: {error.strerror or error}"))
            else:
                then(state)

        self.jobs.start(work, end)

    def adopt(self, path: Path, then: Callable[[State | Trouble], None]) -> None:
        """Check a file from elsewhere in a thread, and put its state on the shelf."""

        def work() -> State:
            state = archive.read(path, self.capacity, besides=(archive.MESSAGES,))
            if state.key not in self:
                self._write(state.chain, state.position, state.image, state.salt)
            return state

        def end(future: Future[State]) -> None:
            try:
                state = future.result()
            except ArchiveError as error:
                then(Trouble(400, f"not a state of this model: {error}"))
            except OSError as error:
                then(Trouble(507, f"the state could not be written: {error.strerror or error}"))
            else:
                then(state)

        self.jobs.start(work, end)

    def drop(self, key: str) -> None:
        """Give up a file."""
        self.leave(key)
        self.path(key).unlink(missing_ok=True)

    def _write(self, chain: Chain, position: int, image: Image, salt: str) -> None:
        key = chain.key(position)
        metadata, tensors = archive.contents(self.capacity, chain, position, image, salt=salt)
        size = archive.size_of(metadata, tensors)
        self._make_room(size)
        written = False
        try:
            archive.write(self.path(key), metadata, tensors)
            written = True
        finally:
            with self._books:
                self.bytes -= size
                if written:
                    self.enter(_entry(metadata, position, size))

    def _make_room(self, size: int) -> None:
        """Give up files that no context names until so many bytes fit, and count them as taken.

        Raises Full.
        """
        with locked(self.directory), self._books:
            if self.bytes + size > self.budget:
                named = {name.split(".")[1] for name in os.listdir(self.directory / "contexts")
                         if name.count(".") == 2}  # fmt: skip
                kept = sum(entry.bytes for key, entry in self.entries.items() if key in named)
                if kept + size > self.budget:
                    raise Full(
                        errno.ENOSPC,
                        f"disk_cache_gb = {self.budget / 1e9:g} has no room for {size} bytes: "
                        f"contexts take {kept}",
                    )
                for key in [key for key in self.entries if key not in named]:
                    if self.bytes + size <= self.budget:
                        break
                    self.drop(key)
            self.bytes += size

    def _refuse(self, path: Path, found: os.stat_result, error: Exception) -> None:
        """Put a file away where it is never looked at again, and say so; not one that another
        server has put in its place meanwhile."""
        aside = self.directory / "quarantine" / f"{path.name}.{secrets.token_hex(4)}"
        self.leave(path.name.removesuffix(SUFFIX))
        with locked(self.directory):
            try:
                now = path.stat()
                if (now.st_ino, now.st_mtime_ns) == (found.st_ino, found.st_mtime_ns):
                    path.rename(aside)
                    log.error("refused %s, put away as %s: %s", path, aside, error)
                else:
                    log.error("refused %s, which is another file now: %s", path, error)
            except OSError as trouble:
                log.error("refused %s: %s; and it cannot be put away: %s", path, error, trouble)

    def _scan(self) -> None:
        """Find what earlier processes have left, the least recently used first."""
        found = []
        for path in (self.directory / "states").iterdir():
            if path.name.startswith(archive.TEMPORARY):
                continue
            times = None
            try:
                times = path.stat()
                head = archive.read_header(path)
                count = archive.check_header(head, self.capacity)
                if times.st_size != head.size:
                    raise ArchiveError(f"{times.st_size} bytes, {head.size} are due")
                key = path.name.removesuffix(SUFFIX)
                if head.metadata.get("key") != key:
                    raise ArchiveError(f"it is the state {head.metadata.get('key')}")
                found.append((times.st_mtime, _entry(head.metadata, count, head.size)))
            except ForeignError:
                continue  # of another model that shares the directory
            except ArchiveError as error:
                assert times is not None
                self._refuse(path, times, error)
            except OSError as error:
                log.error("cannot read %s: %s", path, error)
        for _, entry in sorted(found, key=lambda pair: pair[0]):
            self.enter(entry)

    def _tidy(self) -> None:
        """Remove what writers have left that were killed."""
        for name in ("states", "contexts"):
            for path in (self.directory / name).glob(f"{archive.TEMPORARY}*"):
                with contextlib.suppress(OSError):  # it came to its name meanwhile
                    if time.time() - path.stat().st_mtime > STALE_SECONDS:
                        path.unlink()


def _entry(metadata: Mapping[str, str], position: int, size: int) -> Entry:
    """A file as its header tells of it. ArchiveError."""
    try:
        trail = bytes.fromhex(metadata["trail"])
        return Entry(metadata["key"], metadata["block"], trail, position, size)
    except (KeyError, ValueError) as error:
        raise ArchiveError(f"a way that makes no sense: {error!r}") from error


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Alone among all processes that share the directory."""
    with (directory / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
