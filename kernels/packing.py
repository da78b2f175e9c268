"""Packing: which rows of a packed batch belong to which sequence, and to which slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PADDING = -1  # the slot of a row of nobody: what it gives is zero
ELSEWHERE = -2  # that of a row that another launch serves: what that gives stays


@dataclass(slots=True, frozen=True, eq=False)
class Packing:
    """N sequences laid end to end in T = sum(lengths) rows.

    lengths:    host copy of the row counts, each at least 1 (so that no kernel asks the device).
    cu_seqlens: [N + 1] int32, row at which each sequence begins; cu_seqlens[N] == T.
    slots:      [N] int32, the state slot of each sequence. No two alike, but where an operation
                says that sequences of one row go on with longer ones.
    starts:     [N] int64, tokens already folded into the slot; 0 means that the slot's content,
                whatever it is (NaN included), counts as zero / as an empty window.
    past:       host copy of starts, for those that cut work by it.
    items:      [M, 4] int32, first row, rows, sequence, 1: the sequences as the device knows them,
                longest first, for launches that are recorded and made again. Then lengths are
                empty and cu_seqlens is nobody's, there is room for more sequences than there are,
                the others with slot -1 and start 0, and their items have no rows.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    past: tuple[int, ...] | None = None
    items: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for index, length in enumerate(self.lengths):
            if length < 1:
                raise ValueError(f"sequence {index} of the batch has length {length}, not >= 1")

    def first(self, n: int) -> Packing:
        """Of its sequences the first n."""
        past = None if self.past is None else self.past[:n]
        ends = self.cu_seqlens[: n + 1]
        return Packing(self.lengths[:n], ends, self.slots[:n], self.starts[:n], past)


def output(shape: tuple[int, ...], like: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """`out`, which must have the shape and be contiguous, or new memory: of like's dtype."""
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    assert out.shape == shape and out.dtype == like.dtype and out.is_contiguous()
    return out
