"""Steps of one token of each sequence as CUDA graphs: captured at start-up, one a batch size.

A step of n sequences replays the graph of the next size up. Rows of padding have slot -1: they
write no state and no block, and their ids go nowhere. What a step needs of the host comes in one
copy; what it draws stays on the device, for the next step reads its ids from there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.packing import Packing
from kernels.sampling import draw
from model.batch import Batch
from model.chunk import Chunk
from model.families import Family, drawable, forward
from model.sampling import Wishes
from model.sequences import Sequences
from model.store import Store

IN_FLIGHT = 4  # host buffers: more than steps that are under way at a time


FIRST = (1, 2, 4, 8, 12, 16)  # batch sizes that the ladder begins with
APART = 8


def ladder(most: int, first: Sequence[int] = FIRST, apart: int = APART) -> list[int]:
    """Sizes to capture: the first ones, then multiples of `apart`, at most a quarter apart."""
    sizes = list(first)
    while sizes[-1] < most:
        sizes.append(sizes[-1] + max(apart, sizes[-1] // 4 // apart * apart))
    return [size for size in sizes if size < most] + [most]


class Inputs:
    """What the host says of a step: one buffer on the device, several on the host."""

    def __init__(self, most: int, wishes: Wishes, device: torch.device) -> None:
        self._wishes = wishes
        kinds = [(torch.int64, 4), (torch.int32, 1), (torch.float32, 1)]
        size = sum(kind.itemsize * count for kind, count in kinds) * most
        self.device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._hosts = [
            torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(IN_FLIGHT)
        ]
        self._views = [[view.numpy() for view in self._split(host, most)] for host in self._hosts]
        self.ids, self.positions, self.keys, self.rows, self.slots, self.temperatures = self._split(
            self.device, most
        )
        self._turn = 0

    @staticmethod
    def _split(memory: torch.Tensor, most: int) -> list[torch.Tensor]:
        wide = memory[: 32 * most].view(torch.int64).split(most)
        return [
            *wide,
            memory[32 * most : 36 * most].view(torch.int32),
            memory[36 * most :].view(torch.float32),
        ]

    def fill(self, chunks: Sequence[Chunk], size: int) -> None:
        """Send chunks of one token each, and padding up to `size`."""
        n = len(chunks)
        self._turn = (self._turn + 1) % IN_FLIGHT
        ids, positions, keys, rows, slots, temperatures = self._views[self._turn]
        ids[:n] = [chunk.tokens[0] for chunk in chunks]
        positions[:n] = [chunk.start for chunk in chunks]
        slots[:n] = [chunk.slot for chunk in chunks]
        self._wishes.take(chunks)
        temperatures[:n] = self._wishes.temperatures[slots[:n]]
        keys[:n] = self._wishes.keys(slots[:n], [chunk.generated for chunk in chunks])
        ids[n:size], positions[n:size], slots[n:size], temperatures[n:size] = 0, 0, -1, 0.0
        rows[:size] = slots[:size] + Sequences.PADDING
        self.device.copy_(self._hosts[self._turn], non_blocking=True)


@dataclass(slots=True, frozen=True, eq=False)
class Captured:
    """A graph, and what it leaves: drawn ids [size] int64 and terms [S, size, V] of logits."""

    graph: torch.cuda.CUDAGraph
    ids: torch.Tensor
    terms: torch.Tensor


class DecodeGraphs:
    """The ladder of graphs of one model with its store and sequences."""

    def __init__(self, model: Family, store: Store, sequences: Sequences, most: int) -> None:
        self.sizes = ladder(most)
        self._model = model
        self._store = store
        self._sequences = sequences
        self.wishes = Wishes(store.slots.count)
        self._inputs = Inputs(most, self.wishes, store.device)
        self._cu_seqlens = torch.arange(most + 1, dtype=torch.int32, device=store.device)
        self._captured: dict[int, Captured] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Run each size once, which compiles, then record it; the largest first, whose memory the
        others use too."""
        pool = None
        for size in reversed(self.sizes):
            self._inputs.fill((), size)
            self._step(size)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                ids, terms = self._step(size)
            pool = pool or graph.pool()
            self._captured[size] = Captured(graph, ids, terms)

    def serve(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step is one of theirs: it has one token of every sequence."""
        return len(chunks) <= self.sizes[-1] and all([len(chunk.tokens) == 1 for chunk in chunks])

    def replay(self, chunks: Sequence[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
        """Fold the chunks in; ids [n] as drawn from the logits as they are, and the terms [S, n, V]
        of these, both theirs until the next replay."""
        size = self.sizes[bisect_left(self.sizes, len(chunks))]
        self._inputs.fill(chunks, size)
        captured = self._captured[size]
        captured.graph.replay()
        return captured.ids[: len(chunks)], captured.terms[:, : len(chunks)]

    def _step(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        i = self._inputs
        slots, rows = i.slots[:size], i.rows[:size]
        positions = i.positions[:size]
        batch = Batch(
            ids=self._sequences.ids(i.ids[:size], rows),
            positions=positions,
            singles=size,
            packing=Packing((1,) * size, self._cu_seqlens[: size + 1], slots, positions),
            tail=None,
            ends=None,
            tables=self._sequences.tables,
            sample_rows=None,
        )
        terms = drawable(self._model, forward(self._model, batch, self._store))
        ids = draw(terms, i.temperatures[:size], i.keys[:size])
        self._sequences.drawn(rows, ids)
        return ids, terms
