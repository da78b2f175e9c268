"""Lightning attention for one token of each sequence, states updated in place.

    S' = S + S expm1(-slope) + k v^T        o = scale q^T S'

The specification is lightning_reference.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import early, expm1, jit, next_power_of_2, start_early, tl
from kernels.packing import PADDING, output
from kernels.tuning import DecodeTuning, decode_tuning


@jit(do_not_specialize_on_alignment=["slots_ptr", "starts_ptr"])
def _lightning_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slopes_ptr,
    scale,
    states_ptr,
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
    H,
    DK,
    DV,
    EARLY: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One sequence, one head, BLOCK_V columns of the state."""
    start_early(EARLY)
    i_v, i_h, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tl.load(slots_ptr + i_n).to(tl.int64)
    real = slot >= 0
    start = tl.load(starts_ptr + i_n)
    slope = tl.load(slopes_ptr + i_h)
    o_k = tl.arange(0, BLOCK_K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k, m_v = (o_k < DK) & real, (o_v < DV) & real
    p_q = q_ptr + i_n * q_row_stride + i_h * q_head_stride + o_k
    p_k = k_ptr + i_n * k_row_stride + i_h * k_head_stride + o_k
    p_v = v_ptr + i_n * v_row_stride + i_h * v_head_stride + o_v
    b_q = tl.load(p_q, mask=m_k, other=0.0).to(tl.float32)  # [K]
    b_k = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)  # [K]
    b_v = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32)  # [V]
    p_state = states_ptr + slot * states_stride + i_h * DK * DV + o_k[:, None] * DV + o_v
    m_state = m_k[:, None] & m_v
    b_s = tl.load(p_state, mask=m_state & (start > 0), other=0.0).to(tl.float32)  # [K, V]
    b_s += b_s * expm1(-slope) + b_k[:, None] * b_v
    b_o = tl.sum(b_q[:, None] * b_s, 0) * scale  # [V], zero in a row of padding
    p_o = o_ptr + (i_n * H + i_h) * DV + o_v
    tl.store(p_o, b_o.to(o_ptr.dtype.element_ty), mask=(o_v < DV) & (slot >= -1))  # not ELSEWHERE
    tl.store(p_state, b_s.to(states_ptr.dtype.element_ty), mask=m_state)


def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    o: torch.Tensor,
    tuning: DecodeTuning | None = None,
) -> None:
    N, H, dk = q.shape
    dv = v.shape[-1]
    tuning = tuning or decode_tuning(q.device, states.element_size())
    BLOCK_K = next_power_of_2(dk)
    BLOCK_V = max(min(next_power_of_2(dv), tuning.elements // BLOCK_K), 8)
    _lightning_decode_kernel[(-(-dv // BLOCK_V), H, N)](
        q,
        k,
        v,
        slopes,
        float(scale),
        states,
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
        H,
        dk,
        dv,
        BLOCK_K=BLOCK_K,
        BLOCK_V=BLOCK_V,
        num_warps=tuning.warps,
        **early(q.device),
    )


def _torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    o: torch.Tensor,
) -> None:
    """All sequences together: states are gathered, updated and put back."""
    if int(slots.min()) < 0:
        o[slots == PADDING] = 0
        real = (slots >= 0).nonzero().squeeze(1)
        if len(real):
            q, k, v, slots, starts = (x[real] for x in (q, k, v, slots, starts))
            part = torch.empty_like(v)
            _torch(q, k, v, slopes, scale, states, slots, starts, part)
            o[real] = part
        return
    S = states.index_select(0, slots).float()
    if int(starts.min()) == 0:
        S.masked_fill_((starts == 0)[:, None, None, None], 0.0)
    # one sum of the small terms, then one rounding: S + S expm1 alone would stall at small slopes
    update = k.float().unsqueeze(3) * v.float().unsqueeze(2)
    S += update.addcmul_(S, torch.expm1(-slopes)[:, None, None])
    states.index_copy_(0, slots.long(), S.to(states.dtype))
    o.copy_(torch.matmul((q.float() * scale).unsqueeze(2), S).squeeze(2))


def lightning_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q, k [N, H, dk], v [N, H, dv], slopes [H] float32 -> o [N, H, dv] in v's dtype.

    states [S, H, dk, dv] float32 or bfloat16, updated in place at slots [N] int32. Where starts [N]
    int64 is 0 the old state counts as zero; a row with slot PADDING comes out as zero, one with
    ELSEWHERE is left as it is. out: contiguous memory for o.
    """
    N, H, dk = q.shape
    dv = v.shape[-1]
    assert k.shape == (N, H, dk) and v.shape == (N, H, dv) and q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert slopes.shape == (H,) and slopes.dtype == torch.float32 and slopes.is_contiguous()
    assert states.shape[1:] == (H, dk, dv) and states[0].is_contiguous()
    assert slots.shape == starts.shape == (N,)
    assert slots.dtype == torch.int32 and starts.dtype == torch.int64
    o = output((N, H, dv), v, out)
    (_triton if q.is_cuda else _torch)(q, k, v, slopes, scale, states, slots, starts, o)
    return o
