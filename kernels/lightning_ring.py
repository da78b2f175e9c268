"""Lightning attention for one token of each sequence, states read at every step, rarely written.

Beside its state a slot keeps a ring: the last keys and values, which the state has not folded yet.
With S the state after the tokens before position `folded`, the token at position t sees

    o_t = scale (lam^(t-folded+1) q^T S + sum_{folded<=j<=t} lam^(t-j) (q . k_j) v_j)

and puts its key and value into row t mod R. When R tokens are in the ring, the W oldest are folded:

    S' = S + S expm1(-slope W) + sum_{j<W} lam^(W-1-j) k_j v_j^T        folded' = folded + W

W is R less the number of drafted tokens that may still be rolled back: those are never folded, so
that rolling back is to pass a smaller start. The specification is lightning_reference.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import expm1, jit, next_power_of_2, tl


@jit
def _ages(last, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """How many tokens each row of the ring lies behind the last one; R, too many, past its end."""
    o_r = tl.arange(0, BLOCK_R)
    b_age = ((last % R).to(tl.int32) + R - o_r) % R
    return tl.where(o_r < R, b_age, R)


@jit
def _fold(b_s, b_k, b_v, leave):
    """A piece of the state [K, V] after keys [K, R] and decayed values [R, V] float32."""
    if b_k.dtype == tl.bfloat16:  # two products take 16 bits of a value's 24, and all of a key's
        b_high = b_v.to(tl.bfloat16)
        b_low = (b_v - b_high.to(tl.float32)).to(tl.bfloat16)
        b_update = tl.dot(b_k, b_low, tl.dot(b_k, b_high))
    else:
        b_update = tl.dot(b_k.to(tl.float32), b_v, input_precision="tf32x3")
    return b_s + (b_s * leave + b_update)


@jit(do_not_specialize_on_alignment=["slots_ptr", "starts_ptr"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slopes_ptr,
    scale,
    states_ptr,
    ring_k_ptr,
    ring_v_ptr,
    folded_ptr,
    o_ptr,
    slots_ptr,
    starts_ptr,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    states_stride,
    ring_k_stride,
    ring_v_stride,
    folded_stride,
    drafts,
    rows,
    H,
    R: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PIECE: tl.constexpr,
    PIECE_FOLD: tl.constexpr,
):
    """One sequence, one head: the only program that knows of its `folded`."""
    i_h, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_r, o_k, o_v = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    o_piece, o_fold = tl.arange(0, PIECE), tl.arange(0, PIECE_FOLD)
    p_o = o_ptr + (i_n * H + i_h) * DV + o_v
    slot = tl.load(slots_ptr + i_n).to(tl.int64)
    if slot < 0:
        for v in tl.static_range(0, DV, BLOCK_V):
            tl.store(p_o + v, tl.zeros([BLOCK_V], o_ptr.dtype.element_ty))
        return
    p_q = q_ptr + i_n * q_row_stride + i_h * q_head_stride
    p_k = k_ptr + i_n * k_row_stride + i_h * k_head_stride
    p_v = v_ptr + i_n * v_row_stride + i_h * v_head_stride
    p_state = states_ptr + slot * states_stride + i_h * DK * DV
    p_ring_k = ring_k_ptr + slot * ring_k_stride + i_h * R * DK
    p_ring_v = ring_v_ptr + slot * ring_v_stride + i_h * R * DV
    p_folded = folded_ptr + slot * folded_stride + i_h

    slope = tl.load(slopes_ptr + i_h)
    start = tl.load(starts_ptr + i_n)
    before = tl.load(p_folded)
    folded = tl.where(start > 0, before, 0)
    n = (start - folded + 1).to(tl.int32)
    b_age = _ages(start, R, BLOCK_R)
    b_decay = tl.where(b_age < n, tl.exp(-slope * b_age), 0.0) * scale
    # a row out of date is read as the new token, without weight: what the ring holds there is not
    m_r = (b_age > 0) & (b_age < n)
    p_keys = tl.where(m_r, p_ring_k + o_r * DK, p_k)
    p_values = tl.where(m_r, p_ring_v + o_r * DV, p_v)[:, None]
    row = (start % R).to(tl.int32)

    # every load is under way before the first sum across warps waits for any
    b_p = tl.zeros([BLOCK_R], tl.float32)
    for v in tl.static_range(0, DV, BLOCK_V):
        b_sum = tl.zeros([PIECE, BLOCK_V], tl.float32)
        for k in tl.static_range(0, DK, PIECE):
            p_piece = p_state + (k + o_piece)[:, None] * DV + v + o_v
            b_q = tl.load(p_q + k + o_piece).to(tl.float32)
            b_sum += b_q[:, None] * tl.load(p_piece).to(tl.float32)
        b_values = tl.load(p_values + v + o_v)  # [R, V]
        if v == 0:
            for k in tl.static_range(0, DK, BLOCK_K):
                b_keys = tl.load(p_keys[:, None] + k + o_k)  # [R, K]
                b_query = tl.load(tl.broadcast_to((p_q + k + o_k)[None, :], [BLOCK_R, BLOCK_K]))
                b_p += tl.sum(b_keys.to(tl.float32) * b_query.to(tl.float32), 1)
                tl.store(p_ring_k + row * DK + k + o_k, tl.load(p_k + k + o_k))
            b_p *= b_decay
        tl.store(p_ring_v + row * DV + v + o_v, tl.load(p_v + v + o_v))
        b_o = tl.sum(b_p[:, None] * b_values.to(tl.float32), 0)
        b_o += tl.where(folded > 0, tl.sum(b_sum, 0) * (tl.exp(-slope * n) * scale), 0.0)
        tl.store(p_o + v, b_o.to(o_ptr.dtype.element_ty))

    tl.debug_barrier()  # the state is read, and `folded`, by every thread
    if n >= R:
        b_age -= drafts
        b_late = tl.where(b_age >= 0, tl.exp(-slope * tl.maximum(b_age, 0)), 0.0)
        b_late = tl.where(b_age < n - drafts, b_late, 0.0)[:, None]
        leave = expm1(-slope * (n - drafts))
        for v in tl.static_range(0, DV, BLOCK_V):
            b_v = tl.load(p_values + v + o_v).to(tl.float32) * b_late
            p_s = p_state + o_fold[:, None] * DV + v + o_v
            for first in tl.range(0, rows, PIECE_FOLD, num_stages=4):
                b_s = tl.where(folded > 0, tl.load(p_s + first * DV).to(tl.float32), 0.0)
                b_k = tl.load(p_keys + (first + o_fold)[:, None])  # [K, R]
                b_s = _fold(b_s, b_k, b_v, leave)
                tl.store(p_s + first * DV, b_s.to(p_state.dtype.element_ty))
        folded += n - drafts
    tl.store(p_folded, folded, mask=folded != before)


@jit(do_not_specialize_on_alignment=["slots_ptr", "starts_ptr", "ends_ptr"])
def _fold_kernel(
    slopes_ptr,
    states_ptr,
    ring_k_ptr,
    ring_v_ptr,
    folded_ptr,
    slots_ptr,
    starts_ptr,
    ends_ptr,
    states_stride,
    ring_k_stride,
    ring_v_stride,
    folded_stride,
    R: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One sequence, one head."""
    i_h, i_n = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_ptr + i_n).to(tl.int64)
    if slot < 0:
        return
    start = tl.load(starts_ptr + i_n)
    p_folded = folded_ptr + slot * folded_stride + i_h
    folded = tl.where(start > 0, tl.load(p_folded), 0)
    n = (start - folded).to(tl.int32)
    if n > 0:
        o_r, o_k, o_v = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
        p_state = states_ptr + slot * states_stride + i_h * DK * DV
        p_k = ring_k_ptr + slot * ring_k_stride + i_h * R * DK
        p_v = ring_v_ptr + slot * ring_v_stride + i_h * R * DV
        slope = tl.load(slopes_ptr + i_h)
        b_age = _ages(start - 1, R, BLOCK_R)
        m_r = b_age < n
        b_decay = tl.exp(-slope * b_age)[:, None]
        leave = expm1(-slope * n)
        for v in tl.static_range(0, DV, BLOCK_V):
            b_v = tl.load(p_v + o_r[:, None] * DV + v + o_v, mask=m_r[:, None], other=0.0)
            b_v = b_v.to(tl.float32) * b_decay  # [R, V]
            for k in range(0, DK, BLOCK_K):
                p_s = p_state + (k + o_k)[:, None] * DV + v + o_v
                b_s = tl.where(folded > 0, tl.load(p_s).to(tl.float32), 0.0)  # [K, V]
                b_k = tl.load(p_k + k + o_k[:, None] + o_r * DK, mask=m_r, other=0.0)  # [K, R]
                tl.store(p_s, _fold(b_s, b_k, b_v, leave).to(p_state.dtype.element_ty))
    tl.debug_barrier()  # `folded` is known to every thread
    tl.store(p_folded, tl.load(ends_ptr + i_n))


