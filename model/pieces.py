"""Steps of any chunks as CUDA graphs in pieces: captured at start-up, a chain for each of a ladder
of row counts.

Attention alone asks which rows are of one sequence. So what lies between two attentions is a graph,
replayed for the next number of rows up, and attention is launched between them as the step has it,
over the rows that there are. Rows of padding hold whatever was there, and no other row sees them.

A step of few rows takes the device less time than launching attention in every layer takes the
host. For such steps there is a second chain, of which lightning attention is a part: it reads where
rows go from memory that is filled before (Metadata), and cuts no sequence.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from kernels.packing import ELSEWHERE, PADDING, Packing
from model.batch import Attention, Batch, Heads, Recorder
from model.chunk import Chunk
from model.families import Family
from model.graphs import Folded, alias, ladder
from model.lightning import Lightning
from model.sequences import Sequences
from model.store import Store

APART = 16  # rows: sizes are multiples of it
FEW = 1024  # rows of a step whose lightning attention is part of its graphs, at most
TAILS = 16  # and its sequences of more than one row


@contextmanager
def _no_collection() -> Iterator[None]:
    """What is garbage goes now or later: no graph may end while another is captured."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _pass_over(attention: Attention, heads: Heads) -> None:
    """Attention is compiled by steps that are not captured."""


@dataclass(slots=True, frozen=True, eq=False)
class Piece:
    """A graph, and the attention that follows it."""

    graph: torch.cuda.CUDAGraph
    attention: Attention
    heads: Heads


@dataclass(slots=True, frozen=True, eq=False)
class Chain:
    """Family.fold for one number of rows: pieces, the graph that ends it, and what that gives."""

    pieces: list[Piece]
    last: torch.cuda.CUDAGraph
    folded: Folded


