"""Lightning: decayed linear attention over the rows of a batch, states in place."""

from __future__ import annotations

import torch

from kernels.lightning_decode import lightning_decode
from kernels.lightning_prefill import lightning_prefill
from model.batch import Batch


def lightning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    batch: Batch,
) -> torch.Tensor:
    """q, k [T, H, dk], v [T, H, dv], slopes [H], states [slots, H, dk, dv] -> o [T, H, dv].

    Sequences of one row take the decode kernel, longer ones the chunked kernel.
    """
    n = batch.singles
    if batch.tail is None:
        packing = batch.packing
        return lightning_decode(q, k, v, slopes, scale, states, packing.slots, packing.starts)
    if n == 0:
        return lightning_prefill(q, k, v, slopes, scale, states, batch.tail)
    slots, starts = batch.packing.slots[:n], batch.packing.starts[:n]
    head = lightning_decode(q[:n], k[:n], v[:n], slopes, scale, states, slots, starts)
    tail = lightning_prefill(q[n:], k[n:], v[n:], slopes, scale, states, batch.tail)
    return torch.cat((head, tail))