def _divisor(n: int, most: int) -> int:
    """The largest power of two that divides n, or `most`: tiles of it need no mask."""
    return min(n & -n, most)


def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    drafts: int,
    o: torch.Tensor,
) -> None:
    N, H, dk = q.shape
    dv = v.shape[-1]
    R = ring_k.shape[2]
    warps = 4 if states.dtype == torch.float32 else 2
    _decode_kernel[(H, N)](
        q,
        k,
        v,
        slopes,
        float(scale),
        states,
        ring_k,
        ring_v,
        folded,
        o,
        slots,
        starts,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        states.stride(0),
        ring_k.stride(0),
        ring_v.stride(0),
        folded.stride(0),
        drafts,
        dk,  # the bound of a loop that is not to be unrolled
        H,
        R=R,
        DK=dk,
        DV=dv,
        BLOCK_R=max(next_power_of_2(R), 16),
        BLOCK_K=_divisor(dk, 128),
        BLOCK_V=_divisor(dv, 128),
        PIECE=_divisor(dk, 8 * warps),
        PIECE_FOLD=_divisor(dk, 16),
        num_warps=warps,
        maxnreg=128,  # the loads of most of a state in flight, and room for several programs
    )


def _triton_fold(
    slopes: torch.Tensor,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
) -> None:
    H, dk, dv = states.shape[1:]
    R = ring_k.shape[2]
    _fold_kernel[(H, len(slots))](
        slopes,
        states,
        ring_k,
        ring_v,
        folded,
        slots,
        starts,
        ends,
        states.stride(0),
        ring_k.stride(0),
        ring_v.stride(0),
        folded.stride(0),
        R=R,
        DK=dk,
        DV=dv,
        BLOCK_R=max(next_power_of_2(R), 16),
        BLOCK_K=_divisor(dk, 32),
        BLOCK_V=_divisor(dv, 128),
        num_warps=4,
    )


