"""What the device knows of the sequence in each slot beside its state: its KV blocks, and the id
that it drew last, which the next step may need before the host has read it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kernels.latest import remember, resolved
from model.chunk import Chunk
from model.transfer import upload


class Sequences:
    """One row a slot, and one for padding, whose slot is -1: what that draws is forgotten.

    latest: [1 + slots] int64, the ids; the first is that of padding.
    tables: [slots, most blocks] int32, the blocks of each slot's sequence in order.
    """

    BEFORE = 1  # rows before those of slots

    def __init__(self, slots: int, most_blocks: int, device: torch.device) -> None:
        self.device = device
        self.latest = torch.zeros(slots + self.BEFORE, dtype=torch.int64, device=device)
        self.tables = torch.full((slots, most_blocks), -1, dtype=torch.int32, device=device)
        self._known: list[Sequence[int]] = [() for _ in range(slots)]  # blocks that are in tables

    def keep(self, chunks: Sequence[Chunk]) -> None:
        """Take the blocks of chunks that are new since their slots were here last."""
        places: list[int] = []
        blocks: list[int] = []
        width = self.tables.shape[1]
        for chunk in chunks if width else ():
            known = self._known[chunk.slot]
            count = len(known) if _goes_on(chunk, known) else 0
            if count < len(chunk.blocks):
                new = chunk.blocks[count:]
                first = chunk.slot * width + count
                places += range(first, first + len(new))
                blocks += new
                self._known[chunk.slot] = list(chunk.blocks)
        if places:
            both = upload(np.array([places, blocks], dtype=np.int64), self.device)
            self.tables.view(-1).index_copy_(0, both[0], both[1].int())

    def forget(self, slot: int) -> None:
        """Another state was put into a slot."""
        self._known[slot] = ()

    def ids(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """ids [N], those that are PENDING replaced by what the slots of rows [N] drew last."""
        return resolved(ids, rows, self.latest)

    def drawn(self, rows: torch.Tensor, ids: torch.Tensor) -> None:
        """Remember what the slots of rows [N] drew."""
        remember(ids, rows, self.latest)

    @staticmethod
    def rows(slots: torch.Tensor) -> torch.Tensor:
        """slots [N] -> where they are remembered, [N] int64."""
        return slots.long() + Sequences.BEFORE


def _goes_on(chunk: Chunk, known: Sequence[int]) -> bool:
    """Whether a chunk's blocks are the known ones and perhaps more."""
    count = len(known)
    if chunk.start == 0 or not 0 < count <= len(chunk.blocks):
        return False
    return known[-1] == chunk.blocks[count - 1]
