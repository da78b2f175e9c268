"""Lightning attention over chunks of any length, each from its slot's state and back into it.

For a block of m tokens i = 1..m after the state S, with lam = exp(-slope):

    o_i = scale (lam^i q_i^T S + sum_{j<=i} lam^(i-j) (q_i . k_j) v_j)
    S'  = S + S expm1(-slope m) + sum_j lam^(m-j) k_j v_j^T

The decay of S is a difference, not a product, and joins the sum before S does: slopes go down to
4e-8, where float32 rounds lam, and would round S + S expm1 back to S.
The specification is lightning_reference.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch

from kernels.language import dot_precision, expm1, jit, next_power_of_2, tl
from kernels.packing import Packing

SPAN = 2048  # rows that the torch path works on at a time: they stay in the cache


@jit(do_not_specialize_on_alignment=["cu_seqlens_ptr", "slots_ptr", "starts_ptr"])
def _lightning_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slopes_ptr,
    scale,
    states_ptr,
    o_ptr,
    cu_seqlens_ptr,
    slots_ptr,
    starts_ptr,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    states_stride,
    H,
    DK,
    DV,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One sequence, one head, BLOCK_V columns of the state, which stays on chip from end to end."""
    i_v, i_h, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
    n = (tl.load(cu_seqlens_ptr + i_n + 1) - begin).to(tl.int32)
    slot = tl.load(slots_ptr + i_n).to(tl.int64)
    start = tl.load(starts_ptr + i_n)
    slope = tl.load(slopes_ptr + i_h)

    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BLOCK_K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k, m_v = o_k < DK, o_v < DV
    b_age = o_i[:, None] - o_i
    b_among = tl.where(b_age >= 0, tl.exp(-slope * tl.maximum(b_age, 0)), 0.0) * scale  # [C, C]
    b_before = tl.exp(-slope * (o_i + 1)) * scale  # [C]

    p_state = states_ptr + slot * states_stride + i_h * DK * DV + o_k[:, None] * DV + o_v
    m_state = m_k[:, None] & m_v
    b_s = tl.load(p_state, mask=m_state & (start > 0), other=0.0).to(tl.float32)  # [K, V]
    p_q = q_ptr + begin * q_row_stride + i_h * q_head_stride + o_k
    p_k = k_ptr + begin * k_row_stride + i_h * k_head_stride + o_k
    p_v = v_ptr + begin * v_row_stride + i_h * v_head_stride + o_v
    p_o = o_ptr + (begin * H + i_h) * DV + o_v
    for first in range(0, n, C):
        o_t = (first + o_i).to(tl.int64)[:, None]
        m_t = o_t < n
        b_q = tl.load(p_q + o_t * q_row_stride, mask=m_t & m_k, other=0.0)  # [C, K]
        b_k = tl.load(p_k + o_t * k_row_stride, mask=m_t & m_k, other=0.0)  # [C, K]
        b_v = tl.load(p_v + o_t * v_row_stride, mask=m_t & m_v, other=0.0)  # [C, V]
        m = tl.minimum(n - first, C)

        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_among  # [C, C]
        b_o = tl.dot(b_q, b_s.to(b_q.dtype), input_precision=PRECISION) * b_before[:, None]
        b_o += tl.dot(b_scores.to(b_v.dtype), b_v, input_precision=PRECISION)  # [C, V]
        tl.store(p_o + o_t * H * DV, b_o.to(o_ptr.dtype.element_ty), mask=m_t & m_v)

        b_after = tl.exp(-slope * tl.maximum(m - 1 - o_i, 0))  # [C]
        b_k = (b_k * b_after[:, None]).to(b_k.dtype)
        b_update = tl.dot(tl.trans(b_k), b_v, input_precision=PRECISION)  # [K, V]
        b_s += b_s * expm1(-slope * m) + b_update
    tl.store(p_state, b_s.to(states_ptr.dtype.element_ty), mask=m_state)


