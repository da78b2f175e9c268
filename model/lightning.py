"""Lightning: decayed linear attention over the rows of a batch, states and rings in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.lightning_decode import lightning_decode
from kernels.lightning_prefill import lightning_prefill
from kernels.lightning_ring import lightning_ring_decode, lightning_ring_fold, parts
from kernels.packing import Packing
from model.batch import Batch, Heads
from model.store import Field, Store


@dataclass(slots=True, frozen=True)
class Memory:
    """How lightning layers keep what they have read.

    state:  dtype of the states, float32 or bfloat16 (see docs/state-dtype.md).
    ring:   tokens that decoding keeps beside a state before it folds them; 0: each at once.
    values: dtype of the keys and values in the ring, that of the activations.
    """

    state: torch.dtype
    ring: int
    values: torch.dtype

    @property
    def rollback(self) -> int:
        """How many tokens a sequence can be set back, by going on from a smaller start."""
        return drafts(self.ring)


def drafts(ring: int) -> int:
    """Of the tokens in a ring, the last ones that no state folds yet: one, which a sequence that
    has ended may have read too many."""
    return int(ring > 1)


def memory_fields(index: int, heads: int, dk: int, dv: int, memory: Memory) -> list[Field]:
    """What layer `index` keeps in a slot."""
    fields = [Field(f"state.{index}", (heads, dk, dv), memory.state)]
    if memory.ring:
        since = f"folded.{index}"
        fields += [
            Field(f"ring_keys.{index}", (heads, memory.ring, dk), memory.values, 1, since),
            Field(f"ring_values.{index}", (heads, memory.ring, dv), memory.values, 1, since),
            Field(since, (heads, parts(dv), 2), torch.int64),
        ]
    return fields


class Lightning:
    """The operation with the slopes of one layer, on that layer's memory in a store."""

    def __init__(self, index: int, slopes: torch.Tensor, scale: float) -> None:
        self.index = index
        self.slopes = slopes
        self.scale = scale

    def __call__(self, heads: Heads, batch: Batch, store: Store) -> None:
        """Sequences of one row take the decode kernel, longer ones the chunked kernel: these first,
        for one of one row may go on with a longer one."""
        n, row = batch.singles, batch.tail_row
        if batch.tail is not None:
            self._prefill(heads[row:] if row else heads, batch, store)
        if n:
            self._decode(heads if n == len(heads.q) else heads[:n], batch.packing, store)

    def _rings(self, store: Store) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Keys, values and how far each state is folded; None without rings."""
        if f"folded.{self.index}" not in store.slots.views:
            return None
        views, i = store.slots.views, self.index
        return views[f"ring_keys.{i}"], views[f"ring_values.{i}"], views[f"folded.{i}"]

    def _decode(self, heads: Heads, rows: Packing, store: Store) -> None:
        """The first sequences of the rows, one row each."""
        states = store.slots.views[f"state.{self.index}"]
        rings = self._rings(store)
        n = len(heads.q)
        inputs = heads.q, heads.k, heads.v, self.slopes, self.scale, states
        where = rows.slots[:n], rows.starts[:n]
        if rings is None:
            lightning_decode(*inputs, *where, out=heads.o)
        else:
            spared = drafts(rings[0].shape[2])
            lightning_ring_decode(*inputs, *rings, *where, drafts=spared, out=heads.o)

    def _prefill(self, heads: Heads, batch: Batch, store: Store) -> None:
        rows = batch.tail
        assert rows is not None and batch.ends is not None
        states = store.slots.views[f"state.{self.index}"]
        rings = self._rings(store)
        if rings is not None:
            where = states, *rings, rows.slots, rows.starts, batch.ends
            lightning_ring_fold(self.slopes, *where, drafts=drafts(rings[0].shape[2]))
        inputs = heads.q, heads.k, heads.v, self.slopes, self.scale
        lightning_prefill(*inputs, states, rows, out=heads.o)
