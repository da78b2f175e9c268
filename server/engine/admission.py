"""Who may come in next: is there a slot, are there blocks, who must leave for it, is what it
begins with at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from server.engine.checkpoints import Checkpoints
from server.engine.patience import Patience
from server.engine.queue import RANK, Queue
from server.engine.request import Request
from server.engine.slots import Holdings
from server.engine.tiers import Checkpoint


class Admission:
    """Answers for the scheduler, whose queues it looks at. Checkpoints make room for requests,
    and so do requests for more urgent ones, as long as the host has room for their states."""

    def __init__(
        self,
        holdings: Holdings,
        checkpoints: Checkpoints | None,
        *,
        waiting: Queue,
        running: Queue,
        swapped: Queue,
        swap_bytes: int,
    ) -> None:
        self.holdings = holdings
        self.checkpoints = checkpoints
        self.patience = None if checkpoints is None else Patience(checkpoints)
        self.waiting = waiting
        self.running = running
        self.swapped = swapped
        self.swap_bytes = swap_bytes
        self._lent = False  # whether anyone has the urgency of another
        self._asleep: dict[tuple[Request, int] | str, list[Request]] = {}  # by what they wait for

    @property
    def swapped_bytes(self) -> int:
        """What the states of preempted requests take on the host."""
        return sum(self._saved_bytes(request) for request in self.swapped.order)

    def candidates(self) -> Iterator[Request]:
        """Who would come in, in order: the more urgent, then the preempted, then the older; but for
        those who wait for something that is still on its way."""
        self._wake()
        self._take_back()
        swapped = self.swapped.order.copy()
        waiting = (request for request in self.waiting.order.copy() if not request.asleep)
        next_one = next(waiting, None)
        while swapped or next_one is not None:
            first = min(swapped, key=RANK, default=None)  # may have become more urgent meanwhile
            if first is not None and (next_one is None or first.rank[0] <= next_one.rank[0]):
                swapped.remove(first)
                yield first
            elif next_one is not None:
                yield next_one
                next_one = next(waiting, None)

    def slot(self, request: Request) -> bool:
        """Whether a slot is free, or may become free of a checkpoint or a less urgent request."""
        return (
            self.holdings.slots.free > 0
            or (self.checkpoints is not None and bool(self.checkpoints.tiers.device))
            or (bool(self.running) and self.running.order[-1].rank[0] > request.rank[0])
        )

    def defer(self, request: Request, found: Checkpoint | None, readers: Iterable[Request]) -> bool:
        """Let a request wait when what it begins with lies on the disk, or is being read, or when
        more of its prompt may tell of more to begin with. Who reads it is as urgent meanwhile."""
        if self.patience is None or not self.patience.worth(request, found, readers):
            return False
        awaited = request.fetches or request.waits
        if awaited:
            request.asleep = True
            self._asleep.setdefault(awaited, []).append(request)
        if request.waits is not None:
            self._lend(request.waits[0], request.rank[0])
        return True

    def fits(self, request: Request, found: Checkpoint | None) -> bool:
        """Whether there is a slot and blocks for all of it, once checkpoints have made room. They
        make none for one who would not fit even so."""
        need = self._need(request, found)
        if self._hopeless(request, found, need):
            return False
        if self.checkpoints is not None:
            self.checkpoints.tiers.spared = found
        while not self.holdings.slots.free or self.holdings.blocks.free < need:
            if not self.evict():
                return False
        return True

    def leaving(self, request: Request, found: Checkpoint | None) -> list[Request]:
        """Who must leave so that one fits for whom checkpoints could not make room: of those that
        are less urgent the least urgent, youngest first. Who ends anyway once a step is collected
        is let end. Empty: it does not fit even so."""
        leaving: list[Request] = []
        slots, blocks = self.holdings.slots, self.holdings.blocks
        need, free = self._need(request, found), blocks.free
        owners: set[str] = set()
        room = self.swap_bytes - self.swapped_bytes
        for other in reversed(self.running.order):
            if other.rank[0] <= request.rank[0]:
                break
            size = self._saved_bytes(other)
            if size > room or other.ending:
                continue
            room -= size
            leaving.append(other)
            owners.add(other.id)
            need -= self.holdings.lacking(other)
            free += blocks.freed(other.blocks, owners)
            if slots.free + len(leaving) and free >= need:
                return leaving
        return []

    def evict(self) -> bool:
        """Clear the device of one checkpoint; False: there is none."""
        return self.checkpoints is not None and self.checkpoints.evict()

    def _wake(self) -> None:
        """Let those try again for whom what they wait for is there, or will not come: a state from
        the disk, or another request at the position where they part."""
        for awaited, requests in list(self._asleep.items()):
            if isinstance(awaited, str):
                waits = requests[0].fetches == awaited
            else:
                reader, position = awaited
                waits = reader.finish is None and position in reader.wanted
            if not waits:
                del self._asleep[awaited]
                for request in requests:
                    request.asleep, request.waits = False, None

    def _lend(self, reader: Request, urgency: int) -> None:
        if urgency < reader.rank[0]:
            queue = self.running if reader.id in self.running else self.swapped
            queue.rerank(reader, urgency)
            self._lent = True

    def _take_back(self) -> None:
        """Give everyone their own urgency again, but those who are still waited for."""
        if not self._lent:
            return
        self._lent = False
        for queue in (self.running, self.swapped):
            for reader in queue.order.copy():
                if reader.rank[0] != reader.priority:
                    queue.rerank(reader, reader.priority)
        for awaited, requests in self._asleep.items():
            if not isinstance(awaited, str):
                urgencies = (r.rank[0] for r in requests if r.finish is None)
                self._lend(awaited[0], min(urgencies, default=awaited[0].rank[0]))

    def _need(self, request: Request, found: Checkpoint | None) -> int:
        """Blocks that it takes, and that those who run may still take beside it."""
        need = self.holdings.lacking(request)
        if self.holdings.block_size:
            need += sum(self.holdings.lacking(other) for other in self.running.order)
        return need - (self.checkpoints.tiers.shared(found) if self.checkpoints else 0)

    def _hopeless(self, request: Request, found: Checkpoint | None, need: int) -> bool:
        """Whether those who run, none less urgent, leave too few blocks whoever else goes."""
        blocks, running = self.holdings.blocks, self.running.order
        if blocks.free >= need or not running or running[-1].rank[0] > request.rank[0]:
            return False
        stay = {block for other in running for block in other.blocks}
        if found is not None:
            stay.update(found.blocks)
        return blocks.total - len(stay) < need

    def _saved_bytes(self, request: Request) -> int:
        return self.holdings.bytes_for(request.computed) if request.computed else 0
