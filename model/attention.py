"""Softmax: grouped-query softmax attention over the rows of a batch, keys and values in a store."""

from __future__ import annotations

import torch

from kernels.paged_attention import paged_attention
from kernels.window_attention import window_attention
from model.batch import Batch, Heads
from model.store import Field, Store


def window_fields(index: int, window: int, heads: int, dim: int, dtype: torch.dtype) -> list[Field]:
    """What layer `index` keeps in a slot when it sees `window` positions."""
    return [
        Field(f"{name}.{index}", (window, heads, dim), dtype, axis=0) for name in ("keys", "values")
    ]


def page_fields(
    index: int, block_size: int, heads: int, dim: int, dtype: torch.dtype
) -> list[Field]:
    """What layer `index` keeps in a KV block when it sees all positions."""
    shape = (block_size, heads, dim)
    return [Field(f"{name}.{index}", shape, dtype, axis=0) for name in ("keys", "values")]


class Softmax:
    """The operation over all positions, or over a sliding window, on one layer's memory."""

    def __init__(self, index: int, scale: float, window: int | None = None) -> None:
        self.index = index
        self.scale = scale
        self.window = window

    def __call__(self, heads: Heads, batch: Batch, store: Store) -> None:
        """q [T, H, d], k, v [T, Hkv, d], rotated."""
        rows = store.blocks if self.window is None else store.slots
        keys, values = rows.views[f"keys.{self.index}"], rows.views[f"values.{self.index}"]
        inputs, packing = (heads.q, heads.k, heads.v, keys, values), batch.packing
        if self.window is None:
            paged_attention(*inputs, batch.tables, packing, self.scale, out=heads.o)
        elif not batch.resumes:
            window_attention(*inputs, packing, self.window, self.scale, out=heads.o)
        else:
            n, row = batch.singles, batch.tail_row
            assert batch.tail is not None
            for part, where in ((heads[row:], batch.tail), (heads[:n], packing.first(n))):
                inputs = part.q, part.k, part.v, keys, values
                window_attention(*inputs, where, self.window, self.scale, out=part.o)
