"""The catalogue: which states lie in files, and where their tokens lead; the least recently used
first."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from server.engine.chain import BLOCK, STONE, Chain, milestone


@dataclass(slots=True, eq=False)
class Entry:
    """A file on the shelf: how many tokens its state has folded, and how large it is."""

    key: str
    block: str  # digest of the last whole block before its position
    trail: bytes  # what its milestones show
    position: int
    bytes: int

    def awaits(self, chain: Chain) -> bool:
        """Whether a sequence comes to it, or may if it goes on; one whose way is another may seem
        to, until it comes to a milestone."""
        known = len(chain.tokens)
        if known >= self.position:
            return chain.key(self.position) == self.key
        index = known // BLOCK
        if self.position // BLOCK == index:
            return chain.digest(index).hex() == self.block
        number, at = milestone(index)
        return self.trail[STONE * number : STONE * (number + 1)] == chain.digest(at)[:STONE]


@dataclass(slots=True, frozen=True)
class Outlook:
    """What lies ahead of the first `known` tokens of a sequence, after so many changes."""

    known: int
    changes: int
    entries: list[Entry]


class Catalogue:
    """Entries come and go from several threads."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.bytes = 0  # of entries, and of files that are being written
        self.changes = 0
        self._blocks: dict[str, set[str]] = {}  # keys by the block that they follow
        self._books = threading.RLock()

    def find(self, chain: Chain, most: int, least: int) -> Entry | None:
        """The farthest state on the way of a sequence between two positions."""
        if not self.entries:
            return None
        for index in range(most // BLOCK, least // BLOCK - 1, -1):
            keys = tuple(self._blocks.get(chain.digest(index).hex(), ()))  # threads take some away
            entries = [entry for key in keys if (entry := self.entries.get(key)) is not None]
            for entry in sorted(entries, key=lambda entry: -entry.position):
                if least <= entry.position <= most and chain.key(entry.position) == entry.key:
                    return entry
        return None

    def look(self, chain: Chain, before: Outlook | None = None) -> Outlook:
        """To which states a sequence may come if it goes on. `before` is what was to be seen when
        it was shorter: then only these are looked at."""
        known = len(chain.tokens)
        if before is not None and before.changes == self.changes:
            if before.known == known:
                return before
            changes, entries = before.changes, before.entries
        else:
            with self._books:
                changes, entries = self.changes, list(self.entries.values())
        ahead = [e for e in entries if e.position >= known and e.awaits(chain)]
        return Outlook(known, changes, ahead)

    def touch(self, key: str) -> None:
        """Make it the most recently used."""
        with self._books:
            if (entry := self.entries.pop(key, None)) is not None:
                self.entries[key] = entry

    def enter(self, entry: Entry) -> None:
        """Put an entry in, in place of one of its key."""
        with self._books:
            self.leave(entry.key)
            self.entries[entry.key] = entry
            self._blocks.setdefault(entry.block, set()).add(entry.key)
            self.bytes += entry.bytes
            self.changes += 1

    def leave(self, key: str) -> None:
        """Take an entry out, if it is there."""
        with self._books:
            entry = self.entries.pop(key, None)
            if entry is not None:
                self.changes += 1
                self.bytes -= entry.bytes
                self._blocks[entry.block].remove(key)
                if not self._blocks[entry.block]:
                    del self._blocks[entry.block]
