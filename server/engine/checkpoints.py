"""Checkpoints: which positions of a sequence are kept, which one a prompt begins with, and why not.

A state cannot be cut short, so a prompt begins at the farthest checkpoint on its way that leaves at
least one token to compute: the last token's logits are not kept. Therefore the end of a prompt is
kept one token early (or at the message boundary just before), where the same prompt finds it too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from model.chunk import Capacity, Copy
from server.engine.chain import Block, Chain, Tree, root_digest, shared
from server.engine.request import Request
from server.engine.slots import Holdings
from server.engine.tiers import Checkpoint, Tiers
from server.protocol import CacheStats

LEAST = 32  # tokens that a checkpoint must save
END = 16  # a message boundary so close before the end of a prompt is its end
LEAST_SPACING = 1024
BYTES_A_TOKEN = 1024  # of state, that may be kept for a token read: see spacing()


def spacing(state_bytes: int) -> int:
    """How many tokens of a long prompt lie between checkpoints, a power of two.

    A token is read no faster than some microseconds, 1,024 bytes are copied within some
    nanoseconds: so copies take less than 2 % of the time.
    """
    return 1 << max(LEAST_SPACING, state_bytes // BYTES_A_TOKEN).bit_length() - 1


def grid(start: int, end: int, every: int) -> list[int]:
    """Positions in between, `every` apart, and farther the longer the sequence is: four between n
    and 2 n, so that a long prompt has a number that grows with its logarithm."""
    positions: list[int] = []
    at = start
    while True:
        step = max(every, 1 << max(0, at.bit_length() - 3))
        at = (at // step + 1) * step
        if at >= end:
            return positions
        positions.append(at)


def plan(
    length: int, *, start: int = 0, boundaries: Iterable[int] = (), every: int, whole: bool = False
) -> list[int]:
    """Where the reading of a prompt pauses for a checkpoint: its end, boundaries of messages, and
    every so many tokens.

    All boundaries that are new in a turn are kept; of a long chat that is read at once, those near
    its end, and ever fewer before. `whole`: the end itself, for a prompt that will be gone on with.
    """
    known = sorted(b for b in boundaries if LEAST <= b < length)
    end = length if whole else length - 1
    if not whole and known and known[-1] >= end - END:
        end = known[-1]
    kept = [end]
    for boundary in reversed(known):
        if kept[-1] - boundary >= max(LEAST, (end - kept[-1]) // 4):
            kept.append(boundary)
    if known and known[0] not in kept and kept[-1] - known[0] >= LEAST:
        kept.append(known[0])
    marks = sorted(kept)
    between = (
        at for at in grid(start, end, every) if all(abs(at - m) >= every // 4 for m in marks)
    )
    return sorted(p for p in {*marks, *between} if p - start >= LEAST)


class Checkpoints:
    """Every checkpoint of one engine, found by the tokens before it.

    queries, hits and saved count requests and tokens; misses count requests by reason:
    short: too few tokens to keep; new: it begins as nothing that was read before; parted: what it
    shares with others ends before any checkpoint; evicted: there was one, and it was given up.
    """

    REASONS = ("short", "new", "parted", "evicted")

    def __init__(
        self, capacity: Capacity, holdings: Holdings, copies: list[Copy], *, host_bytes: int
    ) -> None:
        self.fingerprint = f"{capacity.fingerprint} {capacity.dtype}"
        self.every = spacing(capacity.state_bytes)
        self.tiers = Tiers(capacity, holdings, copies, host_bytes=host_bytes)
        self.queries = self.hits = self.queried_tokens = self.saved_tokens = 0
        self.misses: Counter[str] = Counter(dict.fromkeys(self.REASONS, 0))
        self._tree: Tree[Checkpoint] = Tree()
        self._by_key: dict[str, Checkpoint] = {}
        self._number = 0

    def begin(self, request: Request) -> None:
        """Give a request that has arrived its chain."""
        request.chain = Chain(root_digest(self.fingerprint, request.salt), request.tokens)

    def find(self, request: Request) -> Checkpoint | None:
        """The farthest checkpoint that a request can begin with."""
        path = self._tree.known(_chain(request))
        most = request.prompt_length - (not request.reading)
        for index in range(len(path) - 1, -1, -1):
            rest = _chain(request).within(index, most)
            found = path[index].leaf(rest)
            if found is not None:
                return found if found.position >= LEAST else None
        return None

    def twin(
        self, request: Request, found: Checkpoint | None, readers: Iterable[Request]
    ) -> tuple[Request, int] | None:
        """Who is reading what this request begins with, and where they part; that is worth waiting
        for, and marked to be kept."""
        best = 0 if found is None else found.position
        choice: tuple[Request, int] | None = None
        most = request.prompt_length - (not request.reading)
        for reader in readers:
            if reader.chain is None or reader.salt != request.salt:
                continue
            last = reader.prompt_length - (not reader.reading)
            if last - best < LEAST:
                continue
            at = min(shared(_chain(request), reader.chain), most, last)
            if at - best >= LEAST and reader.computed < at:
                best, choice = at, (reader, at)
        if choice is not None:
            reader, at = choice
            if at not in reader.wanted:
                reader.wanted = sorted([*reader.wanted, at])
        return choice

    def admit(self, request: Request, found: Checkpoint | None) -> None:
        """Begin with a checkpoint, or with nothing, and decide what to keep on the way."""
        chain = _chain(request)
        path = self._tree.known(chain)
        length = request.prompt_length
        parting = min(self._tree.parting(chain, path), length - 1)
        self._count(request, found, parting, path)
        if found is not None:
            self.tiers.give(found, request)
            self.sweep()
            request.cached = request.computed
        start = request.computed
        wanted = plan(
            length, start=start, boundaries=request.boundaries, every=self.every,
            whole=request.reading,
        )  # fmt: skip
        if parting - start >= LEAST and all(abs(parting - at) >= LEAST for at in wanted):
            wanted.append(parting)
        request.wanted = sorted(at for at in wanted if chain.key(at) not in self._by_key)

    def take(self, request: Request) -> None:
        """Keep the state of a running request if it has come to a position that is wanted."""
        while request.wanted and request.wanted[0] <= request.computed:
            if request.wanted.pop(0) == request.computed:
                checkpoint = self._new(request)
                if checkpoint is not None:
                    self._keep(checkpoint, request, self.tiers.take(checkpoint, request))

    def inherit(self, request: Request) -> Checkpoint | None:
        """Keep what a request that ends has in its slot, by letting the slot go over.

        A state with tokens that nobody knows, drawn after a stop that was found late, is not kept,
        nor one that is a single token farther than the last.
        """
        if request.computed < LEAST or request.computed > len(request.tokens):
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
            if checkpoint.position > position and not checkpoint.gone:
                self.tiers.drop(checkpoint)
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
                del self._by_key[checkpoint.key]
                assert checkpoint.block is not None
                self._tree.remove(checkpoint.block, checkpoint)
        self.tiers.lost.clear()

    def stats(self) -> CacheStats:
        """The counters, and what lies where."""
        tiers = self.tiers
        return CacheStats(
            queried=self.queried_tokens,
            saved=self.saved_tokens,
            hits=self.hits,
            misses=dict(self.misses),
            checkpoints={"device": len(tiers.device), "host": len(tiers.host)},
            bytes={"device": tiers.device_bytes, "host": tiers.host_bytes},
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
        self._number += 1
        return Checkpoint(self._number, key, request.computed)

    def _keep(self, checkpoint: Checkpoint, request: Request, kept: bool) -> None:
        if kept:
            self._by_key[checkpoint.key] = checkpoint
            checkpoint.block = self._tree.add(_chain(request), checkpoint)
            request.kept.append(checkpoint)
        self.sweep()

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
        elif self._tree.gone(_chain(request), path):
            self.misses["evicted"] += 1
        else:
            self.misses["parted" if parting >= LEAST else "new"] += 1


def _chain(request: Request) -> Chain:
    assert request.chain is not None, "a request without a chain"
    return request.chain
