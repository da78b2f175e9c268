"""Causal grouped-query softmax attention over keys and values in blocks of a pool ("pages").

    o_t = sum_{u <= t} softmax_u(scale q_t . k_u) v_u

Position u of a sequence lies in page tables[sequence, u // block_size] at u % block_size. The
chunk's own keys and values are written first; what nobody wrote is never read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.language import jit, tl
from kernels.packing import Packing
from kernels.softmax import softmax_step, tiles

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


_METADATA = ["cu_seqlens_ptr", "starts_ptr", "tables_ptr"]


@jit(do_not_specialize=["tables_stride"], do_not_specialize_on_alignment=_METADATA)
def _paged_write_kernel(
    k_ptr,
    v_ptr,
    pages_k_ptr,
    pages_v_ptr,
    tables_ptr,
    cu_seqlens_ptr,
    starts_ptr,
    tables_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    pages_k_stride,
    pages_v_stride,
    PAGE,
    Hkv,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_T rows of one sequence, one key-value head, into their pages."""
    i_t, i_h, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
    n = (tl.load(cu_seqlens_ptr + i_n + 1) - begin).to(tl.int32)
    if i_t * BLOCK_T >= n:
        return
    start = tl.load(starts_ptr + i_n).to(tl.int32)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_t < n
    m = m_t[:, None] & (o_d < D)
    o_u = start + o_t  # positions
    p_table = tables_ptr + i_n.to(tl.int64) * tables_stride + o_u // PAGE
    page = tl.load(p_table, mask=m_t, other=-1).to(tl.int64)[:, None]
    m &= page >= 0
    o_page = ((o_u % PAGE)[:, None] * Hkv + i_h) * D + o_d
    o_row = begin + o_t.to(tl.int64)[:, None]
    b_k = tl.load(k_ptr + o_row * k_row_stride + i_h * k_head_stride + o_d, mask=m)
    b_v = tl.load(v_ptr + o_row * v_row_stride + i_h * v_head_stride + o_d, mask=m)
    tl.store(pages_k_ptr + page * pages_k_stride + o_page, b_k, mask=m)
    tl.store(pages_v_ptr + page * pages_v_stride + o_page, b_v, mask=m)