class Metadata:
    """Where the rows of a step go, in memory that stays: of up to `singles` sequences of one row,
    then of up to TAILS longer ones."""

    def __init__(self, singles: int, device: torch.device) -> None:
        self._singles = singles
        words = 2 * TAILS + -(-(singles + 5 * TAILS) // 2)
        self._memory = torch.zeros(words, dtype=torch.int64, device=device)
        self._cu_seqlens = torch.zeros(TAILS + 1, dtype=torch.int32, device=device)  # not read
        self.fill((), 0)

    def _views(self, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """starts and ends [TAILS] int64, slots of singles and tails, items [TAILS, 4] int32."""
        words, numbers = memory[: 2 * TAILS], memory[2 * TAILS :].view(torch.int32)
        slots, rest = numbers[: self._singles], numbers[self._singles :]
        return *words.view(2, TAILS), slots, rest[:TAILS], rest[TAILS : 5 * TAILS].view(TAILS, 4)

    def serve(self, batch: Batch) -> bool:
        """Whether a step has not too many sequences."""
        return len(batch.packing.lengths) - batch.singles <= TAILS

    def fill(self, chunks: Sequence[Chunk], singles: int) -> None:
        """Say where the rows of chunks go, of which the first have one row each, by one copy."""
        device = self._memory.device
        host = torch.zeros(self._memory.shape, dtype=torch.int64, pin_memory=device.type == "cuda")
        starts, ends, slots, tail_slots, items = (x.numpy() for x in self._views(host))
        slots[singles:], tail_slots[:], items[:, 2] = PADDING, PADDING, range(TAILS)
        if singles:
            slots[:singles] = [chunk.slot for chunk in chunks[:singles]]
        tail = chunks[singles:]
        if tail:
            n = len(tail)
            tail_slots[:n] = [chunk.slot for chunk in tail]
            starts[:n] = [chunk.start for chunk in tail]
            lengths = [len(chunk.tokens) for chunk in tail]
            ends[:n] = starts[:n] + lengths
            slots[singles : singles + sum(lengths)] = ELSEWHERE
            rows = accumulate(lengths[:-1], initial=singles)
            cut = [
                (row, length, i, 1)
                for i, (row, length) in enumerate(zip(rows, lengths, strict=True))
            ]
            items[:n] = sorted(cut, key=lambda item: -item[1])
        self._memory.copy_(host, non_blocking=True)

    def of(self, batch: Batch) -> Batch:
        """A step of as many rows, as lightning attention is to read it: rows that are not the only
        ones of their sequence are nobody's among those that are."""
        starts, ends, slots, tail_slots, items = self._views(self._memory)
        singles = min(len(batch.ids), self._singles)
        return replace(
            batch,
            singles=singles,
            packing=Packing((), self._cu_seqlens, slots[:singles], batch.positions[:singles]),
            tail=Packing((), self._cu_seqlens, tail_slots, starts, items=items),
            ends=ends,
            tail_row=0,
        )


class PiecewiseGraphs:
    """The chains of one model with its store, for steps of up to `most` rows."""

    def __init__(self, model: Family, store: Store, sequences: Sequences, most: int) -> None:
        self.sizes = ladder(most, (APART,), APART)
        self._model = model
        self._store = store
        self._sequences = sequences
        self._ids = torch.zeros(most, dtype=torch.int64, device=store.device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=store.device)
        self._metadata = Metadata(store.slots.count, store.device)
        self._chains: dict[int, Chain] = {}
        self._short: dict[int, Chain] = {}  # of few rows, with lightning attention inside

    @torch.inference_mode()
    def capture(self) -> None:
        """Run each size once, which compiles, then record it; the largest first, whose memory the
        others use too."""
        for size in self.sizes:
            self._model.fold(self._padded(size, size <= FEW, _pass_over), self._store)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle()
        with _no_collection(), torch.cuda.stream(torch.cuda.Stream(self._store.device)):
            for size in reversed(self.sizes):
                self._record(size, pool)
        torch.cuda.synchronize()

    def _padded(self, size: int, short: bool, pause: Recorder) -> Batch:
        """A step of so many rows, of nobody. pause: instead of attention that is no part of it."""
        anyone = Batch.pack([Chunk(tokens=[0, 0], start=0, slot=0)], self._sequences)
        batch = replace(anyone, ids=self._ids[:size], positions=self._positions[:size])
        if not short:
            return replace(batch, recorder=pause)
        placed = self._metadata.of(batch)

        def record(attention: Attention, heads: Heads) -> None:
            if isinstance(attention, Lightning):
                attention(heads, placed, self._store)
            else:
                pause(attention, heads)

        return replace(placed, recorder=record)

    def _record(self, size: int, pool: Any) -> None:
        """The chains of one size."""
        self._chains[size] = self._chain(size, False, pool)
        if size <= FEW:
            self._short[size] = self._chain(size, True, pool)

    def _chain(self, size: int, short: bool, pool: Any) -> Chain:
        pieces: list[Piece] = []
        graph = torch.cuda.CUDAGraph()

        def pause(attention: Attention, heads: Heads) -> None:
            nonlocal graph
            graph.capture_end()
            pieces.append(Piece(graph, attention, Heads(*map(alias, heads.tensors))))
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool)

        batch = self._padded(size, short, pause)
        graph.capture_begin(pool=pool)
        x, mixed = self._model.fold(batch, self._store)
        graph.capture_end()
        return Chain(pieces, graph, (alias(x), alias(mixed)))

    @property
    def gives(self) -> Folded:
        """What fold gives of one row."""
        x, mixed = self._chains[self.sizes[0]].folded
        return x[:1], mixed[:1]

    def serve(self, batch: Batch) -> bool:
        """Whether a step is one of theirs."""
        return len(batch.ids) <= self.sizes[-1]

    def fold(self, batch: Batch, chunks: Sequence[Chunk]) -> Folded:
        """Family.fold of a step of these chunks; what it gives is theirs until the next step."""
        T = len(batch.ids)
        size = self.sizes[bisect_left(self.sizes, T)]
        self._ids[:T].copy_(batch.ids)
        self._positions[:T].copy_(batch.positions)
        chain = self._chains[size]
        if size in self._short and self._metadata.serve(batch):
            chain = self._short[size]
            self._metadata.fill(chunks, batch.singles)
        for p in chain.pieces:
            p.graph.replay()
            p.attention(p.heads[:T], batch, self._store)
        chain.last.replay()
        x, mixed = chain.folded
        return x[:T], mixed[:T]
