"""Metadata: what a short step is about, in device memory that stays, so that graphs read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from kernels.packing import ELSEWHERE, PADDING, Packing
from model.batch import Batch
from model.chunk import Chunk
from model.sequences import Sequences
from model.staging import Staging

TAILS = 16  # sequences of more than one row, at most


class Views(NamedTuple):
    """What a step of T rows is about, of which the first n = min(T, most) may be of sequences of
    one row: ids, positions [T] int64; asking [n] int64, the rows that ask; starts, ends [TAILS]
    int64; slots [n], tail_slots [TAILS], items [4 * TAILS] int32: see Batch and Packing."""

    ids: torch.Tensor
    positions: torch.Tensor
    asking: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    slots: torch.Tensor
    tail_slots: torch.Tensor
    items: torch.Tensor


class Metadata:
    """Of steps of up to `rows` rows: of up to `most` sequences of one row, then of up to TAILS
    longer ones. Up to `most` rows ask."""

    def __init__(self, rows: int, most: int, sequences: Sequences) -> None:
        self._most, self._tails = most, TAILS
        self._staging = Staging(self._layout, rows, sequences)
        nobodys = torch.zeros(TAILS + 1, dtype=torch.int32, device=sequences.device)
        self._cu_seqlens = nobodys  # see Packing.items

    def _layout(self, size: int) -> tuple[Sequence[int], Sequence[int]]:
        ones, tails = min(size, self._most), self._tails
        return (size, size, ones, tails, tails), (ones, tails, 4 * tails)

    def serve(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step has not too many long sequences; of one row, and that ask, it has no more
        than there are slots."""
        return sum([len(chunk.tokens) > 1 for chunk in chunks]) <= self._tails

    def say(self, chunks: Sequence[Chunk], size: int) -> None:
        """Chunks, those of one token first, and padding up to `size` rows: what the step is about
        that is launched next."""
        ids, positions, asking, starts, ends, slots, tail_slots, items = self._staging.next(size)
        n = next((i for i, chunk in enumerate(chunks) if len(chunk.tokens) > 1), len(chunks))
        asks = [i for i, chunk in enumerate(chunks[:n]) if chunk.sampling is not None]
        if n:
            ids[:n] = [chunk.tokens[0] for chunk in chunks[:n]]
            positions[:n] = [chunk.start for chunk in chunks[:n]]
            slots[:n] = [chunk.slot for chunk in chunks[:n]]
        items = items.reshape(-1, 4)
        tail_slots[:], items[:], items[:, 2] = PADDING, 0, range(self._tails)
        cut = []
        row = n
        for i, chunk in enumerate(chunks[n:]):
            count = len(chunk.tokens)
            end = row + count
            ids[row:end] = chunk.tokens
            starts[i], ends[i] = chunk.start, chunk.start + count
            positions[row:end] = np.arange(chunk.start, chunk.start + count)
            tail_slots[i] = chunk.slot
            cut.append((row, count, i, 1))
            if chunk.sampling is not None:
                asks.append(end - 1)
            row = end
        starts[len(cut) :] = 0
        if cut:
            items[: len(cut)] = sorted(cut, key=lambda item: -item[1])
        slots[n:row], slots[row:] = ELSEWHERE, PADDING
        ids[row:] = 0
        positions[row:] = 0
        asking[: len(asks)], asking[len(asks) :] = asks, 0

    def launched(self) -> None:
        """What was said is taken by what was launched."""
        self._staging.launched()

    def take(self, size: int) -> Views:
        """On the device: what was said of this step."""
        return Views(*self._staging.take(size))

    def of(self, batch: Batch, views: Views) -> Batch:
        """A step of as many rows, as lightning attention is to read it: rows that are not the only
        ones of their sequence are nobody's among those that are."""
        n = len(views.slots)
        packing = Packing((), self._cu_seqlens, views.slots, views.positions[:n])
        where = views.tail_slots, views.starts
        tail = Packing((), self._cu_seqlens, *where, items=views.items.view(-1, 4))
        return replace(
            batch,
            ids=views.ids,
            positions=views.positions,
            singles=n,
            packing=packing,
            tail=tail,
            ends=views.ends,
            tail_row=0,
        )

    @staticmethod
    def gather(x: torch.Tensor, views: Views, out: torch.Tensor) -> None:
        """On the device: rows of x [T, ...] that ask, into out [most, ...]."""
        n = len(views.asking)
        assert n <= len(out)
        torch.index_select(x, 0, views.asking, out=out[:n])
