"""The products of expert_tiles on Hopper, of weights as they are: the same formula and sums.

Weights come by bulk copies, which take no addresses and no threads; gate and up have a sum each.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.grouped_gemm import most_tiles, rows_of, tiles_of
from kernels.language import (
    HAVE_TRITON,
    dot_precision,
    early,
    jit,
    next_power_of_2,
    start_early,
    tl,
)
from kernels.quantize import Weight
from kernels.tuning import ProductTuning

if HAVE_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

LEAST = 64  # rows that warp groups multiply: fewer are other instructions', with other sums


@jit
def _tile(
    x_ptr,
    w_desc,
    y_ptr,
    order_ptr,
    row,
    i_n,
    begin,
    end,
    N,
    D,
    x_stride,
    SHARE: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As expert_tiles has it, from BLOCK_N rows of w, `row` and those after it."""
    o_m = begin + tl.arange(0, BLOCK_M)
    m_m = o_m < end
    o_r = tl.load(order_ptr + o_m, mask=m_m, other=0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    p_x = x_ptr + (o_r // SHARE)[:, None] * x_stride + o_d  # [M, D]
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATED:
        b_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_D):
        b_w = w_desc.load([row, d])  # [N, D], 0 beyond D
        if GATED:
            b_w_up = w_desc.load([row + N, d])
        b_x = tl.load(p_x, mask=m_m[:, None] if EVEN else m_m[:, None] & (o_d < D - d), other=0.0)
        b_y = tl.dot(b_x, b_w.T, b_y, input_precision=PRECISION)
        if GATED:
            b_up = tl.dot(b_x, b_w_up.T, b_up, input_precision=PRECISION)
        p_x += BLOCK_D
    if GATED:
        b_y = b_y * tl.sigmoid(b_y) * b_up
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    p_y = y_ptr + o_r[:, None] * N + o_n
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_m[:, None] & (o_n < N))


@jit
def _product_kernel(
    x_ptr,
    w_desc,
    y_ptr,
    order_ptr,
    ends_ptr,
    E,
    N,
    D,
    x_stride,
    SHARE: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    HALVES: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As expert_tiles has it."""
    start_early(EARLY)
    tiles = tiles_of(ends_ptr, E, BLOCK_E, BLOCK_M)
    i_m, i_n = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if i_n * BLOCK_N >= N:
        return
    i_e, begin, end = rows_of(i_m, ends_ptr, E, BLOCK_E, BLOCK_M)
    row = i_e * (2 * N if GATED else N) + i_n * BLOCK_N
    of = x_ptr, w_desc, y_ptr, order_ptr, row, i_n, begin, end, N, D, x_stride
    if HALVES and end - begin <= BLOCK_M // 2:
        _tile(*of, SHARE, GATED, EVEN, BLOCK_M // 2, BLOCK_N, BLOCK_D, PRECISION)
    else:
        _tile(*of, SHARE, GATED, EVEN, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION)


def able(w: Weight) -> bool:
    """Whether bulk copies can read w: as it is, and in rows that are whole 16 bytes."""
    return isinstance(w, torch.Tensor) and w.shape[2] * w.itemsize % 16 == w.data_ptr() % 16 == 0


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    order: torch.Tensor,
    ends: torch.Tensor,
    tuning: ProductTuning,
    y: torch.Tensor,
) -> None:
    """x [T, D], rows of any distance, w [E, N, D] or, of gate and up, [E, 2 N, D], order [R] and
    ends [E] -> y [R, N]. Captured in a graph, w stays where it is."""
    (R, N), (E, rows, D) = y.shape, w.shape
    assert able(w) and w.is_contiguous() and rows in (N, 2 * N)
    w = w.view(E * rows, D)
    _product_kernel[(most_tiles(R, E, tuning.rows) * -(-N // tuning.outputs),)](
        x,
        TensorDescriptor.from_tensor(w, [tuning.outputs, tuning.inputs]),
        y,
        order,
        ends,
        E,
        N,
        D,
        x.stride(0),
        SHARE=R // len(x),
        GATED=rows == 2 * N,
        EVEN=D % tuning.inputs == 0,
        HALVES=tuning.rows >= 2 * LEAST,
        BLOCK_E=next_power_of_2(E),
        BLOCK_M=tuning.rows,
        BLOCK_N=tuning.outputs,
        BLOCK_D=tuning.inputs,
        PRECISION=dot_precision(x.dtype),
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        **early(x.device, asked=False),
    )
