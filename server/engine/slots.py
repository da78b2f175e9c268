"""Who owns which state slot and which KV block: everything is taken and given back here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from model.chunk import Capacity, Copy, Place
from server.engine.request import Request


class Pool:
    """Things numbered 0 .. total - 1, each free or held by owners: free + held == total.

    A thing may be shared; it is free again when its last owner has given it back.
    """

    def __init__(self, noun: str, total: int) -> None:
        self.noun = noun
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._owners: dict[int, set[str]] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def held(self) -> int:
        return len(self._owners)

    def take(self, owner: str) -> int:
        """Any free one, the one given back last first."""
        if not self._free:
            raise RuntimeError(f"no {self.noun} is free of {self.total}")
        number = self._free.pop()
        self._owners[number] = {owner}
        return number

    def share(self, owner: str, numbers: Iterable[int]) -> None:
        """Hold what another holds, too."""
        for number in numbers:
            owners = self._owners[number]
            assert owner not in owners, f"{self.noun} {number} is held by {owner!r} already"
            owners.add(owner)

    def give_back(self, owner: str, numbers: Iterable[int]) -> None:
        """Return what `owner` holds; anything else is a mistake of ours and raises."""
        for number in numbers:
            owners = self._owners.get(number, set())
            if owner not in owners:
                held = f"held by {', '.join(map(repr, owners))}" if owners else "not held"
                raise RuntimeError(f"{self.noun} {number}, given back by {owner!r}, is {held}")
            owners.remove(owner)
            if not owners:
                del self._owners[number]
                self._free.append(number)

    def freed(self, numbers: Iterable[int], leaving: Set[str]) -> int:
        """How many of these nobody would hold any more if those owners left."""
        return sum(self._owners[number] <= leaving for number in numbers)

    def hand_over(self, owner: str, to: str, numbers: Sequence[int]) -> None:
        """Let another hold what `owner` held."""
        self.share(to, numbers)
        self.give_back(owner, numbers)

    def check(self) -> None:
        """Assert that nothing is lost and nothing is free and held."""
        assert self.free + self.held == self.total, (
            f"{self.noun}s: {self.free} free + {self.held} held != {self.total}"
        )
        assert self._owners.keys().isdisjoint(self._free), f"a free {self.noun} is held"


class Holdings:
    """State slots and KV blocks, as requests take them, save them and give them back."""

    def __init__(self, capacity: Capacity) -> None:
        self.slots = Pool("slot", capacity.slots)
        self.blocks = Pool("block", capacity.blocks)
        self.block_size = capacity.block_size if capacity.blocks else 0
        self.state_bytes = capacity.state_bytes
        self.block_bytes = capacity.block_bytes
        self.pinned = capacity.pinned
        state = capacity.state_bytes
        self._state_on_host = self._rounded(state) if capacity.block_bytes else state

    @property
    def most_positions(self) -> int | None:
        """How many positions one sequence can have if it holds every block; None: any number."""
        return self.blocks.total * self.block_size if self.block_size else None

    def blocks_for(self, positions: int) -> int:
        """How many blocks cover so many positions."""
        return -(-positions // self.block_size) if self.block_size else 0

    def bytes_for(self, positions: int) -> int:
        """What the state of so many positions takes on the host."""
        blocks = self._rounded(self.blocks_for(positions) * self.block_bytes)
        return self._state_on_host + blocks

    def lacking(self, request: Request) -> int:
        """Blocks that a request still lacks for its known and expected tokens and the next one."""
        known = max(len(request.tokens), request.expected)
        positions = min(known + 1, request.length_limit)
        return self.blocks_for(positions) - len(request.blocks)

    def reach(self, request: Request, count: int) -> int:
        """How many of the next `count` tokens its own and the free blocks can cover."""
        if not self.block_size:
            return count
        covered = (len(request.blocks) + self.blocks.free) * self.block_size
        return min(count, covered - request.computed)

    def admit(self, request: Request) -> None:
        """Take a slot."""
        assert request.slot is None, f"{request.id} has a slot"
        request.slot = self.slots.take(request.id)

    def cover(self, request: Request, positions: int) -> None:
        """Take the blocks that so many positions need beyond those already held."""
        while len(request.blocks) * self.block_size < positions and self.block_size:
            request.blocks.append(self.blocks.take(request.id))

    def release(self, request: Request) -> None:
        """Give back everything; a request that holds nothing is no error."""
        if request.slot is not None:
            self.slots.give_back(request.id, [request.slot])
            request.slot = None
        self.blocks.give_back(request.id, request.blocks)
        request.blocks = []  # a new list: chunks under way still refer to the old one

    def save(self, request: Request) -> list[Copy]:
        """Give back everything; the copies that keep the state on the host meanwhile."""
        copies = []
        if request.computed:
            copies.append(Copy(self.here(request, request.computed), saved(request)))
        self.release(request)
        return copies

    def restore(self, request: Request) -> list[Copy]:
        """Take a slot and blocks again; the copies that bring the state back."""
        self.admit(request)
        self.cover(request, request.computed)
        if not request.computed:
            return []
        here = self.here(request, request.computed)
        return [Copy(saved(request), here), Copy(saved(request), None)]

    def _rounded(self, size: int) -> int:
        """As the system gives out pinned memory, of which nobody knows the size beforehand."""
        return 1 << (size - 1).bit_length() if self.pinned and size else size

    def check(self) -> None:
        """Assert that nothing is lost and nothing is owned twice."""
        self.slots.check()
        self.blocks.check()

    def here(self, request: Request, position: int) -> Place:
        """Where a running request's state lies, as that of a position which it has come to or can
        be set back to."""
        blocks = tuple(request.blocks[: self.blocks_for(position)])
        return Place(slot=request.slot, blocks=blocks, position=position)


def saved(request: Request) -> Place:
    """Where the state of a preempted request lies on the host."""
    return Place(key=request.id, position=request.computed)