def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    packing: Packing,
    o: torch.Tensor,
) -> None:
    """Serial over the blocks of a sequence: sequences, heads and columns of the state in parallel.

    Tiles are the largest that stay in registers. One stage: with more, Hopper's matrix instructions
    have been compiled wrongly for a loop of this shape.
    """
    H, dk, dv = states.shape[1:]
    BLOCK_K = max(next_power_of_2(dk), 16)
    wide, narrow = BLOCK_K > 128, BLOCK_K < 128
    if q.dtype.itemsize == 2:
        C, columns, warps = (64, 64, 4) if narrow else (32, 32, 8) if wide else (64, 32, 4)
    else:
        C, columns, warps = (32, 32, 4) if narrow else (16, 32, 8)
    BLOCK_V = max(min(next_power_of_2(dv), columns), 16)
    _lightning_prefill_kernel[(-(-dv // BLOCK_V), H, len(packing.lengths))](
        q,
        k,
        v,
        slopes,
        float(scale),
        states,
        o,
        packing.cu_seqlens,
        packing.slots,
        packing.starts,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        states.stride(0),
        H,
        dk,
        dv,
        C=C,
        BLOCK_K=BLOCK_K,
        BLOCK_V=BLOCK_V,
        PRECISION=dot_precision(q.dtype),
        num_warps=warps,
        num_stages=1,
    )


@lru_cache(maxsize=128)
def _decays(slopes: tuple[float, ...], scale: float, C: int) -> tuple[torch.Tensor, ...]:
    """scale lam^(i-j) for i >= j, else 0 [H, C, C]; scale lam^i, lam^(C-j) [H, C, 1]."""
    s = torch.tensor(slopes, dtype=torch.float64)[:, None, None]
    i = torch.arange(C, dtype=torch.float64)
    among = torch.exp(-s * (i[:, None] - i).clamp(min=0)).tril()
    before = torch.exp(-s * (i[:, None] + 1))
    after = torch.exp(-s * (C - 1 - i[:, None]))
    return (scale * among).float(), (scale * before).float(), after.float()


def _blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: tuple[float, ...],
    scale: float,
    S: torch.Tensor,
    o: torch.Tensor,
    C: int,
) -> torch.Tensor:
    """M blocks of m <= C rows of G sequences: q, k, v, o [G, M, m, H, d], S [G, H, d, d] -> S'."""
    among, before, after = _decays(slopes, scale, C)
    m = q.shape[2]
    among, before, after = among[:, :m, :m], before[:, :m], after[:, C - m :]
    leave = torch.tensor(slopes, dtype=torch.float64).mul_(-m).expm1_().float()[:, None, None]
    # [M, G, H, m, d]: blocks first, so that the states of one moment lie together
    q, k, v = (x.float().permute(1, 0, 3, 2, 4).contiguous() for x in (q, k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(among)
    updates = torch.matmul((k * after).transpose(-1, -2), v)
    states = torch.empty(len(q) + 1, *S.shape)
    states[0] = S
    moments = states.unbind(0)
    for old, update, new in zip(moments, updates.unbind(0), moments[1:], strict=False):
        torch.addcmul(update, old, leave, out=new).add_(old)
    y = torch.matmul(q, states[:-1]).mul_(before)
    y.view(-1, m, y.shape[-1]).baddbmm_(scores.flatten(0, 2), v.flatten(0, 2))
    o.copy_(y.permute(1, 0, 3, 2, 4))
    return states[-1]


def _torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    packing: Packing,
    o: torch.Tensor,
) -> None:
    """Blocks of C rows by matrix products; neighbours of equal length go together."""
    C = 128 if q.shape[-1] > 96 else 64
    decay = tuple(slopes.tolist())
    rows = (0, *accumulate(packing.lengths))
    i = 0
    while i < len(packing.lengths):
        n = packing.lengths[i]
        G = 1
        while (G + 1) * n <= SPAN and packing.lengths[i + G : i + G + 1] == (n,):
            G += 1
        slots, fresh = packing.slots[i : i + G], packing.starts[i : i + G] == 0
        S = states[slots].float().masked_fill_(fresh[:, None, None, None], 0.0)
        group = [x[rows[i] : rows[i + G]].unflatten(0, (G, n)) for x in (q, k, v, o)]
        whole = n // C * C
        for a in range(0, whole, SPAN):
            part = [x[:, a : min(a + SPAN, whole)].unflatten(1, (-1, C)) for x in group]
            S = _blocks(part[0], part[1], part[2], decay, scale, S, part[3], C)
        if whole < n:
            part = [x[:, None, whole:] for x in group]
            S = _blocks(part[0], part[1], part[2], decay, scale, S, part[3], C)
        states[slots] = S.to(states.dtype)
        i += G


def lightning_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    packing: Packing,
) -> torch.Tensor:
    """q, k [T, H, dk], v [T, H, dv], slopes [H] float32 -> o [T, H, dv] in v's dtype.

    states [S, H, dk, dv] float32 or bfloat16, updated in place at packing.slots. q, k, v and the
    states may be views: only the last dimension of q, k, v and a whole state need be contiguous.
    """
    T, H, dk = q.shape
    dv = v.shape[-1]
    assert k.shape == (T, H, dk) and v.shape == (T, H, dv) and q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert slopes.shape == (H,) and slopes.dtype == torch.float32 and slopes.is_contiguous()
    assert states.shape[1:] == (H, dk, dv) and states[0].is_contiguous()
    assert sum(packing.lengths) == T and packing.slots.dtype == torch.int32
    assert packing.starts.dtype == torch.int64 and packing.cu_seqlens.dtype == torch.int32
    o = torch.empty(T, H, dv, dtype=v.dtype, device=v.device)
    (_triton if q.is_cuda else _torch)(q, k, v, slopes, scale, states, packing, o)
    return o
