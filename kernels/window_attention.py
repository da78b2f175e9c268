"""Softmax attention over a sliding window, the last W keys and values kept in a ring per slot.

    o_t = sum_{t-W < u <= t} softmax_u(scale q_t . k_u) v_u

Position u lies at ring index u % W. A chunk attends over the ring and over itself, then leaves its
own last W keys and values in the ring. W counts the token itself.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.language import early, jit, start_early, tl
from kernels.packing import Packing, output
from kernels.softmax import softmax_step, tiles

SPAN = 2048  # rows that the torch path works on at a time


def window_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """One whole sequence: q [T, H, d], k, v [T, Hkv, d] -> o [T, H, d] float64."""
    T, H, _ = q.shape
    k, v = (x.double().repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    age = torch.arange(T)[:, None] - torch.arange(T)
    seen = ((age >= 0) & (age < window)).to(q.device)
    scores = scale * torch.einsum("thd,uhd->htu", q.double(), k)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("htu,uhd->thd", weights, v)


@jit(do_not_specialize_on_alignment=["cu_seqlens_ptr", "slots_ptr", "starts_ptr"])
def _window_attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    ring_k_ptr,
    ring_v_ptr,
    o_ptr,
    cu_seqlens_ptr,
    slots_ptr,
    starts_ptr,
    scale,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    ring_k_stride,
    ring_v_stride,
    W,
    H,
    G,
    D,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M pairs (row, one of the G heads of a key-value head) of one sequence.

    Positions are counted from the chunk's first row: those below 0 are in the ring.
    """
    start_early(EARLY)
    i_m, i_h, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
    n = (tl.load(cu_seqlens_ptr + i_n + 1) - begin).to(tl.int32)
    slot = tl.load(slots_ptr + i_n).to(tl.int64)
    start = tl.load(starts_ptr + i_n)
    if i_m * BLOCK_M >= n * G:
        return
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
    oldest = -tl.minimum(start, W - 1).to(tl.int32)
    turn = (start % W).to(tl.int32) + W  # ring index of position u < 0: (turn + u) % W
    p_k = k_ptr + begin * k_row_stride + i_h * k_head_stride + o_d
    p_v = v_ptr + begin * v_row_stride + i_h * v_head_stride + o_d
    p_ring_k = ring_k_ptr + slot * ring_k_stride + i_h * D + o_d
    p_ring_v = ring_v_ptr + slot * ring_v_stride + i_h * D + o_d
    first = tl.maximum(i_m * BLOCK_M // G - W + 1, oldest)
    last = tl.minimum(((i_m + 1) * BLOCK_M - 1) // G, n - 1)
    last = tl.where(slot < 0, first - 1, last)  # padding sees nothing
    for u in range(first, last + 1, BLOCK_N):
        o_u = u + tl.arange(0, BLOCK_N)
        m_own = ((o_u >= 0) & (o_u <= last))[:, None] & (o_d < D)
        m_ring = ((o_u < 0) & (o_u <= last))[:, None] & (o_d < D)
        o_own = o_u.to(tl.int64)[:, None]
        o_ring = ((turn + o_u) % W)[:, None] * Hkv * D
        b_k = tl.load(p_k + o_own * k_row_stride, mask=m_own, other=0.0)  # [N, D]
        b_k += tl.load(p_ring_k + o_ring, mask=m_ring, other=0.0)
        b_v = tl.load(p_v + o_own * v_row_stride, mask=m_own, other=0.0)  # [N, D]
        b_v += tl.load(p_ring_v + o_ring, mask=m_ring, other=0.0)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * 1.44269504)
        b_age = o_t[:, None] - o_u
        b_scores = tl.where((b_age >= 0) & (b_age < W), b_scores, -float("inf"))  # [M, N]
        b_max, b_sum, b_o = softmax_step(b_scores, b_v, b_max, b_sum, b_o, PRECISION)
    b_o /= tl.where(b_sum > 0.0, b_sum, 1.0)[:, None]
    p_o = o_ptr + (o_row * H + o_h[:, None]) * D + o_d
    tl.store(p_o, b_o.to(o_ptr.dtype.element_ty), mask=m_q)


@jit(do_not_specialize_on_alignment=["cu_seqlens_ptr", "slots_ptr", "starts_ptr"])
def _window_keep_kernel(
    k_ptr,
    v_ptr,
    ring_k_ptr,
    ring_v_ptr,
    cu_seqlens_ptr,
    slots_ptr,
    starts_ptr,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    ring_k_stride,
    ring_v_stride,
    W,
    Hkv,
    D,
    EARLY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Leave BLOCK_T of a chunk's last W rows in the ring."""
    start_early(EARLY)
    i_t, i_h, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
    n = (tl.load(cu_seqlens_ptr + i_n + 1) - begin).to(tl.int32)
    slot = tl.load(slots_ptr + i_n).to(tl.int64)
    start = tl.load(starts_ptr + i_n)
    o_t = tl.maximum(n - W, 0) + i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m = ((o_t < n) & (slot >= 0))[:, None] & (o_d < D)
    o_ring = ((start + o_t) % W)[:, None] * Hkv * D + i_h * D + o_d
    o_row = begin + o_t.to(tl.int64)[:, None]
    b_k = tl.load(k_ptr + o_row * k_row_stride + i_h * k_head_stride + o_d, mask=m)
    b_v = tl.load(v_ptr + o_row * v_row_stride + i_h * v_head_stride + o_d, mask=m)
    tl.store(ring_k_ptr + slot * ring_k_stride + o_ring, b_k, mask=m)
    tl.store(ring_v_ptr + slot * ring_v_stride + o_ring, b_v, mask=m)


def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    packing: Packing,
    window: int,
    scale: float,
    o: torch.Tensor,
) -> None:
    """Attend, then keep: the second launch may overwrite only what the first has read."""
    _, H, D = q.shape
    Hkv = k.shape[1]
    N, longest = len(packing.lengths), max(packing.lengths)
    pairs = longest * (H // Hkv)
    config = tiles(pairs, D, q.dtype)
    metadata = packing.cu_seqlens, packing.slots, packing.starts
    strides = k.stride(0), k.stride(1), v.stride(0), v.stride(1), ring_k.stride(0), ring_v.stride(0)
    _window_attend_kernel[(-(-pairs // config["BLOCK_M"]), Hkv, N)](
        q,
        k,
        v,
        ring_k,
        ring_v,
        o,
        *metadata,
        float(scale),
        q.stride(0),
        q.stride(1),
        *strides,
        window,
        H,
        H // Hkv,
        D,
        **config,
        num_stages=1,
        **early(q.device),
    )
    BLOCK_T = 16
    _window_keep_kernel[(-(-min(window, longest) // BLOCK_T), Hkv, N)](
        k,
        v,
        ring_k,
        ring_v,
        *metadata,
        *strides,
        window,
        Hkv,
        D,
        BLOCK_T=BLOCK_T,
        BLOCK_D=config["BLOCK_D"],
        **early(k.device),
    )


def _torch_singles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    window: int,
    scale: float,
    o: torch.Tensor,
) -> None:
    """One token of each sequence: it enters the ring, then attends over what the ring holds."""
    N, H, d = q.shape
    Hkv = k.shape[1]
    if int(slots.min()) < 0:
        o.zero_()
        real = (slots >= 0).nonzero().squeeze(1)
        if len(real):
            q, k, v, slots, starts = q[real], k[real], v[real], slots[real], starts[real]
            part = torch.empty_like(q)
            _torch_singles(q, k, v, ring_k, ring_v, slots, starts, window, scale, part)
            o[real] = part
        return
    at = starts % window
    ring_k[slots, at] = k
    ring_v[slots, at] = v
    keys, values = (ring.index_select(0, slots) for ring in (ring_k, ring_v))  # [N, W, Hkv, d]
    seen = None
    if int(starts.min()) < window - 1:
        seen = torch.arange(window) <= starts[:, None]
        unseen = ~seen[:, :, None, None]
        keys, values = keys.masked_fill_(unseen, 0.0), values.masked_fill_(unseen, 0.0)
        seen = seen[:, None, None]
    y = F.scaled_dot_product_attention(
        q.reshape(N, Hkv, H // Hkv, d),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=seen,
        scale=scale,
    )
    o.copy_(y.reshape(N, H, d))


def _torch_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    B: int,
    missing: int,
    window: int,
    scale: float,
    o: torch.Tensor,
) -> None:
    """q, o [M B, H, d], k, v [W - 1 + M B, Hkv, d]: each block of B queries against its own keys.

    The first `missing` keys do not exist.
    """
    L = B + window - 1
    queries = q.unflatten(0, (-1, B)).transpose(1, 2)  # [M, H, B, d]
    keys, values = (x.unfold(0, L, B).transpose(2, 3) for x in (k, v))  # [M, Hkv, L, d], views
    age = torch.arange(B)[:, None] + window - 1 - torch.arange(L)
    unseen = (age < 0) | (age >= window)
    unseen[:, :missing] = True
    y = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=torch.zeros(B, L, dtype=q.dtype).masked_fill_(unseen, -torch.inf),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    o.unflatten(0, (-1, B)).copy_(y.transpose(1, 2))


def _torch_chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    start: int,
    window: int,
    scale: float,
    o: torch.Tensor,
) -> None:
    """n rows of one sequence: a head that sees the ring, then blocks that see only the chunk."""
    n = len(q)
    B = max(window // 2, 32)
    head = min(n, window - 1 + (n - window + 1) % B)
    if head:
        before = min(start, window - 1)  # positions that the ring holds for us
        missing = window - 1 - before
        old = torch.arange(start - before, start) % window
        keys, values = (
            torch.cat((x.new_zeros(missing, *x.shape[1:]), ring[old], x[:head]))
            for x, ring in ((k, ring_k), (v, ring_v))
        )
        _torch_blocks(q[:head], keys, values, head, missing, window, scale, o[:head])
    if head < n:
        rest = head - window + 1
        _torch_blocks(q[head:], k[rest:], v[rest:], B, 0, window, scale, o[head:])
    kept = min(n, window)
    new = torch.arange(start + n - kept, start + n) % window
    ring_k[new] = k[n - kept :]
    ring_v[new] = v[n - kept :]


def _torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    packing: Packing,
    window: int,
    scale: float,
    o: torch.Tensor,
) -> None:
    """Leading chunks of one row together, the others one by one and SPAN rows at a time."""
    lengths = packing.lengths
    singles = next((i for i, n in enumerate(lengths) if n > 1), len(lengths))
    if singles:
        slots, starts = packing.slots[:singles], packing.starts[:singles]
        q_1, k_1, v_1, o_1 = (x[:singles] for x in (q, k, v, o))
        _torch_singles(q_1, k_1, v_1, ring_k, ring_v, slots, starts, window, scale, o_1)
    end = singles
    slots_, starts_ = packing.slots.tolist(), packing.starts.tolist()
    for n, slot, start in zip(lengths[singles:], slots_[singles:], starts_[singles:], strict=True):
        first, end = end, end + n
        for a in range(first, end, SPAN):
            q_i, k_i, v_i, o_i = (x[a : min(a + SPAN, end)] for x in (q, k, v, o))
            keys, values = ring_k[slot], ring_v[slot]
            _torch_chunk(q_i, k_i, v_i, keys, values, start + a - first, window, scale, o_i)


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    packing: Packing,
    window: int,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q [T, H, d], k, v [T, Hkv, d] -> o [T, H, d]; rings [S, W, Hkv, d], updated in place.

    Ring entries of positions before 0 are never read. A row of a chunk of one whose slot is -1 is
    padding and comes out as zero. out: contiguous memory for o.
    """
    T, H, d = q.shape
    Hkv = k.shape[1]
    assert k.shape == v.shape == (T, Hkv, d) and H % Hkv == 0 and q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert ring_k.shape[1:] == ring_v.shape[1:] == (window, Hkv, d) and ring_k.dtype == k.dtype
    assert ring_k[0].is_contiguous() and ring_v[0].is_contiguous() and ring_v.dtype == v.dtype
    assert sum(packing.lengths) == T and packing.slots.dtype == torch.int32
    assert packing.starts.dtype == torch.int64 and packing.cu_seqlens.dtype == torch.int32
    o = output((T, H, d), q, out)
    (_triton if q.is_cuda else _torch)(q, k, v, ring_k, ring_v, packing, window, scale, o)
    return o