def _position(folded: torch.Tensor, at: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """[N]: where the states at these slots stand, 0 where a sequence begins."""
    return torch.where(starts > 0, folded[at, 0], 0)


def _rows(
    ring: torch.Tensor, at: torch.Tensor, last: torch.Tensor, ages: torch.Tensor
) -> torch.Tensor:
    """[N, H, max(ages), d] float32: the tokens that lie 0, 1, 2, ... behind the last, each sequence
    having `ages` [N] of them, the rest zero."""
    age = torch.arange(int(ages.max()), device=ages.device)
    rows = ring[at[:, None], :, (last[:, None] - age) % ring.shape[2]].float()  # [N, A, H, d]
    return rows.masked_fill((age >= ages[:, None])[..., None, None], 0.0).transpose(1, 2)


def _torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    drafts: int,
    o: torch.Tensor,
) -> None:
    """All sequences together: states and rings are gathered; what is full is folded after."""
    o.zero_()
    real = (slots >= 0).nonzero().squeeze(1)
    if len(real) == 0:
        return
    if len(real) < len(slots):
        q, k, v, slots, starts = (x[real] for x in (q, k, v, slots, starts))
    at, R = slots.long(), ring_k.shape[2]
    ring_k[at, :, starts % R] = k
    ring_v[at, :, starts % R] = v
    position = _position(folded, at, starts)
    n = starts - position + 1
    K, V = (_rows(ring, at, starts, n) for ring in (ring_k, ring_v))
    S = states[at].float().masked_fill_((position == 0)[:, None, None, None], 0.0)
    q = (q.float() * scale).unsqueeze(2)  # [N, H, 1, dk]
    decay = torch.exp(-slopes[:, None] * torch.arange(K.shape[2], device=q.device))  # [H, A]
    scores = torch.matmul(q, K.transpose(2, 3)) * decay[:, None]
    before = torch.exp(-slopes * n[:, None])[..., None, None]
    y = torch.matmul(q, S) * before + torch.matmul(scores, V)
    o[real] = y.squeeze(2).to(o.dtype)
    folded[at] = position[:, None]
    full = (n >= R).nonzero().squeeze(1)
    if len(full):
        ends = starts[full] - drafts + 1
        _torch_fold(slopes, states, ring_k, ring_v, folded, slots[full], ends, ends)


