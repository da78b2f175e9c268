"""Batch: the chunks of one step as tensors, in one transfer to the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch

from kernels.packing import Packing
from model.chunk import PENDING, Chunk
from model.sequences import Sequences
from model.store import Store


@dataclass(slots=True, frozen=True, eq=False)
class Heads:
    """What attends, by heads: q [T, H, dk], k [T, ., dk], v [T, ., dv], and where it goes, o
    [T, H, dv]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """q, k, v, o."""
        return self.q, self.k, self.v, self.o

    def __getitem__(self, rows: slice) -> Heads:
        return Heads(*(x[rows] for x in self.tensors))


class Attention(Protocol):
    """An operation between the rows of a sequence, over its memory in a store."""

    def __call__(self, heads: Heads, batch: Batch, store: Store) -> None: ...


Recorder = Callable[[Attention, Heads], None]


@dataclass(slots=True, frozen=True, eq=False)
class Batch:
    """T tokens of N sequences. The first `singles` sequences have one row each, the rest follow.
    Some of the first may go on where one of the rest ends: these come before them in time.

    ids [T], positions [T] int64; packing: all sequences, or the singles alone where attention is
    recorded that asks for no others; tail: those after the singles, with rows counted from row
    `tail_row`, and ends [N - singles] int64, the positions at which they end;
    tables [slots, most blocks] int32, every slot's blocks;
    sample_rows [R] int64: rows whose logits are asked for, in the order of the batch; None: all.
    resumes: whether some of the singles go on with one of the tail.
    recorder: is told what would attend, and to what, where a step is recorded; it sees to it.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    singles: int
    packing: Packing
    tail: Packing | None
    ends: torch.Tensor | None
    tables: torch.Tensor
    sample_rows: torch.Tensor | None
    tail_row: int = 0
    resumes: bool = False
    recorder: Recorder | None = None

    def attend(
        self, attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, store: Store
    ) -> torch.Tensor:
        """q, k, v -> o of Heads, by the rows' sequences: all else in a model is row by row."""
        o = torch.empty(*q.shape[:2], v.shape[-1], dtype=v.dtype, device=v.device)
        heads = Heads(q, k, v, o)
        if self.recorder is not None:
            self.recorder(attention, heads)
        else:
            attention(heads, self, store)
        return o

    def sampled(self, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of each [T, ...] the rows whose logits are asked for."""
        if self.sample_rows is None:
            return rows
        return tuple(x[self.sample_rows] for x in rows)

    @classmethod
    def pack(cls, chunks: Sequence[Chunk], sequences: Sequences) -> Batch:
        """Lay out chunks, which must have those of one token first."""
        lengths = tuple(len(chunk.tokens) for chunk in chunks)
        singles = next((i for i, n in enumerate(lengths) if n > 1), len(lengths))
        assert all(n > 1 for n in lengths[singles:]), "chunks of one token come first"
        rows = [0, *accumulate(lengths)]
        past = tuple(chunk.start for chunk in chunks)
        starts = np.array(past, dtype=np.int64)
        offsets = np.array(rows[:-1], dtype=np.int64)
        long = (
            np.concatenate([np.asarray(chunk.tokens, dtype=np.int64) for chunk in chunks]),
            np.arange(rows[-1], dtype=np.int64) + np.repeat(starts - offsets, lengths),
            starts,
            (starts + lengths)[singles:],
            np.array(
                [rows[i + 1] - 1 for i, c in enumerate(chunks) if c.sampling is not None],
                dtype=np.int64,
            ),
        )
        cu_seqlens = np.array(rows, dtype=np.int32)
        numbers = [chunk.slot for chunk in chunks]
        short = (
            cu_seqlens,
            cu_seqlens[singles:] - singles,
            np.array(numbers, dtype=np.int32),
        )
        ids, positions, starts_, ends, sample_rows, cu, tail_cu, slots = _transfer(
            long, short, sequences.device
        )
        if any(chunk.tokens[0] == PENDING for chunk in chunks[:singles]):
            ids[:singles] = sequences.ids(ids[:singles], sequences.rows(slots[:singles]))
        tail = None
        if singles < len(chunks):
            tail = Packing(
                lengths[singles:], tail_cu, slots[singles:], starts_[singles:], past[singles:]
            )
        return cls(
            ids=ids,
            positions=positions,
            singles=singles,
            packing=Packing(lengths, cu, slots, starts_, past),
            tail=tail,
            ends=ends,
            tables=sequences.tables,
            sample_rows=sample_rows,
            tail_row=singles,
            resumes=not set(numbers[:singles]).isdisjoint(numbers[singles:]),
        )


def _transfer(
    long: tuple[np.ndarray, ...], short: tuple[np.ndarray, ...], device: torch.device
) -> list[torch.Tensor]:
    """int64 and int32 arrays as tensors on the device, by one copy of one buffer."""
    wide = np.concatenate(long)
    narrow = np.concatenate(short)
    host = torch.empty(
        wide.nbytes + narrow.nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda"
    )
    buffer = host.numpy()
    buffer[: wide.nbytes] = wide.view(np.uint8)
    buffer[wide.nbytes :] = narrow.view(np.uint8)
    memory = host.to(device, non_blocking=True)
    wides = memory[: wide.nbytes].view(torch.int64).split([a.size for a in long])
    narrows = memory[wide.nbytes :].view(torch.int32).split([a.size for a in short])
    return [*wides, *narrows]
