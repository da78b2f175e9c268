"""Checkpoints: which one a prompt begins with, what is kept on its way, and why there was none.

A state cannot be cut short, so a prompt begins at the farthest checkpoint on its way that leaves at
least one token to compute: the last token's logits are not kept.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from model.chunk import Capacity, Copy
from server.engine.archive import State
from server.engine.chain import BLOCK, Chain, root_of
from server.engine.disk import Disk
from server.engine.jobs import Jobs
from server.engine.positions import LEAST, plan, spacing
from server.engine.request import Request
from server.engine.shelf import Shelf
from server.engine.slots import Holdings
from server.engine.tiers import Checkpoint, Tiers
from server.engine.tree import Tree, Walk, Way
from server.protocol import CacheStats


class Checkpoints:
    """Every checkpoint of one engine, found by the tokens before it.

    queries and saved count requests and tokens, found counts requests by the tier that they begin
    from, misses by reason:
    short: too few tokens to keep; new: it begins as nothing that was read before; parted: what it
    shares with others ends before any checkpoint; evicted: there was one, and it was given up, or
    no room for it; damaged: its file could not be read or was refused.
    """

    TIERS = ("device", "host", "disk")
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
        self.identity = capacity.identity
        self.every = spacing(capacity.state_bytes)
        self.tiers = Tiers(capacity, holdings, copies, host_bytes=host_bytes)
        self.queries = self.queried_tokens = self.saved_tokens = 0
        self.found: Counter[str] = Counter(dict.fromkeys(self.TIERS, 0))
        self.misses: Counter[str] = Counter(dict.fromkeys(self.REASONS, 0))
        self.disk: Disk | None = None
        self.jobs = Jobs()
        if directory is not None:
            shelf = Shelf(directory, capacity, self.jobs, budget=disk_bytes)
            self.disk = Disk(shelf, self.tiers, self.way, self.receive)
        self.tree: Tree[Checkpoint] = Tree()
        self._by_key: dict[str, Checkpoint] = {}
        self._fetched: list[Checkpoint] = []  # from the disk, pinned until those who wait have had
        self._number = 0

    @property
    def hits(self) -> int:
        """Requests that found one."""
        return self.found.total()

    def begin(self, request: Request) -> None:
        """Give a request that has arrived its chain."""
        if request.chain is None:
            request.chain = Chain(root_of(self.identity, request.salt), request.tokens)

    def get(self, key: str) -> Checkpoint | None:
        """The checkpoint of a key, if it lies in memory."""
        return self._by_key.get(key)

    def chain(self, checkpoint: Checkpoint) -> Chain:
        """The tokens that lead to a checkpoint."""
        return self.way(checkpoint).chain()

    def way(self, checkpoint: Checkpoint) -> Way[Checkpoint]:
        """The blocks and tokens that lead to a checkpoint."""
        assert checkpoint.block is not None
        return self.tree.way(checkpoint.block, checkpoint)

    def find(self, request: Request) -> Checkpoint | None:
        """The farthest checkpoint in memory that a request can begin with, as far as its prompt is
        known."""
        found = self.tree.find(chain_of(request), request.walk, request.most_cached)
        if found is None or (found.position < LEAST and not request.reading):
            return None
        return found

    def receive(self, state: State) -> None:
        """Put a state from the disk on the host and into the index."""
        if state.key not in self._by_key:
            self.enter(state, force=True)
            self._by_key[state.key].fresh = True
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
            if self.tiers.host_bytes > self.tiers.host_budget:
                self.tiers.lift(checkpoint)
            checkpoint.pins -= 1
        if self._fetched:
            self._fetched.clear()
            self.tiers.trim()
            self.sweep()

    def extend(self, request: Request, added: int) -> None:
        """So many more tokens of a prompt that has been admitted."""
        self.queried_tokens += added
        self._explain(request)
        kept = request.wanted
        if not request.more:  # positions past an early end are none
            kept = [at for at in kept if at < request.prompt_length]
        request.wanted = sorted({*kept, *self._wanted(request)})

    def admit(self, request: Request, found: Checkpoint | None) -> None:
        """Begin with a checkpoint, or with nothing, and decide what to keep on the way."""
        chain = chain_of(request)
        parting = self.tree.parting(chain, request.walk)
        self.count(request, found, parting)
        parting = min(parting, request.prompt_length - 1)
        request.walk = Walk()
        if found is not None:
            self.tiers.give(found, request)
            self.sweep()
            request.cached = request.computed
        wanted = self._wanted(request)
        if (
            parting - request.computed >= LEAST
            and all(abs(parting - at) >= LEAST for at in wanted)
            and chain.key(parting) not in self._by_key
        ):
            wanted.append(parting)
        request.wanted = sorted(wanted)

    def count(self, request: Request, found: Checkpoint | None, parting: int = 0) -> None:
        """A request has been looked up for good; `parting` is how much of it was known."""
        self.queries += 1
        self.queried_tokens += request.prompt_length
        if found is not None:
            self.found[found.tier] += 1
            found.fresh = False
            self.saved_tokens += found.position
        else:
            request.missed = (parting, max(0, request.walk.count - 1))
            self._explain(request)

    def leave(self, request: Request) -> None:
        """A request has ended, whatever its end."""
        self._explain(request, ended=True)

    def take(self, request: Request) -> None:
        """Keep the state of a running request if it has come to a position that is wanted, or one
        past it by a token that can be taken back."""
        while request.wanted and request.wanted[0] <= request.computed:
            position = request.wanted.pop(0)
            if request.computed - position <= request.apart:
                checkpoint = self._new(request, position)
                if checkpoint is not None:
                    self._keep(checkpoint, request, self.tiers.take(checkpoint, request))

    def inherit(self, request: Request) -> Checkpoint | None:
        """Keep what a request that ends has in its slot, by letting the slot go over.

        A stop that was found late has been read into the state as the last token: the state is set
        back by that where it can be, and by the last token of a prompt if the state in front of it
        is wanted. One that is a single token farther than the last is not kept.
        """
        assert request.computed <= len(request.tokens), "a token that nobody knows"
        if request.lost:
            return None
        if request.generated and request.computed == len(request.tokens):
            request.computed -= min(self.capacity.rollback, 1)
        elif request.apart and request.computed - 1 in request.wanted:
            request.computed -= 1
        if request.computed < LEAST and not request.reading:
            return None
        last = max([request.cached, *(checkpoint.position for checkpoint in request.kept)])
        if request.computed - last < 2 and not request.reading:
            return None
        checkpoint = self._new(request, request.computed)
        if checkpoint is not None:
            self.tiers.inherit(checkpoint, request)
            self._keep(checkpoint, request, True)
        return self._by_key.get(chain_of(request).key(request.computed))

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

    def make_room(self) -> None:
        """Where those who run hold most slots and none is free, move a checkpoint to the host:
        whoever comes next would have to wait for that. Not one with KV blocks, which may be many.
        """
        slots, kept = self.tiers.holdings.slots, len(self.tiers.device)
        if slots.free or 2 * kept >= slots.total or self.capacity.blocks:
            return
        if self.tiers.movable:
            self.evict()

    def sweep(self) -> None:
        """Forget those that lie nowhere any more."""
        for checkpoint in self.tiers.lost:
            if checkpoint.gone and self._by_key.get(checkpoint.key) is checkpoint:
                del self._by_key[checkpoint.key]
                assert checkpoint.block is not None
                self.tree.remove(checkpoint.block, checkpoint)
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
            hits=dict(self.found),
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
        assert bool(self._by_key) == bool(self.tree.blocks)

    def _wanted(self, request: Request) -> list[int]:
        """Where the rest of a prompt, as far as it is known, leaves checkpoints not there yet."""
        length, more = request.prompt_length, request.more
        marks = plan(
            max(request.expected, length) if more else length, start=request.computed,
            boundaries=request.boundaries, every=self.every, whole=request.reading, more=more,
        )  # fmt: skip
        chain = chain_of(request)
        return [at for at in marks if at > length or chain.key(at) not in self._by_key]

    def _new(self, request: Request, position: int) -> Checkpoint | None:
        """A checkpoint of a request at a position; None, and a touch, if there is one."""
        key = chain_of(request).key(position)
        if (known := self._by_key.get(key)) is not None:
            self.tiers.touch(known)
            return None
        return self._make(key, position, request.salt)

    def _make(self, key: str, position: int, salt: str) -> Checkpoint:
        self._number += 1
        return Checkpoint(self._number, key, position, salt)

    def _keep(self, checkpoint: Checkpoint, request: Request, kept: bool) -> None:
        if kept:
            self._index(checkpoint, chain_of(request))
            request.kept.append(checkpoint)
        else:
            self.tree.miss(chain_of(request), checkpoint.position)
        self.sweep()

    def _index(self, checkpoint: Checkpoint, chain: Chain) -> None:
        self._by_key[checkpoint.key] = checkpoint
        checkpoint.block = self.tree.add(chain, checkpoint)

    def _explain(self, request: Request, *, ended: bool = False) -> None:
        """Say why a request has missed, once enough of its prompt is known to tell."""
        if request.missed is None:
            return
        chain, most, (parting, index) = chain_of(request), request.most_cached, request.missed
        if request.more and not ended and most < (index + 1) * BLOCK:
            return
        request.missed = None
        if request.prompt_length <= LEAST:
            reason = "short"
        elif any(entry.awaits(chain) for entry in request.refused):
            reason = "damaged"
        elif self.tree.gone(chain, index, most):
            reason = "evicted"
        else:
            reason = "parted" if min(parting, request.prompt_length - 1) >= LEAST else "new"
        self.misses[reason] += 1


def chain_of(request: Request) -> Chain:
    """Its chain, which every request has that is looked up."""
    assert request.chain is not None, "a request without a chain"
    return request.chain
