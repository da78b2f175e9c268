"""Experts of many tokens, in tiles of rows of one expert: h_r = silu(gate_e x_t) * (up_e x_t) and
z_r = down_e h_r for r = t K + k, e = ids_r, of which y_t = sum_k weight_tk z_tk is yet to be made.

Rows are gathered and scattered by an order that sorts them by expert: what lies in memory is in the
order of tokens throughout. Which rows share a tile does not change a row's sums.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels import expert_tiles_hopper
from kernels.expert_tiles_hopper import LEAST
from kernels.grouped_gemm import most_tiles, rows_of, tiles_of
from kernels.join import Parts
from kernels.language import dot_precision, early, jit, next_power_of_2, start_early, tl
from kernels.quantize import Quantized, Weight
from kernels.tuning import ProductTuning


@jit
def _tile(
    x_ptr,
    w_ptr,
    scales_ptr,
    y_ptr,
    order_ptr,
    i_e,
    i_n,
    begin,
    end,
    N,
    D,
    x_stride,
    SHARE: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows `begin` and those after it, up to BLOCK_M and to `end`, by BLOCK_N outputs."""
    o_m = begin + tl.arange(0, BLOCK_M)
    m_m = o_m < end  # nothing is read of rows beyond
    o_r = tl.load(order_ptr + o_m, mask=m_m, other=0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    SETS: tl.constexpr = 2 if GATED else 1  # gate and up by turns: a thread has both of an output
    o_c = tl.arange(0, SETS * BLOCK_N)
    o_w = i_n * BLOCK_N + o_c // SETS
    o_w = tl.where(o_w < N, o_w, 0) + o_c % SETS * N
    o_w += i_e.to(tl.int64) * SETS * N  # rows of w
    p_x = x_ptr + (o_r // SHARE)[:, None] * x_stride + o_d  # [M, D]
    p_w = w_ptr + o_w * D + o_d[:, None]  # [D, SETS N]
    b_y = tl.zeros((BLOCK_M, SETS * BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_D):
        if EVEN:
            b_x, b_w = tl.load(p_x, mask=m_m[:, None], other=0.0), tl.load(p_w)
        else:
            b_x = tl.load(p_x, mask=m_m[:, None] & (o_d < D - d), other=0.0)
            b_w = tl.load(p_w, mask=(o_d < D - d)[:, None], other=0)
        b_y = tl.dot(b_x, b_w.to(b_x.dtype), b_y, input_precision=PRECISION)
        p_x += BLOCK_D
        p_w += BLOCK_D
    if SCALED:
        b_y *= tl.load(scales_ptr + o_w)
    if GATED:
        b_gate, b_up = tl.split(tl.reshape(b_y, (BLOCK_M, BLOCK_N, 2)))
        b_y = b_gate * tl.sigmoid(b_gate) * b_up
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    p_y = y_ptr + o_r[:, None] * N + o_n
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_m[:, None] & m_n)


@jit
def _product_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    y_ptr,
    order_ptr,
    ends_ptr,
    E,
    N,
    D,
    x_stride,
    SHARE: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    HALVES: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M rows of one expert by BLOCK_N outputs. SHARE rows of y in turn are made of one of x.
    GATED: w has N rows of gate and N of up, and the outputs are silu(gate) * up. HALVES: a tile
    whose rows fill no more than half of it is multiplied as one of half as many.

    There are programs for as many tiles of rows as there can be. Those of an expert lie side by
    side, so that weights are read once; those without a tile come last, so that all others begin
    together."""
    start_early(EARLY)
    tiles = tiles_of(ends_ptr, E, BLOCK_E, BLOCK_M)
    i_m, i_n = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if i_n * BLOCK_N >= N:
        return
    i_e, begin, end = rows_of(i_m, ends_ptr, E, BLOCK_E, BLOCK_M)
    of = x_ptr, w_ptr, scales_ptr, y_ptr, order_ptr, i_e, i_n, begin, end, N, D, x_stride
    if HALVES and end - begin <= BLOCK_M // 2:
        _tile(*of, SHARE, GATED, SCALED, EVEN, BLOCK_M // 2, BLOCK_N, BLOCK_D, PRECISION)
    else:
        _tile(*of, SHARE, GATED, SCALED, EVEN, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)


def _product(
    x: torch.Tensor,
    w: Weight,
    order: torch.Tensor,
    ends: torch.Tensor,
    tuning: ProductTuning,
    gated: bool,
) -> torch.Tensor:
    R, (E, N, D) = len(order), w.shape
    N = N // 2 if gated else N
    codes, scales = (w.codes, w.scales) if isinstance(w, Quantized) else (w, None)
    assert x.shape[1] == D and x.stride(1) == 1 and codes.is_contiguous() and R % len(x) == 0
    assert ends.shape == (E,) and ends.dtype == torch.int32 and order.is_contiguous()
    y = torch.empty(R, N, dtype=x.dtype, device=x.device)
    if tuning.bulk and expert_tiles_hopper.able(w):
        assert isinstance(w, torch.Tensor)
        expert_tiles_hopper.product(x, w, order, ends, tuning, y)
        return y
    _product_kernel[(most_tiles(R, E, tuning.rows) * -(-N // tuning.outputs),)](
        x,
        codes,
        scales,
        y,
        order,
        ends,
        E,
        N,
        D,
        x.stride(0),
        SHARE=R // len(x),
        GATED=gated,
        SCALED=scales is not None,
        EVEN=D % tuning.inputs == 0,
        HALVES=tuning.rows >= 2 * LEAST,
        BLOCK_E=next_power_of_2(E),
        BLOCK_M=tuning.rows,
        BLOCK_N=tuning.outputs,
        BLOCK_D=tuning.inputs,
        PRECISION=dot_precision(x.dtype),
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        **early(x.device, asked=False),  # measured: slower
    )
    return y


def up(
    x: torch.Tensor, w: Weight, order: torch.Tensor, ends: torch.Tensor, tuning: ProductTuning
) -> torch.Tensor:
    """x [T, D], rows of any distance, w [E, 2 N, D] (gate rows first), as they are or int8; order
    [T K] and ends [E] as by_expert has them -> h [T K, N] in x's dtype, in the order of tokens."""
    return _product(x, w, order, ends, tuning, True)


def down(
    h: torch.Tensor,
    w: Weight,
    order: torch.Tensor,
    ends: torch.Tensor,
    weights: torch.Tensor,
    tuning: ProductTuning,
) -> Parts:
    """h [T K, D], w [E, N, D], as they are or int8, weights [T, K] float32 -> y [T, N] in
    parts."""
    return Parts(_product(h, w, order, ends, tuning, False), weights)
