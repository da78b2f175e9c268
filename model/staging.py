"""Staging: memory of the host, pinned beside a GPU, in which it says what each step is about, and
memory of the device to which a kernel of the step takes that.

So no copy is launched in front of a step, and graphs read what one is about: it lies at the same
place in every step of a size. A turn is a step, and both sides count them: the device as it takes
what was said, the host as soon as that is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch

from kernels import exchange
from model.sequences import Sequences

IN_FLIGHT = 4  # turns of the host's memory: more than steps that are under way at a time
ALIGNED = 16  # bytes, of which the place of every part is a multiple

Layout = Callable[[int], tuple[Sequence[int], Sequence[int]]]
"""How long the parts are that are said of a step of so many rows: of int64, its ids first, and of
int32, the slots of the first of these first."""


class Staging:
    """Of steps of up to `most` rows. Ids that are PENDING are taken as their slots drew them last.

    turn [1] int64, on the device: turns that were taken; turns: those that were launched.
    """

    def __init__(self, layout: Layout, most: int, sequences: Sequences) -> None:
        device, pinned = sequences.device, sequences.device.type == "cuda"
        self.turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.turns = 0
        self._layout = layout
        self._latest = sequences.latest
        words = self._places(most)[-1]
        self._said = torch.zeros(IN_FLIGHT, words, dtype=torch.int64, pin_memory=pinned)
        self._memory = torch.zeros(words, dtype=torch.int64, device=device)
        self._hosts: dict[int, list[list[np.ndarray]]] = {}  # by size and turn

    def next(self, size: int) -> list[np.ndarray]:
        """Where the host says what the step is about that is launched next, of this size. Whatever
        stood there, of steps of any size, is still there."""
        if size not in self._hosts:
            parts = [self._parts(said, size) for said in self._said]
            self._hosts[size] = [[x.numpy() for x in turn] for turn in parts]
        return self._hosts[size][self.turns % IN_FLIGHT]

    def launched(self) -> int:
        """What was said is taken by what was launched. Which of IN_FLIGHT turns that is."""
        self.turns += 1
        return (self.turns - 1) % IN_FLIGHT

    def take(self, size: int) -> list[torch.Tensor]:
        """On the device: what was said of this step. Its parts, which stay until the next one."""
        parts = self._parts(self._memory, size)
        memory = self._memory[: self._places(size)[-1]]
        slots = parts[len(self._layout(size)[0])]
        exchange.take(self._said, self.turn, self._latest, memory, slots)
        return parts

    def _places(self, size: int) -> list[int]:
        """Where parts begin, in words of 8 bytes, and where the last one ends."""
        wide, narrow = self._layout(size)
        counts = [(n, 8) for n in wide] + [(n, 4) for n in narrow]
        sizes = [-(-n * each // ALIGNED) * ALIGNED // 8 for n, each in counts]
        return list(accumulate(sizes, initial=0))

    def _parts(self, memory: torch.Tensor, size: int) -> list[torch.Tensor]:
        wide, narrow = self._layout(size)
        places = self._places(size)
        words = [memory[at : at + n] for at, n in zip(places, wide, strict=False)]
        numbers = memory.view(torch.int32)
        rest = zip(places[len(wide) :], narrow, strict=False)
        return words + [numbers[2 * at : 2 * at + n] for at, n in rest]
