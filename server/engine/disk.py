"""The tier below the host: states go to the shelf and come back while others are computed.

A state leaves the host as an image, which the runner makes in the order of its copies; only then a
thread may write it. A state that comes back is put on the host, and into the index, when the
thread has read and checked it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from model.chunk import Copy, Image, Place
from server.engine.archive import State
from server.engine.chain import Chain
from server.engine.shelf import Shelf
from server.engine.tiers import Checkpoint, Tiers
from server.protocol import Trouble

WORTH = 256  # tokens that a state must save to be kept for another life
MOST_SPILLS = 4  # images that may wait to be written; beyond, states are given up for good

Then = Callable[[Trouble | None], None]  # is told why not


@dataclass(slots=True)
class Saving:
    """An image that will be filled by the copies before the next step."""

    chain: Chain
    position: int
    salt: str
    image: Image
    then: Then


class Disk:
    """Moves states between the tiers and a shelf."""

    def __init__(
        self, shelf: Shelf, tiers: Tiers, chain: Callable[[Checkpoint], Chain],
        receive: Callable[[State], None],
    ) -> None:  # fmt: skip
        self.shelf = shelf
        self.tiers = tiers
        self._chain = chain
        self._receive = receive
        self._savings: list[Saving] = []
        self._spills = 0
        self._writing: set[str] = set()
        self._discarded: set[str] = set()  # that are being saved, though they are wrong
        self._rested: set[str] = set()  # that were saved for want of anything else to do
        self._loads: dict[str, list[Then]] = {}
        tiers.spill = self.spill

    @property
    def waiting(self) -> bool:
        """Whether images will be filled by the next copies."""
        return bool(self._savings)

    def loading(self, key: str) -> bool:
        """Whether a state is on its way."""
        return key in self._loads

    def spill(self, checkpoint: Checkpoint) -> None:
        """Save a state that the host is about to give up, unless too many are being saved."""
        if checkpoint.key in self.shelf.entries or self._spills >= MOST_SPILLS:
            return
        self._spills += 1

        def then(_: Trouble | None) -> None:
            self._spills -= 1

        self.save(checkpoint, then)

    def rest(self) -> None:
        """With nothing to compute: save the most recently used state that the shelf lacks, so that
        it outlives the process."""
        if self._savings or self._spills:
            return
        for tier in (self.tiers.device, self.tiers.host):
            for checkpoint in reversed(tier):
                if (
                    checkpoint.position >= WORTH
                    and checkpoint.key not in self.shelf.entries
                    and checkpoint.key not in self._rested
                ):
                    self._rested.add(checkpoint.key)
                    if self.tiers.hold(checkpoint):
                        self.spill(checkpoint)
                    return

    def discard(self, key: str) -> None:
        """A state has turned out to be wrong: no file of it may stay."""
        if key in self.shelf.entries:
            self.shelf.drop(key)
        elif any(saving.chain.key(saving.position) == key for saving in self._savings) or (
            key in self._writing
        ):
            self._discarded.add(key)

    def save(self, checkpoint: Checkpoint, then: Then) -> None:
        """Save a state that lies on the host."""
        assert checkpoint.on_host
        image = Image()
        place = Place(image=image, position=checkpoint.position)
        self.tiers.copies.append(Copy(self.tiers.saved(checkpoint), place))
        chain = self._chain(checkpoint)
        self._savings.append(Saving(chain, checkpoint.position, checkpoint.salt, image, then))

    def copied(self) -> None:
        """The copies were carried out: what they have filled can be written."""
        savings, self._savings = self._savings, []
        for saving in savings:
            self._write(saving)

    def _write(self, saving: Saving) -> None:
        key = saving.chain.key(saving.position)
        self._writing.add(key)

        def then(trouble: Trouble | None) -> None:
            self._writing.discard(key)
            if key in self._discarded:
                self._discarded.remove(key)
                self.shelf.drop(key)
            saving.then(trouble)

        self.shelf.save(saving.chain, saving.position, saving.image, saving.salt, then)

    def load(self, key: str, then: Then) -> None:
        """Bring a state to the host; once for all who ask meanwhile."""
        if key in self._loads:
            self._loads[key].append(then)
            return
        self._loads[key] = [then]

        def end(came: State | Trouble) -> None:
            if isinstance(came, State):
                self._receive(came)
            for tell in self._loads.pop(key):
                tell(came if isinstance(came, Trouble) else None)

        self.shelf.load(key, end)
