"""Steps of one token of each sequence, and the ends of all others, as CUDA graphs: captured at
start-up, one a batch size.

A step of n sequences replays the graph of the next size up. Rows of padding have slot -1: they
write no state and no block, and their ids go nowhere. A graph begins by taking what the host says
of the step, and ends by telling what it drew; that stays on the device too, for the next step reads
its ids from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from kernels import exchange
from kernels.packing import PADDING, Packing
from kernels.sampling import draw
from model.batch import Batch
from model.chunk import Chunk
from model.families import Family, drawable, forward
from model.sampling import Wishes
from model.sequences import Sequences
from model.staging import IN_FLIGHT, Staging
from model.store import Store

FIRST = (1, 2, 4, 8, 12, 16)  # batch sizes that the ladder begins with
APART = 8
Folded = Sequence[torch.Tensor]  # what Family.fold gives


def ladder(most: int, first: Sequence[int] = FIRST, apart: int = APART) -> list[int]:
    """Sizes to capture: the first ones, then multiples of `apart`, at most an eighth apart from
    eight times that on. `apart` and the last of the first are powers of two, so all from there on
    are among them: of these matrix products are tiled, and one row more is a tile more."""
    sizes = list(first)
    while sizes[-1] < most:
        octave = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(sizes[-1] + max(apart, octave // 8))
    return [size for size in sizes if size < most] + [most]


class Rows(NamedTuple):
    """What is about each row of a step of n: ids, positions, noise keys [n] int64, slots [n] int32,
    temperatures [n] float32."""

    ids: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    slots: torch.Tensor
    temperatures: torch.Tensor


class Exchange:
    """What the host says of each step and hears of it."""

    def __init__(self, most: int, wishes: Wishes, sequences: Sequences) -> None:
        self._wishes = wishes
        self._latest = sequences.latest
        self._staging = Staging(lambda n: ((n, n, n), (n, n)), most, sequences)
        pinned = sequences.device.type == "cuda"
        self._told = torch.zeros(IN_FLIGHT, most, dtype=torch.int64, pin_memory=pinned)

    def say(self, chunks: Sequence[Chunk], size: int) -> None:
        """Chunks of one token each, and padding up to `size`: those of the step that is launched
        next."""
        n = len(chunks)
        ids, positions, keys, slots, bits = self._staging.next(size)
        temperatures = bits.view(np.float32)
        ids[:n] = [chunk.tokens[0] for chunk in chunks]
        positions[:n] = [chunk.start for chunk in chunks]
        slots[:n] = [chunk.slot for chunk in chunks]
        self._wishes.take(chunks)
        temperatures[:n] = self._wishes.temperatures[slots[:n]]
        keys[:n] = self._wishes.keys(slots[:n], [chunk.generated for chunk in chunks])
        ids[n:], positions[n:], slots[n:], temperatures[n:] = 0, 0, PADDING, 0.0

    def heard(self) -> torch.Tensor:
        """A step was launched: where on the host its ids [most] int64 will be when it is over, and
        until IN_FLIGHT more were launched."""
        return self._told[self._staging.launched()]

    def take(self, size: int) -> Rows:
        """On the device: what was said of this step."""
        ids, positions, keys, slots, bits = self._staging.take(size)
        return Rows(ids, positions, keys, slots, bits.view(torch.float32))

    def tell(self, ids: torch.Tensor, rows: Rows) -> None:
        """On the device: what the rows of this step drew."""
        exchange.tell(ids, rows.slots, self._latest, self._staging.turn, self._told)


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
    """The same memory, not owned: a graph keeps its pool, in which others use it again."""
    return torch.as_tensor(_Address(x), device=x.device).view(x.dtype)


@dataclass(slots=True, frozen=True, eq=False)
class Captured:
    """A graph, and what it leaves until another is replayed: terms [S, size, V] of logits."""

    graph: torch.cuda.CUDAGraph
    terms: torch.Tensor


@dataclass(slots=True, frozen=True, eq=False)
class Replayed:
    """Of a step of n rows: ids [n] int64 on the host, once it is over, as drawn from the logits as
    they are; the terms [S, n, V] of these on the device, until the next replay."""

    ids: torch.Tensor
    terms: torch.Tensor


class Graphs(ABC):
    """A ladder of graphs that draw an id for each row, of one model with its sequences."""

    def __init__(self, model: Family, wishes: Wishes, sequences: Sequences, most: int) -> None:
        self.sizes = ladder(most)
        self.wishes = wishes
        self._model = model
        self._exchange = Exchange(most, wishes, sequences)
        self._captured: dict[int, Captured] = {}

    @abstractmethod
    def _terms(self, rows: Rows) -> torch.Tensor:
        """Terms of the logits of rows, once it is known what they are about."""

    @torch.inference_mode()
    def capture(self, pool: Any) -> None:
        """Run each size once, which compiles, then record it; the largest first, whose memory the
        others use too."""
        for size in reversed(self.sizes):
            self._exchange.say((), size)
            self._step(size)
            self._exchange.heard()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                terms = self._step(size)
            self._captured[size] = Captured(graph, alias(terms))
            del terms  # or it would keep its memory from the next

    def _replay(self, chunks: Sequence[Chunk], size: int) -> Replayed:
        captured = self._captured[size]
        self._exchange.say(chunks, size)
        captured.graph.replay()
        n = len(chunks)
        return Replayed(self._exchange.heard()[:n], captured.terms[:, :n])

    def _size(self, n: int) -> int:
        """The next size up."""
        return self.sizes[bisect_left(self.sizes, n)]

    def _step(self, size: int) -> torch.Tensor:
        rows = self._exchange.take(size)
        terms = drawable(self._model, self._terms(rows))
        self._exchange.tell(draw(terms, rows.temperatures, rows.keys), rows)
        return terms


class DecodeGraphs(Graphs):
    """Whole steps of one token of each sequence."""

    def __init__(self, model: Family, store: Store, sequences: Sequences, most: int) -> None:
        super().__init__(model, Wishes(store.slots.count), sequences, most)
        self._store = store
        self._sequences = sequences
        self._cu_seqlens = torch.arange(most + 1, dtype=torch.int32, device=store.device)

    def serve(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step is one of theirs: it has one token of every sequence."""
        return len(chunks) <= self.sizes[-1] and all([len(chunk.tokens) == 1 for chunk in chunks])

    def replay(self, chunks: Sequence[Chunk]) -> Replayed:
        """Fold the chunks in."""
        return self._replay(chunks, self._size(len(chunks)))

    def _terms(self, rows: Rows) -> torch.Tensor:
        size, cu_seqlens = len(rows.ids), self._cu_seqlens[: len(rows.ids) + 1]
        batch = Batch(
            ids=rows.ids,
            positions=rows.positions,
            singles=size,
            packing=Packing((1,) * size, cu_seqlens, rows.slots, rows.positions),
            tail=None,
            ends=None,
            tables=self._sequences.tables,
            sample_rows=None,
        )
        return forward(self._model, batch, self._store)


class EndGraphs(Graphs):
    """What follows Family.fold of a step, for rows that ask. wishes: those of the slots, which
    DecodeGraphs know too; asked [most, ...]: where what fold gives of them lies."""

    def __init__(self, model: Family, wishes: Wishes, sequences: Sequences, asked: Folded) -> None:
        super().__init__(model, wishes, sequences, len(asked[0]))
        self._asked = asked

    def serve(self, count: int) -> bool:
        """Whether so many rows may ask."""
        return count <= self.sizes[-1]

    def gather(self, folded: Folded, rows: torch.Tensor | None) -> None:
        """Put these rows [n] int64 of what was folded where they are read."""
        assert rows is not None, "a batch says which of its rows ask"
        for x, kept in zip(folded, self._asked, strict=True):
            torch.index_select(x, 0, rows, out=kept[: len(rows)])

    def replay(self, chunks: Sequence[Chunk]) -> Replayed:
        """Draw for these chunks, whose rows are the first."""
        return self._replay(chunks, self._size(len(chunks)))

    def _terms(self, rows: Rows) -> torch.Tensor:
        return self._model.finish(*(x[: len(rows.ids)] for x in self._asked))
