"""Causal grouped-query softmax attention over keys and values in blocks of a pool ("pages").

    o_t = sum_{u <= t} softmax_u(scale q_t . k_u) v_u

Position u of a sequence lies in page tables[sequence, u // block_size] at u % block_size. The
chunk's own keys and values are written first; what nobody wrote is never read.

On the GPU single tokens split their keys (paged_decode) and longer chunks go by tiles of rows
(paged_prefill), any mix of lengths in at most five launches, two more for each further 512 single
tokens. Pages are read where they lie: cuDNN, which reads none in PyTorch, would need them gathered,
and plans each new shape for milliseconds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.packing import Packing, output
from kernels.paged_decode import decode
from kernels.paged_prefill import prefill

QUERIES = 512  # rows that the torch path works on at a time: the mask is [QUERIES, context]


def paged_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """One whole sequence: q [T, H, d], k, v [T, Hkv, d] -> o [T, H, d] float64."""
    T, H, _ = q.shape
    k, v = (x.double().repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = scale * torch.einsum("thd,uhd->htu", q.double(), k)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("htu,uhd->thd", weights, v)


def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages_k: torch.Tensor,
    pages_v: torch.Tensor,
    tables: torch.Tensor,
    packing: Packing,
    scale: float,
    o: torch.Tensor,
) -> None:
    """Leading chunks of one row split their keys, the others go by tiles of rows, and first."""
    lengths = packing.lengths
    singles = next((i for i, n in enumerate(lengths) if n > 1), len(lengths))
    pages = pages_k, pages_v
    if singles < len(lengths):
        prefill(q, k, v, *pages, tables, packing, singles, scale, o)
    if singles:
        decode(q[:singles], k, v, *pages, tables, packing.slots, packing.starts, scale, o)


def _torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages_k: torch.Tensor,
    pages_v: torch.Tensor,
    tables: torch.Tensor,
    packing: Packing,
    scale: float,
    o: torch.Tensor,
) -> None:
    """Sequence by sequence, the last first: gather its pages once, then attend by blocks of
    queries."""
    block_size = pages_k.shape[1]
    end = len(q)
    slots, starts = packing.slots.tolist(), packing.starts.tolist()
    sequences = list(zip(packing.lengths, slots, starts, strict=True))
    for n, slot, start in reversed(sequences):
        rows = slice(end - n, end)
        end -= n
        if slot < 0:
            o[rows] = 0
            continue
        table, length = tables[slot], start + n
        positions = torch.arange(start, length)
        block, offset = table[positions // block_size], positions % block_size
        pages_k[block, offset] = k[rows]
        pages_v[block, offset] = v[rows]
        used = table[: -(-length // block_size)]
        keys, values = (  # [1, Hkv, length, d]
            pages[used].flatten(0, 1)[:length].transpose(0, 1)[None] for pages in (pages_k, pages_v)
        )
        for a in range(0, n, QUERIES):
            b = min(a + QUERIES, n)
            seen = start + b
            mask = None if b - a == 1 else torch.arange(seen) <= positions[a:b, None]
            o[rows][a:b] = F.scaled_dot_product_attention(
                q[rows][a:b].transpose(0, 1)[None],
                keys[:, :, :seen],
                values[:, :, :seen],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )[0].transpose(0, 1)


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages_k: torch.Tensor,
    pages_v: torch.Tensor,
    tables: torch.Tensor,
    packing: Packing,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [T, H, d], k, v [T, Hkv, d] -> o [T, H, d]; pages [blocks, block_size, Hkv, d], in place.

    tables [slots, most blocks] int32: each slot's blocks in order, past its last one anything.
    A leading chunk of one row may go on where a longer one of its slot ends. One whose slot is -1
    is padding: it comes out as zero, and its table is not read. Chunks of several rows need
    packing.past. out: contiguous memory for o.
    """
    T, H, d = q.shape
    Hkv = k.shape[1]
    assert k.shape == v.shape == (T, Hkv, d) and H % Hkv == 0 and q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert pages_k.shape[2:] == pages_v.shape[2:] == (Hkv, d) and pages_k.shape == pages_v.shape
    assert pages_k[0].is_contiguous() and pages_v[0].is_contiguous()
    assert pages_k.dtype == k.dtype and pages_v.dtype == v.dtype
    assert tables.dtype == torch.int32 and tables.stride(-1) == 1
    assert sum(packing.lengths) == T
    assert scale > 0 and (max(packing.lengths) == 1 or packing.past is not None)
    assert packing.starts.dtype == torch.int64 and packing.cu_seqlens.dtype == torch.int32
    o = output((T, H, d), q, out)
    (_triton if q.is_cuda else _torch)(q, k, v, pages_k, pages_v, tables, packing, scale, o)
    return o
