"""Metadata: what a short step is about, in device memory that stays, so that graphs read it.

It is written on the host, a turn's after another's, and fetched by the graph that begins the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from kernels import exchange
from kernels.packing import ELSEWHERE, PADDING, Packing
from model.batch import Batch
from model.chunk import Chunk
from model.sequences import Sequences

IN_FLIGHT = 4  # turns of the host's memory: more than steps that are under way at a time
TAILS = 16  # sequences of more than one row, at most


class Views(NamedTuple):
    """Parts of one memory. ids, positions [rows] int64; asking, remembered [sequences] int64: the
    rows that ask, and where the ids lie that sequences of one row drew last; starts, ends [TAILS]
    int64, slots [sequences], tail_slots [TAILS], items [TAILS, 4] int32: see Batch and Packing."""

    ids: torch.Tensor
    positions: torch.Tensor
    asking: torch.Tensor
    remembered: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    slots: torch.Tensor
    tail_slots: torch.Tensor
    items: torch.Tensor


class Metadata:
    """Of steps of up to `rows` rows: of up to `most` sequences of one row, then of up to TAILS
    longer ones. Up to `most` rows ask."""

    def __init__(self, rows: int, most: int, sequences: Sequences) -> None:
        device, self._sequences = sequences.device, sequences
        self._wide = rows, rows, most, most, TAILS, TAILS
        self._narrow = most, TAILS, 4 * TAILS
        words = sum(self._wide) + -(-sum(self._narrow) // 2)
        self._memory = torch.zeros(words, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._said = torch.zeros(IN_FLIGHT, words, dtype=torch.int64, pin_memory=pinned)
        self._turn = torch.zeros(1, dtype=torch.int64, device=device)
        self._turns = 0
        self._hosts = [[x.numpy() for x in self._views(said)] for said in self._said]
        self._device = self._views(self._memory)
        self._cu_seqlens = torch.zeros(TAILS + 1, dtype=torch.int32, device=device)  # not read

    def _views(self, memory: torch.Tensor) -> Views:
        wide = sum(self._wide)
        words = memory[:wide].split(self._wide)
        numbers = memory[wide:].view(torch.int32)[: sum(self._narrow)].split(self._narrow)
        return Views(*words, *numbers[:2], numbers[2].view(-1, 4))  # type: ignore[call-arg]

    def serve(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step has not too many long sequences; of one row, and that ask, it has no more
        than there are slots."""
        return sum([len(chunk.tokens) > 1 for chunk in chunks]) <= len(self._device.tail_slots)

    def say(self, chunks: Sequence[Chunk], size: int) -> None:
        """Chunks, those of one token first, and padding up to `size` rows: what the step is about
        that is launched next."""
        turn = self._turns % IN_FLIGHT
        views = self._hosts[turn]
        ids, positions, asking, remembered, starts, ends, slots, tail_slots, items = views
        n = next((i for i, chunk in enumerate(chunks) if len(chunk.tokens) > 1), len(chunks))
        asks = [i for i, chunk in enumerate(chunks[:n]) if chunk.sampling is not None]
        if n:
            ids[:n] = [chunk.tokens[0] for chunk in chunks[:n]]
            positions[:n] = [chunk.start for chunk in chunks[:n]]
            slots[:n] = [chunk.slot for chunk in chunks[:n]]
            remembered[:n] = slots[:n] + Sequences.BEFORE
        remembered[n:] = 0
        tail_slots[:], items[:], items[:, 2] = PADDING, 0, range(TAILS)
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
        ids[row:size] = 0
        positions[row:size] = 0
        asking[: len(asks)], asking[len(asks) :] = asks, 0
        self._turns += 1

    def take(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """On the device: what was said of this step. Its ids and positions [size] int64, the ids as
        the slots drew them last."""
        exchange.fetch(self._said, self._turn, self._memory)
        views, n = self._device, min(size, len(self._device.slots))
        ids = views.ids[:size]
        ids[:n] = self._sequences.ids(ids[:n], views.remembered[:n])
        return ids, views.positions[:size]

    def of(self, batch: Batch) -> Batch:
        """A step of as many rows, as lightning attention is to read it: rows that are not the only
        ones of their sequence are nobody's among those that are."""
        views = self._device
        n = min(len(batch.ids), len(views.slots))
        packing = Packing((), self._cu_seqlens, views.slots[:n], batch.positions[:n])
        where = views.tail_slots, views.starts
        tail = Packing((), self._cu_seqlens, *where, items=views.items)
        return replace(batch, singles=n, packing=packing, tail=tail, ends=views.ends, tail_row=0)

    def gather(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """On the device: rows of x [size, ...] that ask, into out [asking, ...]."""
        n = min(len(x), len(out))
        torch.index_select(x, 0, self._device.asking[:n], out=out[:n])