def _torch_fold(
    slopes: torch.Tensor,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
) -> None:
    real = (slots >= 0).nonzero().squeeze(1)
    at, starts, ends = slots[real].long(), starts[real], ends[real]
    position = _position(folded, at, starts)
    folded[at] = ends[:, None]
    some = (starts > position).nonzero().squeeze(1)
    if len(some) == 0:
        return
    at, starts, position = at[some], starts[some], position[some]
    n = starts - position
    K, V = (_rows(ring, at, starts - 1, n) for ring in (ring_k, ring_v))
    decay = torch.exp(-slopes[:, None] * torch.arange(K.shape[2], device=K.device))[..., None]
    S = states[at].float().masked_fill_((position == 0)[:, None, None, None], 0.0)
    # one sum of the small terms, then one rounding: S + S expm1 alone would stall at small slopes
    update = torch.matmul(K.transpose(2, 3), V * decay)
    S += update.addcmul_(S, torch.expm1(-slopes * n[:, None])[..., None, None])
    states[at] = S.to(states.dtype)


def _check(
    slopes: torch.Tensor,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    S, H, dk, dv = states.shape
    R = ring_k.shape[2]
    assert slopes.shape == (H,) and slopes.dtype == torch.float32 and slopes.is_contiguous()
    assert ring_k.shape == (S, H, R, dk) and ring_v.shape == (S, H, R, dv)
    assert ring_k.dtype == ring_v.dtype
    assert states[0].is_contiguous() and ring_k[0].is_contiguous() and ring_v[0].is_contiguous()
    assert folded.shape == (S, H) and folded.dtype == torch.int64 and folded.stride(1) == 1
    assert slots.shape == starts.shape == (len(slots),)
    assert slots.dtype == torch.int32 and starts.dtype == torch.int64


def lightning_ring_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    drafts: int = 0,
) -> torch.Tensor:
    """q, k [N, H, dk], v [N, H, dv], slopes [H] float32 -> o [N, H, dv] in v's dtype.

    states [S, H, dk, dv] float32 or bfloat16, ring_k [S, H, R, dk] and ring_v [S, H, R, dv] in q's
    dtype, folded [S, H] int64 (the position up to which the state of a slot and head is folded) are
    updated in place at slots [N] int32. starts [N] int64 are the positions of these tokens: each
    one more than in the call before, or up to `drafts` less than that, which forgets the tokens
    from there on. Where it is 0 the sequence begins, whatever the slot holds; a row with slot -1 is
    padding and comes out as zero. `drafts` < R is the same in every call between two folds.
    """
    N, H, dk = q.shape
    dv = v.shape[-1]
    assert k.shape == (N, H, dk) and v.shape == (N, H, dv)
    assert q.dtype == k.dtype == v.dtype == ring_k.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert states.shape[1:] == (H, dk, dv) and slots.shape == (N,)
    assert 0 <= drafts < ring_k.shape[2]
    _check(slopes, states, ring_k, ring_v, folded, slots, starts)
    o = torch.empty(N, H, dv, dtype=v.dtype, device=v.device)
    (_triton if q.is_cuda else _torch)(
        q, k, v, slopes, scale, states, ring_k, ring_v, folded, slots, starts, drafts, o
    )
    return o


def lightning_ring_fold(
    slopes: torch.Tensor,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
) -> None:
    """Fold the rings at slots [N] up to the positions starts [N]; drafts from there on are gone.

    Afterwards the states are those of lightning_decode and lightning_prefill at starts, the rings
    are empty, and `folded` says ends [N] int64: starts, or the end of a prefill that follows.
    """
    _check(slopes, states, ring_k, ring_v, folded, slots, starts)
    assert ends.shape == starts.shape and ends.dtype == torch.int64
    (_triton_fold if states.is_cuda else _torch_fold)(
        slopes, states, ring_k, ring_v, folded, slots, starts, ends
    )
