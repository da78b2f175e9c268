"""States that have an owner: read once and kept under a key, gone on with, exported, imported.

Where there is a shelf, a state is kept when its file stands there, and the file is kept while a
context names it. Without one it is pinned on the host, once for every context that has it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from model.chunk import Copy, Image, Place
from server import protocol
from server.engine import archive
from server.engine.archive import State
from server.engine.chain import Chain
from server.engine.checkpoints import Checkpoints
from server.engine.disk import Then
from server.engine.request import Request
from server.engine.tiers import Checkpoint
from server.engine.tree import Way
from server.protocol import Export, Fetch, Generate, Import, Output, Pin, Read, Reply, Trouble

CHAINS = 4  # sequences of bases that are kept in one piece
GONE = Trouble(410, "the state is gone")


class States:
    """Answers come late, from threads: they are in `news` when they are there."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.news: list[Output | Reply] = []
        self._arriving: dict[str, Generate | Read] = {}  # whose base is on its way from the disk
        self._securing: dict[str, Request] = {}  # reads whose state is not safe yet
        self._chains: dict[str, Chain] = {}  # of bases that were used last
        self._exports: list[tuple[Export, Checkpoint, Way[Checkpoint], Image]] = []

    def __contains__(self, id: str) -> bool:
        return id in self._arriving or id in self._securing

    @property
    def expecting(self) -> bool:
        """Whether files are being read or written."""
        return len(self.checkpoints.jobs) > 0

    def rest(self) -> None:
        """Nothing is to be computed or expected: use the time."""
        if self.checkpoints.disk is not None:
            self.checkpoints.disk.rest()
            self.checkpoints.sweep()

    def take_news(self) -> list[Output | Reply]:
        """What has come of files since the last time."""
        news, self.news = self.news, []
        return news

    def base(self, key: str) -> tuple[Chain, str] | None:
        """The tokens of a state in memory, and the digest of its salt."""
        checkpoint = self.checkpoints.get(key)
        if checkpoint is None:
            return None
        self.checkpoints.tiers.touch(checkpoint)
        chain = self._chains.pop(key, None)
        assert checkpoint.block is not None
        if chain is None or chain.digest(chain.known) is not checkpoint.block.digest:
            chain = self.checkpoints.chain(checkpoint)  # one that is followed at once
        self._chains[key] = chain
        while len(self._chains) > CHAINS:
            del self._chains[next(iter(self._chains))]
        return chain, checkpoint.salt

    def arrive(self, message: Generate | Read, add: Callable[[Generate | Read], None]) -> None:
        """Add a request once its base was brought from the disk. ValueError: it is not there."""
        self._arriving[message.id] = message

        def then(trouble: Trouble | None) -> None:
            if self._arriving.pop(message.id, None) is None:
                return  # aborted meanwhile
            try:
                if trouble is not None:
                    raise ValueError(f"base: {trouble.message}")
                add(message)
            except ValueError as mistake:
                self.news.append(Output(id=message.id, finish="error", error=str(mistake)))

        try:
            self._load(message.base, then)
        except ValueError:
            del self._arriving[message.id]
            raise

    def keep(self, request: Request, checkpoint: Checkpoint | None) -> None:
        """A read has come to its end: tell what it made once that cannot be lost."""
        self._securing[request.id] = request
        if checkpoint is None:
            self._end(request, None, Trouble(507, "its state could not be kept"))
        else:
            self._secure(checkpoint, partial(self._end, request, checkpoint))

    def abort(self, id: str) -> bool:
        """Forget a request that is here; whether it was."""
        known = id in self
        self._arriving.pop(id, None)
        self._securing.pop(id, None)
        return known

    def call(self, message: Pin | Fetch | Export | Import) -> None:
        """Carry out a message that is about a state."""
        if isinstance(message, Pin):
            checkpoint = self.checkpoints.get(message.key)
            if checkpoint is not None and self.checkpoints.disk is None:
                checkpoint.pins = max(0, checkpoint.pins + message.change)
                self._trim()
        elif isinstance(message, Fetch):
            self._fetch(message)
        elif isinstance(message, Export):
            self._export(message)
        else:
            self._import(message)

    def copied(self) -> None:
        """The copies were carried out: what they have filled can be written."""
        exports, self._exports = self._exports, []
        for export in exports:
            self._write(*export)
        if self.checkpoints.disk is not None:
            self.checkpoints.disk.copied()

    def _fetch(self, message: Fetch) -> None:
        def then(trouble: Trouble | None) -> None:
            self._answer(message.id, self.checkpoints.get(message.key) or trouble or GONE)

        if self.checkpoints.get(message.key) is not None:
            then(None)
        else:
            try:
                self._load(message.key, then)
            except ValueError as error:
                self._answer(message.id, Trouble(410, str(error)))

    def _load(self, key: str, then: Then) -> None:
        disk = self.checkpoints.disk
        if disk is None or not (disk.loading(key) or disk.shelf.path(key).exists()):
            raise ValueError(f"base: there is no state {key}")
        disk.load(key, then)

    def _export(self, message: Export) -> None:
        checkpoint = self.checkpoints.get(message.key)
        if checkpoint is None:
            self._answer(message.id, GONE)
            return
        tiers, image = self.checkpoints.tiers, Image()
        tiers.hold(checkpoint, force=True)
        place = Place(image=image, position=checkpoint.position)
        tiers.copies.append(Copy(tiers.saved(checkpoint), place))
        way = self.checkpoints.way(checkpoint)  # it may be given up before the copies are made
        self._exports.append((message, checkpoint, way, image))
        self._trim()

    def _write(
        self, message: Export, checkpoint: Checkpoint, way: Way[Checkpoint], image: Image
    ) -> None:
        capacity, position, salt = self.checkpoints.capacity, checkpoint.position, checkpoint.salt

        def work() -> None:
            contents = archive.contents(capacity, way.chain(), position, image, salt=salt)
            archive.write(Path(message.path), *contents)

        def end(future: Future[None]) -> None:
            error = future.exception()
            self._answer(message.id, Trouble(507, str(error)) if error else checkpoint)

        self.checkpoints.jobs.start(work, end)

    def _import(self, message: Import) -> None:
        checkpoints, path = self.checkpoints, Path(message.path)

        def tell(came: State | Trouble) -> None:
            if isinstance(came, State) and checkpoints.disk is None:
                if checkpoints.get(came.key) is not None or checkpoints.enter(came):
                    checkpoint = checkpoints.get(came.key)
                    assert checkpoint is not None
                    self._secure(
                        checkpoint,
                        lambda trouble: self._answer(message.id, trouble or checkpoint),
                    )
                else:
                    self._answer(message.id, self._no_room(came.position))
            else:
                self._answer(message.id, came)

        if checkpoints.disk is not None:
            checkpoints.disk.shelf.adopt(path, tell)
            return

        def end(future: Future[State]) -> None:
            try:
                tell(future.result())
            except archive.ArchiveError as error:
                tell(Trouble(400, f"not a state of this model: {error}"))
            except OSError as error:
                tell(Trouble(400, f"the file cannot be read: {error}"))

        besides = (archive.MESSAGES,)
        checkpoints.jobs.start(
            lambda: archive.read(path, checkpoints.capacity, besides=besides), end
        )

    def _secure(self, checkpoint: Checkpoint, then: Then) -> None:
        """See that a state is not lost, then tell why it would be."""
        disk, tiers = self.checkpoints.disk, self.checkpoints.tiers
        if disk is None:
            held = checkpoint.pins or tiers.hold(checkpoint)
            checkpoint.pins += bool(held)
            then(None if held else self._no_room(checkpoint.position))
        elif checkpoint.key in disk.shelf:
            disk.shelf.touch(checkpoint.key)
            then(None)
        else:
            tiers.hold(checkpoint, force=True)
            checkpoint.pins += 1

            def end(trouble: Trouble | None) -> None:
                checkpoint.pins -= 1
                self._trim()
                then(trouble)

            disk.save(checkpoint, end)
        self.checkpoints.sweep()

    def _end(
        self, request: Request, checkpoint: Checkpoint | None, trouble: Trouble | None
    ) -> None:
        if self._securing.pop(request.id, None) is None:  # aborted meanwhile
            if checkpoint is not None and trouble is None and self.checkpoints.disk is None:
                checkpoint.pins -= 1
                self._trim()
            return
        output = Output(
            id=request.id, finish="stop", computed=request.prompt_length, cached=request.cached
        )
        if trouble is not None or checkpoint is None:
            output.finish, output.trouble = "error", trouble
            output.error = "" if trouble is None else trouble.message
        else:
            output.state = self._told(checkpoint)
        self.news.append(output)

    def _answer(self, id: str, came: Checkpoint | State | Trouble) -> None:
        trouble = came if isinstance(came, Trouble) else None
        state = None if isinstance(came, Trouble) else self._told(came)
        self.news.append(Reply(id=id, state=state, trouble=trouble))

    def _told(self, state: Checkpoint | State) -> protocol.State:
        return protocol.State(
            key=state.key,
            count=state.position,
            bytes=self.checkpoints.tiers.bytes_of(state.position),
            salt=state.salt,
        )

    def _no_room(self, position: int) -> Trouble:
        tiers = self.checkpoints.tiers
        pinned = sum(tiers.bytes_of(c.position) for c in tiers.host if c.pins)
        return Trouble(
            507,
            f"host_cache_gb = {tiers.host_budget / 1e9:g} has no room for "
            f"{tiers.bytes_of(position)} bytes: contexts take {pinned}",
        )

    def _trim(self) -> None:
        self.checkpoints.tiers.trim()
        self.checkpoints.sweep()
