"""Patience: what a request does better to wait for before it begins.

For more of its prompt, while all that is known of it leads on to a state that was kept, or to what
another is reading; for a state on its way from the disk; for another request to come to where the
two part. It begins as soon as none of this can save it anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.engine.catalogue import Entry
from server.engine.chain import leads, shared
from server.engine.checkpoints import Checkpoints, chain_of
from server.engine.positions import LEAST
from server.engine.request import Request
from server.engine.tiers import Checkpoint
from server.protocol import Trouble


class Patience:
    """Asked of every request that waits, before every step."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def worth(self, request: Request, found: Checkpoint | None, readers: Iterable[Request]) -> bool:
        """Whether to wait; `found` is what it can begin with, readers are those who read now."""
        readers = list(readers)
        if self._leads_on(request, found) or self._follows(request, found, readers):
            if found is not None:
                self.checkpoints.tiers.touch(found)
            return True
        if self._fetch(request, found):
            return True
        request.waits = self._twin(request, found, readers)
        return request.waits is not None

    def _leads_on(self, request: Request, found: Checkpoint | None) -> bool:
        """Whether more of its prompt may lead to a state that it does not come to yet."""
        if not request.more:
            return False
        chain, known = chain_of(request), len(request.tokens)
        if self.checkpoints.tree.goes_on(chain, request.walk, max(LEAST, known)):
            return True
        disk = self.checkpoints.disk
        if disk is None:
            return False
        before = request.outlook
        request.outlook = look = disk.shelf.look(chain, before)
        least = LEAST + (0 if found is None else found.position)
        if look is not before:
            self._bring(request, [entry for entry in look.entries if entry.position >= least])
        return any(entry.position >= least for entry in look.entries)

    def _bring(self, request: Request, entries: list[Entry]) -> None:
        """Load one of the states that it may come to, while the rest of its prompt is still text:
        the farthest within what is expected of it, once half of its tokens are known to be right.
        At most one, and only where the host has room: if it is not needed, little is lost."""
        checkpoints, most = self.checkpoints, max(request.expected, len(request.tokens))
        entry = max(
            (entry for entry in entries if entry.position <= most),
            key=lambda entry: entry.position,
            default=None,
        )
        if entry is None or request.ahead or 2 * len(request.tokens) < entry.position:
            return
        if checkpoints.get(entry.key) is None and checkpoints.tiers.roomy(entry.position):
            request.ahead = entry.key
            self._load(request, entry)

    def _follows(
        self, request: Request, found: Checkpoint | None, readers: Iterable[Request]
    ) -> bool:
        """Whether all that is known of its prompt, or all that is known of another's, is the
        beginning of both, and the other is being read: where they part is not known yet."""
        chain, best = chain_of(request), 0 if found is None else found.position
        for reader in readers:
            if not (request.more or reader.more):
                continue
            if reader.chain is None or len(reader.tokens) - best < LEAST:
                continue
            reads = request.more and reader.computed < reader.most_cached
            if reads and leads(chain, reader.chain):
                return True
            if reader.more and leads(reader.chain, chain):
                return True
        return False

    def _fetch(self, request: Request, found: Checkpoint | None) -> bool:
        """Whether a state lies on the disk that is worth waiting for; it is loaded."""
        disk = self.checkpoints.disk
        if disk is None:
            return False
        least = LEAST if found is None else found.position + LEAST
        sought = disk.shelf.changes, request.most_cached, least
        if request.sought == sought:
            return False
        entry = disk.shelf.find(chain_of(request), request.most_cached, least)
        if entry is None or entry.key in request.tried:
            request.sought = sought
            return False
        request.fetches = entry.key
        request.tried.add(entry.key)
        self._load(request, entry)
        return True

    def _load(self, request: Request, entry: Entry) -> None:
        disk = self.checkpoints.disk
        assert disk is not None

        def then(trouble: Trouble | None) -> None:
            if request.fetches == entry.key:
                request.fetches = ""
            if trouble is not None:
                request.refused.append(entry)

        disk.load(entry.key, then)

    def _twin(
        self, request: Request, found: Checkpoint | None, readers: Iterable[Request]
    ) -> tuple[Request, int] | None:
        """Who is reading what this request begins with, and where they part; that is worth waiting
        for, and marked to be kept."""
        begin = best = 0 if found is None else found.position
        choice: tuple[Request, int] | None = None
        chain, most = chain_of(request), request.most_cached
        head = chain.head
        for reader in readers:
            if reader.chain is None or reader.chain.head != head:
                continue  # they part before LEAST
            last = reader.most_cached
            if last - best < LEAST or reader.computed >= last:
                continue
            at = min(shared(chain, reader.chain), most, last)
            if at - best >= LEAST and reader.computed < at:
                best, choice = at, (reader, at)
        if choice is not None:
            reader, at = choice
            at = _pause(reader, at, max(begin + LEAST, reader.computed + 1))
            if at not in reader.wanted:
                reader.wanted = sorted([*reader.wanted, at])
            choice = reader, at
        return choice


def _pause(reader: Request, at: int, least: int) -> int:
    """Where a reader pauses for one that parts from it there: not for each of many that part one
    after another, or it would read on by single tokens."""
    near = [other for other in reader.wanted if abs(other - at) < LEAST]
    if len(near) < 2 or at in near:
        return at
    before = max((other for other in near if other < at), default=at - at % LEAST)
    return before if before >= least else at