@jit(do_not_specialize=["tables_stride"], do_not_specialize_on_alignment=_METADATA)
def _paged_attend_kernel(
    q_ptr,
    pages_k_ptr,
    pages_v_ptr,
    o_ptr,
    tables_ptr,
    cu_seqlens_ptr,
    starts_ptr,
    tables_stride,
    scale,
    q_row_stride,
    q_head_stride,
    pages_k_stride,
    pages_v_stride,
    PAGE,
    H,
    G,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M pairs (row, one of the G heads of a key-value head) of one sequence."""
    i_m, i_h, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
    n = (tl.load(cu_seqlens_ptr + i_n + 1) - begin).to(tl.int32)
    if i_m * BLOCK_M >= n * G:
        return
    start = tl.load(starts_ptr + i_n).to(tl.int32)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_t, o_h = o_m // G, i_h * G + o_m % G
    m_q = (o_t < n)[:, None] & (o_d < D)
    o_row = begin + o_t.to(tl.int64)[:, None]
    p_q = q_ptr + o_row * q_row_stride + o_h[:, None] * q_head_stride + o_d
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # [M, D]
    b_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    Hkv = H // G
    p_table = tables_ptr + i_n.to(tl.int64) * tables_stride
    p_k = pages_k_ptr + i_h * D + o_d
    p_v = pages_v_ptr + i_h * D + o_d
    end = start + tl.minimum(((i_m + 1) * BLOCK_M - 1) // G + 1, n)
    for u in range(0, end, BLOCK_N):
        o_u = u + tl.arange(0, BLOCK_N)
        m_u = o_u < end
        page = tl.load(p_table + o_u // PAGE, mask=m_u, other=-1).to(tl.int64)[:, None]
        o_page = (o_u % PAGE)[:, None] * Hkv * D
        m_kv = (page >= 0) & (o_d < D)
        b_k = tl.load(p_k + page * pages_k_stride + o_page, mask=m_kv, other=0.0)  # [N, D]
        b_v = tl.load(p_v + page * pages_v_stride + o_page, mask=m_kv, other=0.0)  # [N, D]
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * 1.44269504)
        b_scores = tl.where(o_u <= start + o_t[:, None], b_scores, -float("inf"))  # [M, N]
        b_max, b_sum, b_o = softmax_step(b_scores, b_v, b_max, b_sum, b_o, PRECISION)
    p_o = o_ptr + (o_row * H + o_h[:, None]) * D + o_d
    tl.store(p_o, (b_o / b_sum[:, None]).to(o_ptr.dtype.element_ty), mask=m_q)


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
    """Write, then attend."""
    _, H, D = q.shape
    _, PAGE, Hkv, _ = pages_k.shape
    N, longest = len(packing.lengths), max(packing.lengths)
    pairs = longest * (H // Hkv)
    config, BLOCK_T = tiles(pairs, D, q.dtype), 16
    metadata = tables, packing.cu_seqlens, packing.starts, tables.stride(0)
    _paged_write_kernel[(-(-longest // BLOCK_T), Hkv, N)](
        k,
        v,
        pages_k,
        pages_v,
        *metadata,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        pages_k.stride(0),
        pages_v.stride(0),
        PAGE,
        Hkv,
        D,
        BLOCK_T=BLOCK_T,
        BLOCK_D=config["BLOCK_D"],
    )
    _paged_attend_kernel[(-(-pairs // config["BLOCK_M"]), Hkv, N)](
        q,
        pages_k,
        pages_v,
        o,
        *metadata,
        float(scale),
        q.stride(0),
        q.stride(1),
        pages_k.stride(0),
        pages_v.stride(0),
        PAGE,
        H,
        H // Hkv,
        D,
        **config,
        num_stages=2,
    )


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
    """Sequence by sequence: gather its pages once, then attend by blocks of queries."""
    block_size = pages_k.shape[1]
    first = 0
    for n, table, start in zip(packing.lengths, tables, packing.starts.tolist(), strict=True):
        rows = slice(first, first + n)
        first += n
        end = start + n
        positions = torch.arange(start, end)
        block, offset = table[positions // block_size], positions % block_size
        pages_k[block, offset] = k[rows]
        pages_v[block, offset] = v[rows]
        used = table[: -(-end // block_size)]
        keys, values = (  # [1, Hkv, end, d]
            pages[used].flatten(0, 1)[:end].transpose(0, 1)[None] for pages in (pages_k, pages_v)
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
) -> torch.Tensor:
    """q [T, H, d], k, v [T, Hkv, d] -> o [T, H, d]; pages [blocks, block_size, Hkv, d], in place.

    tables [N, most blocks] int32; a row's entries past the sequence's last block may be anything.
    """
    T, H, d = q.shape
    Hkv = k.shape[1]
    assert k.shape == v.shape == (T, Hkv, d) and H % Hkv == 0 and q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert pages_k.shape[2:] == pages_v.shape[2:] == (Hkv, d) and pages_k.shape == pages_v.shape
    assert pages_k[0].is_contiguous() and pages_v[0].is_contiguous()
    assert pages_k.dtype == k.dtype and pages_v.dtype == v.dtype
    assert tables.dtype == torch.int32 and tables.stride(-1) == 1
    assert len(tables) == len(packing.lengths) and sum(packing.lengths) == T
    assert packing.starts.dtype == torch.int64 and packing.cu_seqlens.dtype == torch.int32
    o = torch.empty(T, H, d, dtype=q.dtype, device=q.device)
    (_triton if q.is_cuda else _torch)(q, k, v, pages_k, pages_v, tables, packing, scale, o)
    return o
