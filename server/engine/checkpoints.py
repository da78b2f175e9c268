"""Checkpoints: which one a prompt begins with, what is kept on its way, and why there was none.

A state cannot be cut short, so a prompt begins at the farthest checkpoint on its way that leaves at
least one token to compute: the last token's logits are not kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from model.chunk import Capacity, Copy
from server.engine.archive import State
from server.engine.chain import Block, Chain, Tree, root_of, shared
from server.engine.disk import Disk
from server.engine.jobs import Jobs
from server.engine.positions import LEAST, grid, plan, spacing
from server.engine.request import Request
from server.engine.shelf import Shelf
from server.engine.slots import Holdings
from server.engine.tiers import Checkpoint, Tiers
from server.protocol import CacheStats, Trouble


class Checkpoints:
    """Every checkpoint of one engine, found by the tokens before it.

    queries, hits and saved count requests and tokens; misses count requests by reason:
    short: too few tokens to keep; new: it begins as nothing that was read before; parted: what it
    shares with others ends before any checkpoint; evicted: there was one, and it was given up;
    damaged: its file could not be read or was refused.
    """

    REASONS = ("short", "new", "parted", "evicted", "damaged")

    def __init__(
        self,
        capacity: Capacity,
        holdings: Holdings,
        copies: list[Copy],
        *,
        host_bytes: int = 0,
        directory: Path | None = None,
        disk_bytes: int = 0,
    ) -> None:
        self.capacity = capacity
        self.every = spacing(capacity.state_bytes)
        self.tiers = Tiers(capacity, holdings, copies, host_bytes=host_bytes)
        self.queries = self.hits = self.queried_tokens = self.saved_tokens = 0
        self.misses: Counter[str] = Counter(dict.fromkeys(self.REASONS, 0))
        self.disk: Disk | None = None
        self.jobs = Jobs()
        if directory is not None:
            shelf = Shelf(directory, capacity, self.jobs, budget=disk_bytes)
            self.disk = Disk(shelf, self.tiers, self.chain, self.receive)
        self._tree: Tree[Checkpoint] = Tree()
        self._by_key: dict[str, Checkpoint] = {}
        self._fetched: list[Checkpoint] = []  # from the disk, pinned until those who wait have had
        self._number = 0
        self._changes = 0  # of the index, so that nothing is looked up twice

    def begin(self, request: Request) -> None:
        """Give a request that has arrived its chain."""
        if request.chain is None:
            root = root_of(self.capacity.fingerprint, self.capacity.dtype, request.salt)
            request.chain = Chain(root, request.tokens)

    def get(self, key: str) -> Checkpoint | None:
        """The checkpoint of a key, if it lies in memory."""
        return self._by_key.get(key)

    def chain(self, checkpoint: Checkpoint) -> Chain:
        """The tokens that lead to a checkpoint."""
        assert checkpoint.block is not None
        return self._tree.chain(checkpoint.block, checkpoint)

    def find(self, request: Request) -> Checkpoint | None:
        """The farthest checkpoint in memory that a request can begin with."""
        if request.looked_up == self._changes:
            return request.found
        chain, most = _chain(request), request.most_cached
        path = request.path = self._tree.known(chain)
        request.looked_up, request.found = self._changes, None
        for index in range(len(path) - 1, -1, -1):
            found = path[index].leaf(chain.within(index, most))
            if found is not None:
                if found.position >= LEAST or request.reading:
                    request.found = found
                break
        return request.found

    def fetch(self, request: Request, found: Checkpoint | None) -> bool:
        """Whether a request does better to wait for a state that lies on the disk; it is loaded."""
        if self.disk is None:
            return False
        least = LEAST if found is None else found.position + LEAST
        entry = self.disk.shelf.find(_chain(request), request.most_cached, least)
        if entry is None or entry.key in request.tried:
            return False
        request.fetches = entry.key
        request.tried.add(entry.key)

        def then(trouble: Trouble | None) -> None:
            request.fetches = ""
            request.refused |= trouble is not None

        self.disk.load(entry.key, then)
        return True

    def receive(self, state: State) -> None:
        """Put a state from the disk on the host and into the index."""
        if state.key not in self._by_key:
            self.enter(state, force=True)
        checkpoint = self._by_key[state.key]
        checkpoint.pins += 1
        self._fetched.append(checkpoint)

    def enter(self, state: State, *, force: bool = False) -> bool:
        """Put a state from outside on the host, unless there is no room."""
        checkpoint = self._make(state.key, state.position, state.salt)
        room = self.tiers.receive(checkpoint, state.image, force=force)
        if room:
            self._index(checkpoint, state.chain)
        self.sweep()
        return room

    def settle(self) -> None:
        """Those who can begin with a checkpoint now have begun with it."""
        self.tiers.spared = None
        for checkpoint in self._fetched:
            checkpoint.pins -= 1
        if self._fetched:
            self._fetched.clear()
            self.tiers.trim()
            self.sweep()

    def twin(
        self, request: Request, found: Checkpoint | None, readers: Iterable[Request]
    ) -> tuple[Request, int] | None:
        """Who is reading what this request begins with, and where they part; that is worth waiting
        for, and marked to be kept."""
        best = 0 if found is None else found.position
        choice: tuple[Request, int] | None = None
        most = request.most_cached
        for reader in readers:
            last = reader.most_cached
            if reader.chain is None or last - best < LEAST or reader.computed >= last:
                continue
            at = min(shared(_chain(request), reader.chain), most, last)
            if at - best >= LEAST and reader.computed < at:
                best, choice = at, (reader, at)
        if choice is not None:
            reader, at = choice
            if at not in reader.wanted:
                reader.wanted = sorted([*reader.wanted, at])
        return choice

    def may_lead_on(self, request: Request, readers: Iterable[Request]) -> bool:
        """Whether a request of whose prompt more is to come may then begin farther on: all of it
        that is known leads to what was read, or is being read."""
        chain, known = _chain(request), len(request.tokens)
        if self._tree.parting(chain, request.path) >= known:
            return True
        if any(reader.chain and shared(chain, reader.chain) >= known for reader in readers):
            return True
        return self.disk is not None and self.disk.shelf.beyond(known)

    def extend(self, request: Request, added: int) -> None:
        """So many more tokens of a prompt that has been admitted."""
        self.queried_tokens += added
        if request.more:
            return
        chain = _chain(request)
        marks = plan(
            request.prompt_length, start=request.computed, boundaries=request.boundaries,
            every=self.every,
        )  # fmt: skip
        new = (at for at in marks if chain.key(at) not in self._by_key)
        within = (at for at in request.wanted if at < request.prompt_length)
        request.wanted = sorted({*within, *new})

    def admit(self, request: Request, found: Checkpoint | None) -> None:
        """Begin with a checkpoint, or with nothing, and decide what to keep on the way."""
        chain = _chain(request)
        path, request.path, request.found = request.path, [], None
        length = request.prompt_length
        parting = min(self._tree.parting(chain, path), length - 1)
        self._count(request, found, parting, path)
        if found is not None:
            self.tiers.give(found, request)
            self.sweep()
            request.cached = request.computed
        start = request.computed
        if request.more:  # where it ends is not known yet
            wanted = grid(start, max(request.expected, length), self.every)
        else:
            wanted = plan(
                length, start=start, boundaries=request.boundaries, every=self.every,
                whole=request.reading,
            )  # fmt: skip
        if parting - start >= LEAST and all(abs(parting - at) >= LEAST for at in wanted):
            wanted.append(parting)
        request.wanted = sorted(
            at for at in wanted if at > length or chain.key(at) not in self._by_key
        )

    def take(self, request: Request) -> None:
        """Keep the state of a running request if it has come to a position that is wanted."""
        while request.wanted and request.wanted[0] <= request.computed:
            if request.wanted.pop(0) == request.computed:
                checkpoint = self._new(request)
                if checkpoint is not None:
                    self._keep(checkpoint, request, self.tiers.take(checkpoint, request))

    def inherit(self, request: Request) -> Checkpoint | None:
        """Keep what a request that ends has in its slot, by letting the slot go over.

        A stop that was found late has been read into the state as the last token: the state is set
        back by that where it can be. One that is a single token farther than the last is not kept.
        """
        assert request.computed <= len(request.tokens), "a token that nobody knows"
        if request.lost:
            return None
        if request.generated and request.computed == len(request.tokens):
            request.computed -= min(self.capacity.rollback, 1)
        if request.computed < LEAST and not request.reading:
            return None
        last = max([request.cached, *(checkpoint.position for checkpoint in request.kept)])
        if request.computed - last < 2 and not request.reading:
            return None
        checkpoint = self._new(request)
        if checkpoint is not None:
            self.tiers.inherit(checkpoint, request)
            self._keep(checkpoint, request, True)
        return self._by_key.get(_chain(request).key(request.computed))

    def disown(self, request: Request, position: int = 0) -> None:
        """Give up what was kept of a request beyond a position: its step was lost."""
        for checkpoint in request.kept:
            if checkpoint.position > position:
                self.tiers.drop(checkpoint)
                if self.disk is not None:
                    self.disk.discard(checkpoint.key)
        self.sweep()

    def evict(self) -> bool:
        """Clear the device of one checkpoint; False: there is none."""
        done = self.tiers.evict()
        self.sweep()
        return done

    def sweep(self) -> None:
        """Forget those that lie nowhere any more."""
        for checkpoint in self.tiers.lost:
            if checkpoint.gone and self._by_key.get(checkpoint.key) is checkpoint:
                self._changes += 1
                del self._by_key[checkpoint.key]
                assert checkpoint.block is not None
                self._tree.remove(checkpoint.block, checkpoint)
        self.tiers.lost.clear()

    def stats(self) -> CacheStats:
        """The counters, and what lies where."""
        tiers = self.tiers
        counts = {"device": len(tiers.device), "host": len(tiers.host)}
        sizes = {"device": tiers.device_bytes, "host": tiers.host_bytes}
        saves: list[float] = []
        loads: list[float] = []
        if self.disk is not None:
            shelf = self.disk.shelf
            counts["disk"], sizes["disk"] = len(shelf.entries), shelf.bytes
            saves, shelf.save_seconds = shelf.save_seconds, []
            loads, shelf.load_seconds = shelf.load_seconds, []
        return CacheStats(
            queried=self.queried_tokens,
            saved=self.saved_tokens,
            hits=self.hits,
            misses=dict(self.misses),
            checkpoints=counts,
            bytes=sizes,
            save_seconds=saves,
            load_seconds=loads,
        )

    def check(self) -> None:
        """Assert that the index and the tiers agree."""
        self.tiers.check()
        assert {*self.tiers.device, *self.tiers.host} == set(self._by_key.values())
        assert bool(self._by_key) == bool(self._tree.blocks)

    def _new(self, request: Request) -> Checkpoint | None:
        """A checkpoint at a request's position; None, and a touch, if there is one."""
        key = _chain(request).key(request.computed)
        if (known := self._by_key.get(key)) is not None:
            self.tiers.touch(known)
            return None
        return self._make(key, request.computed, request.salt)

    def _make(self, key: str, position: int, salt: str) -> Checkpoint:
        self._number += 1
        return Checkpoint(self._number, key, position, salt)

    def _keep(self, checkpoint: Checkpoint, request: Request, kept: bool) -> None:
        if kept:
            self._index(checkpoint, _chain(request))
            request.kept.append(checkpoint)
        self.sweep()

    def _index(self, checkpoint: Checkpoint, chain: Chain) -> None:
        self._changes += 1
        self._by_key[checkpoint.key] = checkpoint
        checkpoint.block = self._tree.add(chain, checkpoint)

    def _count(
        self,
        request: Request,
        found: Checkpoint | None,
        parting: int,
        path: list[Block[Checkpoint]],
    ) -> None:
        self.queries += 1
        self.queried_tokens += request.prompt_length
        if found is not None:
            self.hits += 1
            self.saved_tokens += found.position
        elif request.prompt_length <= LEAST:
            self.misses["short"] += 1
        elif request.refused:
            self.misses["damaged"] += 1
        elif self._tree.gone(_chain(request), path):
            self.misses["evicted"] += 1
        else:
            self.misses["parted" if parting >= LEAST else "new"] += 1


def _chain(request: Request) -> Chain:
    assert request.chain is not None, "a request without a chain"
    return request.chain
