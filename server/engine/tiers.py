"""Where checkpoints lie: device slots, then host memory; taken, moved down and given up here.

A tier is filled from the least recently used end: what leaves the device goes to the host while
that has room, which it makes by giving up the least recently used of its own. Copies are only
listed here, in an order that is right when they are carried out in that order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from model.chunk import Capacity, Copy, Image, Place
from server.engine.request import Request
from server.engine.slots import Holdings
from server.engine.tree import Block


@dataclass(slots=True, eq=False)
class Checkpoint:
    """A state at an exact position of a sequence, in one tier or several.

    `block` is where it hangs in the tree. While pins > 0 the host may not give it up. `salt` is a
    digest.
    """

    number: int
    key: str
    position: int
    salt: str = ""
    block: Block[Checkpoint] | None = None
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    on_host: bool = False
    pins: int = 0
    rested: bool = False  # was saved for want of anything else to do
    fresh: bool = False  # came from the disk, and nobody has begun with it yet

    @property
    def name(self) -> str:
        """As an owner of slots and blocks, and as a key on the host."""
        return f"checkpoint {self.number}"

    @property
    def tier(self) -> str:
        """Where it is taken from by who begins with it now."""
        if self.fresh:
            return "disk"
        return "host" if self.slot is None else "device"

    @property
    def gone(self) -> bool:
        """Whether it lies nowhere any more."""
        return self.slot is None and not self.on_host


class Tiers:
    """The checkpoints of each tier, least recently used first, and the bytes that they take."""

    def __init__(
        self, capacity: Capacity, holdings: Holdings, copies: list[Copy], *, host_bytes: int
    ) -> None:
        self.capacity = capacity
        self.holdings = holdings
        self.host_budget = host_bytes
        self.host_bytes = 0
        self.device: dict[Checkpoint, None] = {}
        self.host: dict[Checkpoint, None] = {}
        self._blocks: Counter[int] = Counter()  # KV blocks and how many checkpoints hold each
        self.copies = copies  # shared with all who list copies: their order counts
        self.spill: Callable[[Checkpoint], None] | None = None  # before the host gives one up
        self.spared: Checkpoint | None = None  # about to be given to someone: stays where it is
        self.lost: list[Checkpoint] = []  # given up, for whoever keeps an index

    def bytes_of(self, position: int) -> int:
        """What a state of so many tokens takes on the host, with its tokens."""
        return self.holdings.bytes_for(position) + 4 * position

    @property
    def device_bytes(self) -> int:
        """Of slots and KV blocks that checkpoints hold, shared ones counted once."""
        states = len(self.device) * self.capacity.state_bytes
        return states + len(self._blocks) * self.capacity.block_bytes

    def touch(self, checkpoint: Checkpoint) -> None:
        """Make it the most recently used of its tiers."""
        for tier in (self.device, self.host):
            if checkpoint in tier:
                del tier[checkpoint]
                tier[checkpoint] = None

    def take(self, checkpoint: Checkpoint, request: Request) -> bool:
        """Copy a running request's state, on the device if it can be; whether it lies anywhere."""
        source = self.holdings.here(request, checkpoint.position)
        if self.holdings.slots.free or self.evict():
            checkpoint.slot = self.holdings.slots.take(checkpoint.name)
            self._share_blocks(checkpoint, request)
            self.copies.append(Copy(source, self.here(checkpoint), True))
            self.device[checkpoint] = None
            return True
        return self._to_host(checkpoint, source)

    def inherit(self, checkpoint: Checkpoint, request: Request) -> None:
        """Take over an ending request's own slot: nothing is copied."""
        assert request.slot is not None
        self.holdings.slots.hand_over(request.id, checkpoint.name, [request.slot])
        checkpoint.slot, request.slot = request.slot, None
        self._share_blocks(checkpoint, request)
        self.device[checkpoint] = None

    def give(self, checkpoint: Checkpoint, request: Request) -> None:
        """Let a request that has taken its slot begin with the checkpoint's state."""
        size = self.holdings.block_size
        if checkpoint.slot is not None and size:
            whole = checkpoint.blocks[: checkpoint.position // size]
            self.holdings.blocks.share(request.id, whole)
            request.blocks += whole
        self.holdings.cover(request, checkpoint.position)
        request.computed = checkpoint.position
        here = self.holdings.here(request, checkpoint.position)
        if checkpoint.slot is not None:
            self.copies.append(Copy(self.here(checkpoint), here, True))
        else:
            assert checkpoint.on_host
            self.copies.append(Copy(self.saved(checkpoint), here, True))
            if self.holdings.slots.free:  # the next one will not have to fetch it again
                checkpoint.slot = self.holdings.slots.take(checkpoint.name)
                self._share_blocks(checkpoint, request)
                self.copies.append(Copy(here, self.here(checkpoint), True))
                self.device[checkpoint] = None
        self.touch(checkpoint)

    def lift(self, checkpoint: Checkpoint) -> None:
        """Put one from the disk on the device as well, where the host is too small to keep it until
        it is asked for. Not one with KV blocks, nor into the only slot."""
        if (
            self.holdings.block_size
            or self.holdings.slots.total == 1
            or checkpoint.slot is not None
        ):
            return
        if self.holdings.slots.free or self.evict():
            checkpoint.slot = self.holdings.slots.take(checkpoint.name)
            self.copies.append(Copy(self.saved(checkpoint), self.here(checkpoint), True))
            self.device[checkpoint] = None

    def evict(self) -> bool:
        """Clear the device of its least recently used checkpoint; False: there is none."""
        for checkpoint in self.device:
            if checkpoint is not self.spared:
                if not checkpoint.on_host:
                    self._to_host(checkpoint, self.here(checkpoint))
                self._leave_device(checkpoint)
                self._account(checkpoint)
                return True
        return False

    @property
    def movable(self) -> bool:
        """Whether one would leave the device now, and the host has room for it."""
        one = next((c for c in self.device if c is not self.spared), None)
        if one is None or one.on_host:
            return one is not None
        return self._leaving(self.bytes_of(one.position)) is not None

    def hold(self, checkpoint: Checkpoint, *, force: bool = False) -> bool:
        """See that it lies on the host, if need be beyond the budget; whether it does."""
        if checkpoint.on_host:
            return True
        if self._to_host(checkpoint, self.here(checkpoint)):
            return True
        if force:
            self.copies.append(Copy(self.here(checkpoint), self.saved(checkpoint), True))
            self._enter_host(checkpoint)
        return force

    def receive(self, checkpoint: Checkpoint, image: Image, *, force: bool = False) -> bool:
        """Put a state from outside on the host; whether there is room."""
        if not self._host_room(self.bytes_of(checkpoint.position)) and not force:
            return False
        place = Place(image=image, position=checkpoint.position)
        self.copies.append(Copy(place, self.saved(checkpoint)))
        self._enter_host(checkpoint)
        return True

    def roomy(self, position: int) -> bool:
        """Whether the host could take a state of so many tokens beside those that must stay."""
        pinned = sum(self.bytes_of(c.position) for c in self.host if c.pins)
        return pinned + self.bytes_of(position) <= self.host_budget

    def trim(self) -> None:
        """Come back within the budget of the host, after a pin is gone: as far as pins let it."""
        while self.host_bytes > self.host_budget and (one := next(self._loose(), None)) is not None:
            self._give_up(one)

    def shared(self, checkpoint: Checkpoint | None) -> int:
        """How many KV blocks a request need not take that begins with the checkpoint."""
        if checkpoint is None or checkpoint.slot is None or not self.holdings.block_size:
            return 0
        return checkpoint.position // self.holdings.block_size

    def drop(self, checkpoint: Checkpoint) -> None:
        """Give it up in every tier."""
        if checkpoint.slot is not None:
            self._leave_device(checkpoint)
        if checkpoint.on_host:
            self._leave_host(checkpoint)
        self._account(checkpoint)

    def check(self) -> None:
        """Assert that the books are right."""
        assert all(checkpoint.slot is not None for checkpoint in self.device)
        assert all(checkpoint.on_host for checkpoint in self.host)
        assert self.host_bytes == sum(self.bytes_of(c.position) for c in self.host)
        assert self._blocks == Counter(block for c in self.device for block in c.blocks)
        pinned = sum(self.bytes_of(c.position) for c in self.host if c.pins)
        assert self.host_bytes - pinned <= self.host_budget

    def _share_blocks(self, checkpoint: Checkpoint, request: Request) -> None:
        if not self.holdings.block_size:
            return
        blocks = request.blocks[: self.holdings.blocks_for(checkpoint.position)]
        self.holdings.blocks.share(checkpoint.name, blocks)
        checkpoint.blocks = list(blocks)
        self._blocks.update(blocks)

    def _to_host(self, checkpoint: Checkpoint, source: Place) -> bool:
        size = self.bytes_of(checkpoint.position)
        if not self._host_room(size):
            return False
        self.copies.append(Copy(source, self.saved(checkpoint), True))
        self._enter_host(checkpoint)
        return True

    def _enter_host(self, checkpoint: Checkpoint) -> None:
        checkpoint.on_host = True
        self.host[checkpoint] = None
        self.host_bytes += self.bytes_of(checkpoint.position)

    def _host_room(self, size: int) -> bool:
        """Give up the least recently used until so many bytes fit; False, and nothing given up,
        when they cannot."""
        leaving = self._leaving(size)
        for checkpoint in leaving or ():
            self._give_up(checkpoint)
        return leaving is not None

    def _leaving(self, size: int) -> list[Checkpoint] | None:
        """Whom the host would give up for so many bytes; None: it has no room for them."""
        free = self.host_budget - self.host_bytes
        leaving: list[Checkpoint] = []
        candidates = self._loose()
        while free < size:
            checkpoint = next(candidates, None)
            if checkpoint is None:
                return None
            leaving.append(checkpoint)
            free += self.bytes_of(checkpoint.position)
        return leaving

    def _loose(self) -> Iterator[Checkpoint]:
        """Those that the host may give up, least recently used first."""
        return (c for c in self.host if not c.pins and c is not self.spared)

    def _give_up(self, checkpoint: Checkpoint) -> None:
        if self.spill is not None and checkpoint.slot is None:
            self.spill(checkpoint)
        self._leave_host(checkpoint)
        self._account(checkpoint)

    def _leave_device(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.slot is not None
        self.holdings.slots.give_back(checkpoint.name, [checkpoint.slot])
        checkpoint.slot = None
        if checkpoint.blocks:
            self.holdings.blocks.give_back(checkpoint.name, checkpoint.blocks)
            self._blocks.subtract(checkpoint.blocks)
            for block in checkpoint.blocks:
                if not self._blocks[block]:
                    del self._blocks[block]
            checkpoint.blocks = []
        del self.device[checkpoint]

    def _leave_host(self, checkpoint: Checkpoint) -> None:
        self.copies.append(Copy(self.saved(checkpoint), None))
        checkpoint.on_host = False
        del self.host[checkpoint]
        self.host_bytes -= self.bytes_of(checkpoint.position)

    def _account(self, checkpoint: Checkpoint) -> None:
        if checkpoint.gone:
            self.lost.append(checkpoint)

    def here(self, checkpoint: Checkpoint) -> Place:
        """Its place on the device."""
        return Place(
            slot=checkpoint.slot, blocks=tuple(checkpoint.blocks), position=checkpoint.position
        )

    def saved(self, checkpoint: Checkpoint) -> Place:
        """Its place on the host."""
        return Place(key=checkpoint.name, position=checkpoint.position)
