"""Steps of any chunks as CUDA graphs in pieces: captured at start-up, a chain for each of a ladder
of row counts.

Attention alone asks which rows are of one sequence. So what lies between two attentions is a graph,
replayed for the next number of rows up, and attention is launched between them as the step has it,
over the rows that there are. Rows of padding hold whatever was there, and no other row sees them.

A short step, of few rows, takes the device less time than launching attention in every layer takes
the host. For such steps there is a second chain, of which lightning attention is a part: it reads
where rows go from memory that is filled before (Metadata), and cuts no sequence. It begins by
fetching that from the host, and ends by putting rows that ask where the end of a step begins.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from model.batch import Attention, Batch, Heads, Recorder
from model.chunk import Chunk
from model.families import Family
from model.graphs import Folded, alias, ladder
from model.lightning import Lightning
from model.metadata import Metadata
from model.sequences import Sequences
from model.store import Store

APART = 16  # rows: sizes are multiples of it
SHORT = 1024  # rows of a short step, at most


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
    """Attention, and the graph that follows it."""

    attention: Attention
    heads: Heads
    graph: torch.cuda.CUDAGraph


@dataclass(slots=True, frozen=True, eq=False)
class Chain:
    """Family.fold for one number of rows: the graph that begins it, pieces, and what they give."""

    first: torch.cuda.CUDAGraph
    pieces: list[Piece]
    folded: Folded


class PiecewiseGraphs:
    """The chains of one model with its store, for steps of up to `most` rows.

    asked: [slots, ...] where short steps leave what fold gives of rows that ask.
    """

    def __init__(self, model: Family, store: Store, sequences: Sequences, most: int) -> None:
        self.sizes = ladder(most, (APART,), APART)
        self.asked: Folded = ()
        self._model = model
        self._store = store
        self._sequences = sequences
        self._ids = torch.zeros(most, dtype=torch.int64, device=store.device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=store.device)
        rows = max(size for size in self.sizes if size <= SHORT)
        self._metadata = Metadata(rows, store.slots.count, sequences)
        self._nobody = Batch.pack([Chunk(tokens=[0, 0], start=0, slot=0)], sequences)
        self._chains: dict[int, Chain] = {}
        self._short: dict[int, Chain] = {}  # of short steps, with lightning attention inside

    @torch.inference_mode()
    def capture(self) -> None:
        """Run each size once, which compiles, then record it; the largest first, whose memory the
        others use too."""
        self.prepare()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle()
        with _no_collection(), torch.cuda.stream(torch.cuda.Stream(self._store.device)):
            for size in reversed(self.sizes):
                self.record(size, pool)
        torch.cuda.synchronize()

    def prepare(self) -> None:
        """Run each size once, for nobody."""
        folded = self._fold(self.sizes[0], False, _pass_over)
        slots = self._store.slots.count
        self.asked = tuple(x.new_zeros(slots, *x.shape[1:]) for x in folded)
        for size in self.sizes:
            if size <= SHORT:
                self._metadata.say((), size)
            self._fold(size, size <= SHORT, _pass_over)
            if size <= SHORT:
                self._metadata.launched()
            if self._store.device.type == "cuda":
                torch.cuda.synchronize()  # what was said is taken

    def record(self, size: int, pool: Any) -> None:
        """The chains of one size."""
        self._chains[size] = self._chain(size, False, pool)
        if size <= SHORT:
            self._short[size] = self._chain(size, True, pool)

    def _fold(self, size: int, short: bool, pause: Recorder) -> Folded:
        """Family.fold of a step of so many rows, and what is around it. pause: instead of attention
        that is no part of it."""
        if not short:
            ids, positions = self._ids[:size], self._positions[:size]
            batch = replace(self._nobody, ids=ids, positions=positions, recorder=pause)
            return self._model.fold(batch, self._store)
        views = self._metadata.take(size)
        placed = self._metadata.of(self._nobody, views)

        def record(attention: Attention, heads: Heads) -> None:
            if isinstance(attention, Lightning):
                attention(heads, placed, self._store)
            else:
                pause(attention, heads)

        folded = self._model.fold(replace(placed, recorder=record), self._store)
        for x, out in zip(folded, self.asked, strict=True):
            self._metadata.gather(x, views, out)
        return folded

    def _chain(self, size: int, short: bool, pool: Any) -> Chain:
        pieces: list[Piece] = []
        first = graph = torch.cuda.CUDAGraph()

        def pause(attention: Attention, heads: Heads) -> None:
            nonlocal graph
            graph.capture_end()
            graph = torch.cuda.CUDAGraph()
            pieces.append(Piece(attention, Heads(*map(alias, heads.tensors)), graph))
            graph.capture_begin(pool=pool)

        first.capture_begin(pool=pool)
        x, mixed = self._fold(size, short, pause)
        graph.capture_end()
        return Chain(first, pieces, (alias(x), alias(mixed)))

    def short(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step is one that fold_short() serves."""
        rows = sum([len(chunk.tokens) for chunk in chunks])
        return self._size(rows) in self._short and self._metadata.serve(chunks)

    def fold_short(self, chunks: Sequence[Chunk]) -> None:
        """Family.fold of a short step of these chunks, those of one token first: what it gives of
        those that ask is in `asked` until the next step."""
        T = sum([len(chunk.tokens) for chunk in chunks])
        size = self._size(T)
        chain = self._short[size]
        batch = Batch.pack(chunks, self._sequences) if chain.pieces else None
        self._metadata.say(chunks, size)
        chain.first.replay()
        self._metadata.launched()  # whatever fails later
        self._follow(chain, T, batch)

    def serve(self, batch: Batch) -> bool:
        """Whether a step is one of theirs."""
        return len(batch.ids) <= self.sizes[-1]

    def fold(self, batch: Batch) -> Folded:
        """Family.fold of a step; what it gives is its until the next one."""
        T = len(batch.ids)
        self._ids[:T].copy_(batch.ids)
        self._positions[:T].copy_(batch.positions)
        chain = self._chains[self._size(T)]
        chain.first.replay()
        self._follow(chain, T, batch)
        x, mixed = chain.folded
        return x[:T], mixed[:T]

    def _size(self, rows: int) -> int:
        """The next size up; 0: there is none."""
        at = bisect_left(self.sizes, rows)
        return self.sizes[at] if at < len(self.sizes) else 0

    def _follow(self, chain: Chain, T: int, batch: Batch | None) -> None:
        """What comes after the first graph."""
        for p in chain.pieces:
            assert batch is not None
            p.attention(p.heads[:T], batch, self._store)
            p.graph.replay()
