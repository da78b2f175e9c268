"""Who may come in next: is there a slot, are there blocks, is what it begins with at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from server.engine.checkpoints import Checkpoints
from server.engine.patience import Patience
from server.engine.request import Request
from server.engine.slots import Holdings
from server.engine.tiers import Checkpoint


class Admission:
    """Answers for the scheduler, whose queues it looks at. Checkpoints make room for requests."""

    def __init__(
        self, holdings: Holdings, checkpoints: Checkpoints | None, running: Mapping[str, Request]
    ) -> None:
        self.holdings = holdings
        self.checkpoints = checkpoints
        self.patience = None if checkpoints is None else Patience(checkpoints)
        self.running = running

    def slot(self) -> bool:
        """Whether a slot is free, or becomes free of a checkpoint."""
        return self.holdings.slots.free > 0 or (
            self.checkpoints is not None and bool(self.checkpoints.tiers.device)
        )

    def waits(self, request: Request) -> bool:
        """Whether what this one waits for is still on its way: a state from the disk, or another
        request to the position where they part."""
        if request.fetches:
            return True
        if request.waits is not None:
            reader, position = request.waits
            if reader.finish is None and position in reader.wanted:
                return True
            request.waits = None
        return False

    def defer(self, request: Request, found: Checkpoint | None, readers: Iterable[Request]) -> bool:
        """Let a request wait when what it begins with lies on the disk, or is being read, or when
        more of its prompt may tell of more to begin with."""
        return self.patience is not None and self.patience.worth(request, found, readers)

    def fits(self, request: Request, found: Checkpoint | None) -> bool:
        """Whether there is a slot and blocks for all of it, once checkpoints have made room."""
        need = self.holdings.lacking(request)
        if self.holdings.block_size:
            need += sum(self.holdings.lacking(other) for other in self.running.values())
        if self.checkpoints is not None:
            need -= self.checkpoints.tiers.shared(found)
            self.checkpoints.tiers.spared = found
        while not self.holdings.slots.free or self.holdings.blocks.free < need:
            if not self.evict():
                return False
        return True

    def evict(self) -> bool:
        """Clear the device of one checkpoint; False: there is none."""
        return self.checkpoints is not None and self.checkpoints.evict()
