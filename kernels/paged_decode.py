"""Softmax attention over pages of one new token a sequence (see paged_attention).

Keys are split between programs (flash-decoding): a program takes one key-value head with its G
heads and a span of the pages, and leaves an output and the logarithm of its weights' sum; a second
kernel joins them. How many spans there are follows from how many keys the tables could name, so it
is the same whenever a CUDA graph is replayed; how long they are, and which there are, from the
positions on the device: programs take those that there are by turns. A sequence in one span costs
no joining. The token's own key and value come from registers: the first span writes them into their
page, nobody waits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import dot_precision, early, jit, next_power_of_2, start_early, tl
from kernels.softmax import softmax_step
from kernels.tuning import KeysTuning, keys_tuning, processors

LEAST = 256  # keys of a span
MOST = 16_384  # keys of a span that one program reads, even where there are others enough
SCRATCH = 64_000_000  # bytes of what spans leave
JOINED = 16  # spans at a time
PROGRAMS = 16  # for each processor, at most
SEQUENCES = (64, 512)  # up to so many in a launch: sizes that kernels are compiled for
METADATA = ["tables_ptr", "slots_ptr", "starts_ptr"]  # aligned now and then


@jit
def _span(start, spans, KEYS: tl.constexpr, LEAST: tl.constexpr):
    """Keys of a span: a multiple of KEYS."""
    return tl.maximum(tl.cdiv(tl.cdiv(start, spans), KEYS) * KEYS, LEAST)


@jit
def _last_spans(
    slots_ptr,
    starts_ptr,
    N,
    spans,
    KEYS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """How many spans the sequences have up to each [N], one at least; padding has one."""
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_start = tl.load(starts_ptr + o_n, mask=m_n, other=0).to(tl.int32)
    b_real = tl.load(slots_ptr + o_n, mask=m_n, other=-1) >= 0
    b_live = tl.cdiv(b_start, _span(b_start, spans, KEYS, LEAST))
    return tl.cumsum(tl.where(m_n, tl.where(b_real, tl.maximum(b_live, 1), 1), 0))


@jit(do_not_specialize=["N", "spans", "tables_stride"], do_not_specialize_on_alignment=METADATA)
def _attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    pages_k_ptr,
    pages_v_ptr,
    o_ptr,
    parts_ptr,
    lses_ptr,
    tables_ptr,
    slots_ptr,
    starts_ptr,
    tables_stride,
    N,
    spans,
    scale,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    pages_k_stride,
    pages_v_stride,
    PAGE,
    H,
    G,
    D,
    LEAST: tl.constexpr,
    KEYS: tl.constexpr,
    WITHIN: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Spans of sequences, one key-value head each, by turns. WITHIN: KEYS never cross a page."""
    start_early(EARLY)
    Hkv = H // G
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_q = (o_g < G)[:, None] & m_d
    b_last = _last_spans(slots_ptr, starts_ptr, N, spans, KEYS, LEAST, BLOCK_N)
    for item in range(tl.program_id(0), tl.max(b_last) * Hkv, tl.num_programs(0)):
        i_h, i_w = item % Hkv, item // Hkv
        before = b_last <= i_w
        i_n = tl.sum(before.to(tl.int32)).to(tl.int64)
        i_s = i_w - tl.max(tl.where(before, b_last, 0))
        slot = tl.load(slots_ptr + i_n)
        start = tl.load(starts_ptr + i_n).to(tl.int32)
        o_h = i_h * G + o_g
        p_o = o_ptr + (i_n * H + o_h[:, None]) * D + o_d
        if slot < 0:
            tl.store(p_o, tl.zeros((BLOCK_G, BLOCK_D), o_ptr.dtype.element_ty), mask=m_q)
        else:
            span = _span(start, spans, KEYS, LEAST)
            end = tl.minimum(i_s * span + span, start)
            p_q = q_ptr + i_n * q_row_stride + o_h[:, None] * q_head_stride + o_d
            b_q = tl.load(p_q, mask=m_q, other=0.0)  # [G, D]
            p_table = tables_ptr + slot * tables_stride
            p_k = pages_k_ptr + i_h * D + o_d
            p_v = pages_v_ptr + i_h * D + o_d

            b_max = tl.full((BLOCK_G,), -float("inf"), tl.float32)
            b_sum = tl.zeros((BLOCK_G,), tl.float32)
            b_o = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
            if i_s == 0:
                p_own = k_ptr + i_n * k_row_stride + i_h * k_head_stride + o_d
                p_new = v_ptr + i_n * v_row_stride + i_h * v_head_stride + o_d
                b_own = tl.load(p_own, mask=m_d, other=0.0)
                b_new = tl.load(p_new, mask=m_d, other=0.0)
                page = tl.load(p_table + start // PAGE).to(tl.int64)
                o_page = (start % PAGE) * Hkv * D
                tl.store(p_k + page * pages_k_stride + o_page, b_own, mask=m_d)
                tl.store(p_v + page * pages_v_stride + o_page, b_new, mask=m_d)
                b_max = tl.sum(b_q.to(tl.float32) * b_own.to(tl.float32), 1) * (scale * 1.44269504)
                b_sum += 1.0
                b_o += b_new.to(tl.float32)
            for u in tl.range(i_s * span, end, KEYS, num_stages=STAGES):
                o_u = u + tl.arange(0, KEYS)
                m_u = o_u < end
                if WITHIN:
                    page = tl.load(p_table + u // PAGE).to(tl.int64)
                    o_page = (u % PAGE + tl.arange(0, KEYS))[:, None] * Hkv * D
                else:
                    page = tl.load(p_table + o_u // PAGE, mask=m_u, other=0).to(tl.int64)[:, None]
                    o_page = (o_u % PAGE)[:, None] * Hkv * D
                m_kv = m_u[:, None] & m_d
                p_u = page * pages_k_stride + o_page
                b_k = tl.load(p_k + p_u, mask=m_kv, other=0.0)  # [KEYS, D]
                p_u = page * pages_v_stride + o_page
                b_v = tl.load(p_v + p_u, mask=m_kv, other=0.0)  # [KEYS, D]
                b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
                b_scores *= scale * 1.44269504
                b_scores = tl.where(m_u[None, :], b_scores, -float("inf"))  # [G, KEYS]
                b_max, b_sum, b_o = softmax_step(b_scores, b_v, b_max, b_sum, b_o, PRECISION)
            b_o /= b_sum[:, None]
            if span >= start:
                tl.store(p_o, b_o.to(o_ptr.dtype.element_ty), mask=m_q)
            else:
                o_part = (i_s * N + i_n) * H + o_h
                tl.store(parts_ptr + o_part[:, None] * D + o_d, b_o, mask=m_q)
                tl.store(lses_ptr + o_part, b_max + tl.log2(b_sum), mask=o_g < G)


@jit(do_not_specialize=["spans"], do_not_specialize_on_alignment=METADATA)
def _join_kernel(
    parts_ptr,
    lses_ptr,
    o_ptr,
    slots_ptr,
    starts_ptr,
    spans,
    D,
    LEAST: tl.constexpr,
    KEYS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    JOINED: tl.constexpr,
):
    """The spans of one sequence, one head."""
    start_early(EARLY)
    i_h, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    H, N = tl.num_programs(0), tl.num_programs(1)
    start = tl.load(starts_ptr + i_n).to(tl.int32)
    span = _span(start, spans, KEYS, LEAST)
    if (tl.load(slots_ptr + i_n) < 0) | (span >= start):
        return
    live = tl.cdiv(start, span)
    o_d = tl.arange(0, BLOCK_D)
    b_max = -float("inf")
    b_sum = 0.0
    b_o = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, live, JOINED):
        o_s = first + tl.arange(0, JOINED)
        m_s = o_s < live
        o_part = (o_s * N + i_n) * H + i_h
        b_lse = tl.load(lses_ptr + o_part, mask=m_s, other=-float("inf"))
        m_part = m_s[:, None] & (o_d < D)
        b_part = tl.load(parts_ptr + o_part[:, None] * D + o_d, mask=m_part, other=0.0)
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_weight = tl.exp2(b_lse - b_new)
        b_rescale = tl.exp2(b_max - b_new)
        b_sum = b_sum * b_rescale + tl.sum(b_weight, 0)
        b_o = b_o * b_rescale + tl.sum(b_part * b_weight[:, None], 0)
        b_max = b_new
    p_o = o_ptr + (i_n * H + i_h) * D + o_d
    tl.store(p_o, (b_o / b_sum).to(o_ptr.dtype.element_ty), mask=o_d < D)


def spans(N: int, Hkv: int, row_bytes: int, capacity: int, programs: int) -> int:
    """How many spans the keys of each of N sequences of at most `capacity` keys are split into."""
    filling = max(programs // (N * Hkv), -(-capacity // MOST))
    return max(min(filling, capacity // LEAST, SCRATCH // (N * row_bytes)), 1)


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages_k: torch.Tensor,
    pages_v: torch.Tensor,
    tables: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    o: torch.Tensor,
    tuning: KeysTuning | None = None,
) -> None:
    """q [N, H, d], k, v [N, Hkv, d] of N sequences -> o; k and v enter the pages."""
    N, H, D = q.shape
    most = SEQUENCES[-1]
    if most < N:
        for first in range(0, N, most):
            q_i, k_i, v_i, slots_i, starts_i, o_i = (
                x[first : min(first + most, N)] for x in (q, k, v, slots, starts, o)
            )
            decode(q_i, k_i, v_i, pages_k, pages_v, tables, slots_i, starts_i, scale, o_i, tuning)
        return
    _, PAGE, Hkv, _ = pages_k.shape
    BLOCK_D = max(next_power_of_2(D), 16)
    tuning = tuning or keys_tuning(q.device, q.dtype.itemsize, BLOCK_D)
    programs = processors(q.device) * tuning.resident
    S = spans(N, Hkv, 4 * H * D, tables.shape[1] * PAGE, programs)
    parts = torch.empty(S if S > 1 else 0, N, H, D, dtype=torch.float32, device=q.device)
    lses = torch.empty(parts.shape[:3], dtype=torch.float32, device=q.device)
    _attend_kernel[(min(N * Hkv * S, processors(q.device) * PROGRAMS),)](
        q,
        k,
        v,
        pages_k,
        pages_v,
        o,
        parts,
        lses,
        tables,
        slots,
        starts,
        tables.stride(0),
        N,
        S,
        float(scale),
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        pages_k.stride(0),
        pages_v.stride(0),
        PAGE,
        H,
        H // Hkv,
        D,
        LEAST=LEAST,
        KEYS=tuning.keys,
        WITHIN=PAGE % tuning.keys == 0,
        BLOCK_N=next(size for size in SEQUENCES if size >= N),
        BLOCK_G=max(next_power_of_2(H // Hkv), 16),
        BLOCK_D=BLOCK_D,
        PRECISION=dot_precision(q.dtype),
        STAGES=tuning.stages,
        num_warps=tuning.warps,
        **early(q.device),
    )
    if S > 1:
        _join_kernel[(H, N)](
            parts,
            lses,
            o,
            slots,
            starts,
            S,
            D,
            LEAST=LEAST,
            KEYS=tuning.keys,
            BLOCK_D=BLOCK_D,
            JOINED=JOINED,
            num_warps=4,
            **early(parts.device),
        )
