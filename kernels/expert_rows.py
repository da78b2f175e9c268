"""Experts of few tokens, a row at a time: h_tk = silu(gate_e x_t) * (up_e x_t), e = ids_tk, and
y_t = sum_k weight_tk down_e h_tk.

Weights go from memory to registers and are multiplied there: nothing is sorted, shared or padded. A
weight that two rows need is read twice, by programs that run side by side.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import early, jit, start_early, tl
from kernels.quantize import Quantized, Weight
from kernels.tuning import ProductTuning


@jit
def _part(p, mask, EVEN: tl.constexpr):
    """What p points to, 0 beyond the end; float32."""
    if EVEN:
        return tl.load(p).to(tl.float32)
    return tl.load(p, mask=mask, other=0).to(tl.float32)


@jit
def _up_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    ids_ptr,
    h_ptr,
    N,
    D,
    x_stride,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_N elements of one h_tk, from as many rows of gate and of up, which lie N rows apart."""
    start_early(EARLY)
    i_r = tl.program_id(0).to(tl.int64)
    e = tl.load(ids_ptr + i_r).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    o_w = e * 2 * N + tl.where(m_n, o_n, 0)  # rows of w; up's are N further
    p_x = x_ptr + i_r // K * x_stride + o_d
    p_gate = w_ptr + o_w[:, None] * D + o_d  # [N, D]
    p_up = w_ptr + (o_w + N)[:, None] * D + o_d
    b_gate = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_up = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        b_x = _part(p_x + d, o_d < D - d, EVEN)[None, :]
        b_gate += _part(p_gate + d, (o_d < D - d)[None, :], EVEN) * b_x
        b_up += _part(p_up + d, (o_d < D - d)[None, :], EVEN) * b_x
    b_g, b_u = tl.sum(b_gate, 1), tl.sum(b_up, 1)
    if SCALED:
        b_g *= tl.load(scales_ptr + o_w)
        b_u *= tl.load(scales_ptr + o_w + N)
    b_h = b_g * tl.sigmoid(b_g) * b_u
    tl.store(h_ptr + i_r * N + o_n, b_h.to(h_ptr.dtype.element_ty), mask=m_n)


@jit
def _down_kernel(
    h_ptr,
    w_ptr,
    scales_ptr,
    ids_ptr,
    weights_ptr,
    y_ptr,
    N,
    D,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_N elements of one y_t: its experts one after the other into one sum."""
    start_early(EARLY)
    i_t = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < N
    o_row = tl.where(m_n, o_n, 0)
    b_sums = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        e = tl.load(ids_ptr + i_t * K + k).to(tl.int64)
        weight = tl.load(weights_ptr + i_t * K + k)
        p_h = h_ptr + (i_t * K + k) * D + o_d
        p_w = w_ptr + (e * N + o_row)[:, None] * D + o_d  # [N, D]
        if SCALED:
            b_scales = tl.load(scales_ptr + e * N + o_row)[:, None]
        if WHOLE:  # without a loop the loads of all experts can be on their way at once
            b_h = _part(p_h, o_d < D, EVEN) * weight
            b_w = _part(p_w, (o_d < D)[None, :], EVEN)
            b_sums += (b_w * b_scales if SCALED else b_w) * b_h[None, :]
        else:
            for d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
                b_h = _part(p_h + d, o_d < D - d, EVEN) * weight
                b_w = _part(p_w + d, (o_d < D - d)[None, :], EVEN)
                b_sums += (b_w * b_scales if SCALED else b_w) * b_h[None, :]
    b_y = tl.sum(b_sums, 1)
    tl.store(y_ptr + i_t * N + o_n, b_y.to(y_ptr.dtype.element_ty), mask=m_n)


def _parts(w: Weight) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (w.codes, w.scales) if isinstance(w, Quantized) else (w, None)


def up(x: torch.Tensor, w: Weight, ids: torch.Tensor, tuning: ProductTuning) -> torch.Tensor:
    """x [T, D], rows of any distance, w [E, 2 N, D] (gate rows first), as they are or int8,
    ids [T, K] integers below E -> h [T K, N] in x's dtype."""
    (T, D), K, (E, N2, _) = x.shape, ids.shape[1], w.shape
    codes, scales = _parts(w)
    assert codes.shape == (E, N2, D) and codes.is_contiguous() and x.stride(1) == 1
    assert ids.shape == (T, K) and ids.is_contiguous()
    h = torch.empty(T * K, N2 // 2, dtype=x.dtype, device=x.device)
    _up_kernel[(T * K, -(-N2 // 2 // tuning.outputs))](
        x,
        codes,
        scales,
        ids,
        h,
        N2 // 2,
        D,
        x.stride(0),
        K=K,
        SCALED=scales is not None,
        EVEN=D % tuning.inputs == 0,
        BLOCK_N=tuning.outputs,
        BLOCK_D=tuning.inputs,
        STAGES=tuning.stages,
        num_warps=tuning.warps,
        **early(x.device, asked=False),  # measured: slower
    )
    return h


def down(
    h: torch.Tensor,
    w: Weight,
    ids: torch.Tensor,
    weights: torch.Tensor,
    tuning: ProductTuning,
) -> torch.Tensor:
    """h [T K, D], w [E, N, D], as they are or int8, ids and weights [T, K] -> y [T, N]."""
    (T, K), (E, N, D) = ids.shape, w.shape
    codes, scales = _parts(w)
    assert h.shape == (T * K, D) and h.is_contiguous() and codes.is_contiguous() and E > 0
    assert weights.shape == (T, K) and weights.is_contiguous() and ids.is_contiguous()
    y = torch.empty(T, N, dtype=h.dtype, device=h.device)
    _down_kernel[(T, -(-N // tuning.outputs))](
        h,
        codes,
        scales,
        ids,
        weights,
        y,
        N,
        D,
        K=K,
        SCALED=scales is not None,
        EVEN=D % tuning.inputs == 0,
        WHOLE=tuning.inputs >= D,
        BLOCK_N=tuning.outputs,
        BLOCK_D=tuning.inputs,
        STAGES=tuning.stages,
        num_warps=tuning.warps,
        **early(h.device, asked=False),
    )
    return y
