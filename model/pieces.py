"""Steps of any chunks as CUDA graphs in pieces: captured at start-up, a chain for each of a ladder
of row counts.

Attention alone asks which rows are of one sequence. So what lies between two attentions is a graph,
replayed for the next number of rows up, and attention is launched between them as the step has it,
over the rows that there are. Rows of padding hold whatever was there, and no other row sees them.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from model.batch import Attention, Batch, Heads
from model.chunk import Chunk
from model.families import Family
from model.graphs import ladder
from model.sequences import Sequences
from model.store import Store

APART = 16  # rows: sizes are multiples of it
Folded = tuple[torch.Tensor, torch.Tensor]  # what Family.fold gives


class _Address:
    """A tensor's place in memory, which does not keep it from being given back."""

    def __init__(self, x: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(x.shape),
            "strides": tuple(stride * x.itemsize for stride in x.stride()),
            "typestr": f"<i{x.itemsize}",
            "data": (x.data_ptr(), False),
            "version": 3,
        }


def alias(x: torch.Tensor) -> torch.Tensor:
    """The same memory, not owned: a graph keeps its pool, in which later pieces use it again."""
    return torch.as_tensor(_Address(x), device=x.device).view(x.dtype)


@contextmanager
def _no_collection() -> Iterator[None]:
    """What is garbage goes now or later: no graph may end while another is captured."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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


class PiecewiseGraphs:
    """The chains of one model with its store, for steps of up to `most` rows."""

    def __init__(self, model: Family, store: Store, sequences: Sequences, most: int) -> None:
        self.sizes = ladder(most, (APART,), APART)
        self._model = model
        self._store = store
        self._sequences = sequences
        self._ids = torch.zeros(most, dtype=torch.int64, device=store.device)
        self._positions = torch.zeros(most, dtype=torch.int64, device=store.device)
        self._chains: dict[int, Chain] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Run each size once, which compiles, then record it; the largest first, whose memory the
        others use too."""
        for size in self.sizes:
            self._model.fold(self._padded(size), self._store)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle()
        with _no_collection(), torch.cuda.stream(torch.cuda.Stream(self._store.device)):
            for size in reversed(self.sizes):
                self._chains[size] = self._record(self._padded(size), pool)
        torch.cuda.synchronize()

    def _padded(self, size: int) -> Batch:
        """A step of so many rows, without its attention, which alone would ask whose they are."""
        anyone = Batch.pack([Chunk(tokens=[0, 0], start=0, slot=0)], self._sequences)
        return replace(
            anyone,
            ids=self._ids[:size],
            positions=self._positions[:size],
            recorder=lambda attention, heads: None,
        )

    def _record(self, batch: Batch, pool: Any) -> Chain:
        pieces: list[Piece] = []
        graph = torch.cuda.CUDAGraph()

        def record(attention: Attention, heads: Heads) -> None:
            nonlocal graph
            graph.capture_end()
            pieces.append(Piece(graph, attention, Heads(*map(alias, heads.tensors))))
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=pool)

        graph.capture_begin(pool=pool)
        x, mixed = self._model.fold(replace(batch, recorder=record), self._store)
        graph.capture_end()
        return Chain(pieces, graph, (alias(x), alias(mixed)))

    def serve(self, batch: Batch) -> bool:
        """Whether a step is one of theirs."""
        return len(batch.ids) <= self.sizes[-1]

    def fold(self, batch: Batch) -> Folded:
        """Family.fold; what it gives is theirs until the next step."""
        T = len(batch.ids)
        chain = self._chains[self.sizes[bisect_left(self.sizes, T)]]
        self._ids[:T].copy_(batch.ids)
        self._positions[:T].copy_(batch.positions)
        for p in chain.pieces:
            p.graph.replay()
            p.attention(p.heads[:T], batch, self._store)
        chain.last.replay()
        x, mixed = chain.folded
        return x[:T], mixed[:T]
