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
from server.engine.shelf import Shelf
from server.engine.tiers import Checkpoint, Tiers
from server.engine.tree import Way
from server.protocol import Trouble

WORTH = 256  # tokens that a state must save to be kept for another life
MOST_SPILLS = 4  # images that may wait to be written; beyond, states are given up for good

WRONG = Trouble(507, "the step that made the state was lost")

Then = Callable[[Trouble | None], None]  # is told why not


@dataclass(slots=True)
class Saving:
    """An image that will be filled by the copies before the next step."""

    way: Way[Checkpoint]
    position: int
    salt: str
    image: Image
    told: list[Then]  # who asked for it
    filled: bool = False
    wrong: bool = False  # the state has turned out to be, and no file of it may stay

    def tell(self, trouble: Trouble | None) -> None:
        for then in self.told:
            then(trouble)


class Disk:
    """Moves states between the tiers and a shelf."""

    def __init__(
        self, shelf: Shelf, tiers: Tiers, way: Callable[[Checkpoint], Way[Checkpoint]],
        receive: Callable[[State], None],
    ) -> None:  # fmt: skip
        self.shelf = shelf
        self.tiers = tiers
        self._way = way
        self._receive = receive
        self._savings: dict[str, Saving] = {}  # whose images wait to be filled
        self._writing: dict[str, Saving] = {}
        self._spills = 0
        self._loads: dict[str, list[Then]] = {}
        tiers.spill = self.spill

    def loading(self, key: str) -> bool:
        """Whether a state is on its way."""
        return key in self._loads

    def spill(self, checkpoint: Checkpoint) -> None:
        """Save a state that the host is about to give up, if it is worth a file and few are being
        saved."""
        worth = checkpoint.position >= WORTH
        if not worth or checkpoint.key in self.shelf or self._spills >= MOST_SPILLS:
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
                    and not checkpoint.rested
                    and checkpoint.key not in self.shelf
                ):
                    checkpoint.rested = True
                    if self.tiers.hold(checkpoint):
                        self.spill(checkpoint)
                    return

    def discard(self, key: str) -> None:
        """A state has turned out to be wrong: no file of it may stay."""
        if key in self.shelf.entries:
            self.shelf.drop(key)
        if key in self._writing:
            self._writing[key].wrong = True
        if (saving := self._savings.pop(key, None)) is not None:
            saving.tell(WRONG)

    def save(self, checkpoint: Checkpoint, then: Then) -> None:
        """Save a state that lies on the host; once for all who ask meanwhile."""
        for savings in (self._savings, self._writing):
            saving = savings.get(checkpoint.key)
            if saving is not None and not saving.wrong:
                saving.told.append(then)
                return
        assert checkpoint.on_host
        image = Image()
        place = Place(image=image, position=checkpoint.position)
        self.tiers.copies.append(Copy(self.tiers.saved(checkpoint), place))
        self._savings[checkpoint.key] = Saving(
            self._way(checkpoint), checkpoint.position, checkpoint.salt, image, [then]
        )

    def copied(self) -> None:
        """The copies were carried out: what they have filled can be written."""
        for saving in self._savings.values():
            saving.filled = True
        self._write_filled()

    def _write_filled(self) -> None:
        """Begin to write what can be, one file of a name at a time."""
        for key, saving in list(self._savings.items()):
            if saving.filled and key not in self._writing:
                del self._savings[key]
                self._write(key, saving)

    def _write(self, key: str, saving: Saving) -> None:
        self._writing[key] = saving

        def then(trouble: Trouble | None) -> None:
            del self._writing[key]
            if saving.wrong:
                self.shelf.drop(key)
                trouble = trouble or WRONG
            saving.tell(trouble)
            self._write_filled()  # the same state made anew, if it has waited

        self.shelf.save(saving.way.chain, saving.position, saving.image, saving.salt, then)

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
