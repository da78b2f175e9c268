"""Softmax attention over pages of chunks of several tokens (see paged_attention).

One launch for all chunks: an item (see kernels.pieces) is a tile of rows with a range of keys, of
one key-value head. On Hopper paged_prefill_hopper takes them where it can, elsewhere the kernel
here does. Both read the pages where they lie.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels import paged_prefill_hopper as hopper
from kernels.language import dot_precision, jit, next_power_of_2, tl
from kernels.packing import Packing
from kernels.pieces import plan
from kernels.softmax import softmax_step
from kernels.tuning import RowsTuning, processors, rows_tuning

WRITTEN = 16  # rows at a time
JOINED = 16
METADATA = ["cu_seqlens_ptr", "starts_ptr", "tables_ptr", "slots_ptr"]  # aligned now and then
ITEMS = ["items_ptr", "joins_ptr"]


@jit(do_not_specialize=["first", "tables_stride"], do_not_specialize_on_alignment=METADATA)
def _write_kernel(
    k_ptr,
    v_ptr,
    pages_k_ptr,
    pages_v_ptr,
    tables_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    starts_ptr,
    first,
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
    i_t, i_h, i_n = tl.program_id(0), tl.program_id(1), first + tl.program_id(2)
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
    p_table = tables_ptr + tl.load(slots_ptr + i_n).to(tl.int64) * tables_stride + o_u // PAGE
    page = tl.load(p_table, mask=m_t, other=0).to(tl.int64)[:, None]
    o_page = ((o_u % PAGE)[:, None] * Hkv + i_h) * D + o_d
    o_row = begin + o_t.to(tl.int64)[:, None]
    b_k = tl.load(k_ptr + o_row * k_row_stride + i_h * k_head_stride + o_d, mask=m)
    b_v = tl.load(v_ptr + o_row * v_row_stride + i_h * v_head_stride + o_d, mask=m)
    tl.store(pages_k_ptr + page * pages_k_stride + o_page, b_k, mask=m)
    tl.store(pages_v_ptr + page * pages_v_stride + o_page, b_v, mask=m)


@jit(do_not_specialize=["tables_stride"], do_not_specialize_on_alignment=METADATA + ITEMS)
def _attend_kernel(
    q_ptr,
    pages_k_ptr,
    pages_v_ptr,
    o_ptr,
    parts_ptr,
    lses_ptr,
    items_ptr,
    tables_ptr,
    slots_ptr,
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
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WITHIN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One item, one key-value head with its G heads. WITHIN: KEYS never cross a page."""
    i_h = tl.program_id(1)
    p_item = items_ptr + tl.program_id(0) * 5
    i_n = tl.load(p_item)
    pair = tl.load(p_item + 1)
    part = tl.load(p_item + 4)
    begin = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
    n = (tl.load(cu_seqlens_ptr + i_n + 1) - begin).to(tl.int32)
    start = tl.load(starts_ptr + i_n).to(tl.int32)
    o_m = pair + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    o_t, o_h = o_m // G, i_h * G + o_m % G
    m_q = (o_t < n)[:, None] & (o_d < D)
    o_row = begin + o_t.to(tl.int64)[:, None]
    p_q = q_ptr + o_row * q_row_stride + o_h[:, None] * q_head_stride + o_d
    b_q = tl.load(p_q, mask=m_q, other=0.0)  # [ROWS, D]
    b_max = tl.full((ROWS,), -float("inf"), tl.float32)
    b_sum = tl.zeros((ROWS,), tl.float32)
    b_o = tl.zeros((ROWS, BLOCK_D), tl.float32)

    Hkv = H // G
    p_table = tables_ptr + tl.load(slots_ptr + i_n).to(tl.int64) * tables_stride
    p_k = pages_k_ptr + i_h * D + o_d
    p_v = pages_v_ptr + i_h * D + o_d
    end = tl.load(p_item + 3)
    for u in tl.range(tl.load(p_item + 2), end, KEYS, num_stages=STAGES):
        o_u = u + tl.arange(0, KEYS)
        m_u = o_u < end
        if WITHIN:
            page = tl.load(p_table + u // PAGE).to(tl.int64)
            o_page = (u % PAGE + tl.arange(0, KEYS))[:, None] * Hkv * D
        else:
            page = tl.load(p_table + o_u // PAGE, mask=m_u, other=0).to(tl.int64)[:, None]
            o_page = (o_u % PAGE)[:, None] * Hkv * D
        m_kv = m_u[:, None] & (o_d < D)
        b_k = tl.load(p_k + page * pages_k_stride + o_page, mask=m_kv, other=0.0)  # [KEYS, D]
        b_v = tl.load(p_v + page * pages_v_stride + o_page, mask=m_kv, other=0.0)  # [KEYS, D]
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * 1.44269504)
        m_seen = m_u[None, :] & (o_u[None, :] <= start + o_t[:, None])
        b_scores = tl.where(m_seen, b_scores, -float("inf"))  # [ROWS, KEYS]
        b_max, b_sum, b_o = softmax_step(b_scores, b_v, b_max, b_sum, b_o, PRECISION)
    b_o /= tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
    if part < 0:
        p_o = o_ptr + (o_row * H + o_h[:, None]) * D + o_d
        tl.store(p_o, b_o.to(o_ptr.dtype.element_ty), mask=m_q)
    else:
        o_part = (part.to(tl.int64) * Hkv + i_h) * ROWS + tl.arange(0, ROWS)
        tl.store(parts_ptr + o_part[:, None] * D + o_d, b_o, mask=m_q)
        tl.store(lses_ptr + o_part, b_max + tl.log2(b_sum))  # -inf where nothing was seen


@jit(do_not_specialize_on_alignment=["joins_ptr", "cu_seqlens_ptr"])
def _join_kernel(
    parts_ptr,
    lses_ptr,
    o_ptr,
    joins_ptr,
    cu_seqlens_ptr,
    H,
    G,
    D,
    ROWS: tl.constexpr,
    JOINED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """JOINED rows of a tile that was cut, one key-value head: its parts weighed."""
    i_m, i_h = tl.program_id(0), tl.program_id(1)
    p_join = joins_ptr + tl.program_id(2) * 5
    i_n = tl.load(p_join)
    pair = tl.load(p_join + 1)
    first = tl.load(p_join + 2).to(tl.int64)
    count = tl.load(p_join + 3)
    begin = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
    n = (tl.load(cu_seqlens_ptr + i_n + 1) - begin).to(tl.int32)
    o_i = i_m * JOINED + tl.arange(0, JOINED)
    o_d = tl.arange(0, BLOCK_D)
    o_t, o_h = (pair + o_i) // G, i_h * G + (pair + o_i) % G
    m_t = o_t < n
    m = m_t[:, None] & (o_d < D)
    b_max = tl.full((JOINED,), -float("inf"), tl.float32)
    b_sum = tl.zeros((JOINED,), tl.float32)
    b_o = tl.zeros((JOINED, BLOCK_D), tl.float32)
    for j in range(count):
        o_part = ((first + j) * (H // G) + i_h) * ROWS + o_i
        b_lse = tl.load(lses_ptr + o_part, mask=m_t, other=0.0)
        b_part = tl.load(parts_ptr + o_part[:, None] * D + o_d, mask=m, other=0.0)
        b_new = tl.maximum(b_max, b_lse)  # all see the first key: never -inf
        b_weight, b_rescale = tl.exp2(b_lse - b_new), tl.exp2(b_max - b_new)
        b_sum = b_sum * b_rescale + b_weight
        b_o = b_o * b_rescale[:, None] + b_part * b_weight[:, None]
        b_max = b_new
    o_row = begin + o_t.to(tl.int64)[:, None]
    p_o = o_ptr + (o_row * H + o_h[:, None]) * D + o_d
    tl.store(p_o, (b_o / b_sum[:, None]).to(o_ptr.dtype.element_ty), mask=m)


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages_k: torch.Tensor,
    pages_v: torch.Tensor,
    tables: torch.Tensor,
    packing: Packing,
    first: int,
    scale: float,
    o: torch.Tensor,
    tuning: RowsTuning | None = None,
) -> None:
    """Write, then attend: the sequences of the packing from `first` on."""
    _, H, D = q.shape
    _, PAGE, Hkv, _ = pages_k.shape
    G, BLOCK_D = H // Hkv, max(next_power_of_2(D), 16)
    metadata = tables, packing.slots, packing.cu_seqlens, packing.starts
    longest = max(packing.lengths[first:])
    _write_kernel[(-(-longest // WRITTEN), Hkv, len(packing.lengths) - first)](
        k,
        v,
        pages_k,
        pages_v,
        *metadata,
        first,
        tables.stride(0),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        pages_k.stride(0),
        pages_v.stride(0),
        PAGE,
        Hkv,
        D,
        BLOCK_T=WRITTEN,
        BLOCK_D=BLOCK_D,
    )
    on_hopper = tuning is None and hopper.serves(q, pages_k, pages_v)
    tuning = tuning or rows_tuning(q.device, q.dtype.itemsize, BLOCK_D)
    ROWS = hopper.ROWS if on_hopper else tuning.rows
    resident = 1 if on_hopper else tuning.resident
    work = plan(packing, first, G, Hkv, ROWS, processors(q.device) * resident)
    parts = torch.empty(work.parts, Hkv, ROWS, D, dtype=torch.float32, device=q.device)
    lses = torch.empty(parts.shape[:3], dtype=torch.float32, device=q.device)
    if on_hopper:
        hopper.attend(q, pages_k, pages_v, *metadata, work.items, scale, o, parts, lses)
    else:
        _attend_kernel[(len(work.items), Hkv)](
            q,
            pages_k,
            pages_v,
            o,
            parts,
            lses,
            work.items,
            *metadata,
            tables.stride(0),
            float(scale),
            q.stride(0),
            q.stride(1),
            pages_k.stride(0),
            pages_v.stride(0),
            PAGE,
            H,
            G,
            D,
            ROWS=ROWS,
            KEYS=tuning.keys,
            WITHIN=PAGE % tuning.keys == 0,
            BLOCK_D=BLOCK_D,
            PRECISION=dot_precision(q.dtype),
            STAGES=tuning.stages,
            num_warps=tuning.warps,
        )
    if work.parts:
        _join_kernel[(-(-ROWS // JOINED), Hkv, len(work.joins))](
            parts,
            lses,
            o,
            work.joins,
            packing.cu_seqlens,
            H,
            G,
            D,
            ROWS=ROWS,
            JOINED=min(JOINED, ROWS),
            BLOCK_D=BLOCK_D,
            num_warps=4,
        )
