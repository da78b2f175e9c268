"""Products of rows with quantised matrices, each row with its group's: y_r = scales_g * codes_g x_r
for begin_g <= r < end_g, where the rows of a group lie side by side.

The kernel multiplies codes as they are, exact in bfloat16, and scales the sums. int8 is of weights
alone: rows stay what they are. fp8 is of both: rows are quantised too, and y_r is scaled by theirs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from kernels.language import dot_precision, early, jit, next_power_of_2, start_early, tl
from kernels.quantize import Quantized, Weight
from kernels.tuning import card, processors


def grouped_gemm_reference(x: Weight, w: Quantized, ends: torch.Tensor) -> torch.Tensor:
    """Group by group, shapes as in grouped_gemm -> [R, N] float64."""
    bounds = [0, *ends.tolist()]
    x, matrices = x.double(), w.double()
    parts = [x[bounds[g] : bounds[g + 1]] @ matrix.t() for g, matrix in enumerate(matrices)]
    return torch.cat(parts)


@jit
def groups_of(ends_ptr, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where groups begin and end, and tiles of rows up to the end of each [E]."""
    o_e = tl.arange(0, BLOCK_E)
    b_end = tl.load(ends_ptr + o_e, mask=o_e < E, other=0)
    b_begin = tl.load(ends_ptr + o_e - 1, mask=(o_e > 0) & (o_e < E), other=0)
    return b_begin, b_end, tl.cumsum((b_end - b_begin + BLOCK_M - 1) // BLOCK_M)


@jit
def tiles_of(ends_ptr, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """How many tiles of rows there are."""
    return tl.max(groups_of(ends_ptr, E, BLOCK_E, BLOCK_M)[2])


@jit
def rows_of(i_m, ends_ptr, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tile's group, the tile's first row, and where the group's rows end. Beyond the last tile is
    a group beyond the last."""
    b_begin, b_end, b_last = groups_of(ends_ptr, E, BLOCK_E, BLOCK_M)
    i_e = tl.sum((b_last <= i_m).to(tl.int32))
    mine = tl.arange(0, BLOCK_E) == i_e
    before = tl.max(tl.where(b_last <= i_m, b_last, 0))
    begin = tl.sum(tl.where(mine, b_begin, 0)) + (i_m - before) * BLOCK_M
    return i_e, begin, tl.sum(tl.where(mine, b_end, 0))


def most_tiles(R: int, E: int, BLOCK_M: int) -> int:
    """No more tiles of rows than these, however R rows fall into E groups."""
    return min(E, R) + R // BLOCK_M


@jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["ends_ptr"])
def _grouped_gemm_kernel(
    x_ptr,
    x_scales_ptr,
    w_ptr,
    w_scales_ptr,
    y_ptr,
    ends_ptr,
    R,
    E,
    N,
    K,
    x_stride,
    ONE: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_M rows of one group by BLOCK_N outputs. There are programs for as many tiles of rows as
    there can be; which group a tile is of, if any, each finds out by itself."""
    start_early(EARLY)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.num_programs(0) // tiles_n
    i_group, i_in_group = (
        tl.program_id(0) // (GROUP * tiles_n),
        tl.program_id(0) % (GROUP * tiles_n),
    )
    height = tl.minimum(tiles_m - i_group * GROUP, GROUP)
    i_m, i_n = i_group * GROUP + i_in_group % height, i_in_group // height
    if ONE:
        i_e, begin, end = 0, i_m * BLOCK_M, R
    else:
        i_e, begin, end = rows_of(i_m, ends_ptr, E, BLOCK_E, BLOCK_M)
    if i_e >= E:
        return
    o_m = begin + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < end, o_n < N
    o_w = (i_e * N + tl.where(m_n, o_n, 0)).to(tl.int64)  # rows of w
    o_x = tl.where(m_m, o_m, begin).to(tl.int64)  # rows beyond are read as another, and not written
    p_x = x_ptr + o_x[:, None] * x_stride + o_k  # [M, K]
    p_w = w_ptr + o_w * K + o_k[:, None]  # [K, N]
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN:
            b_x, b_w = tl.load(p_x), tl.load(p_w)
        else:
            b_x = tl.load(p_x, mask=o_k < K - k, other=0.0)
            b_w = tl.load(p_w, mask=(o_k < K - k)[:, None], other=0.0 if SCALED else 0)
        if SCALED:
            b_y = tl.dot(b_x, b_w, b_y, max_num_imprecise_acc=32)
        else:
            b_y = tl.dot(b_x, b_w.to(b_x.dtype), b_y, input_precision=PRECISION)
        p_x += BLOCK_K
        p_w += BLOCK_K
    b_y *= tl.load(w_scales_ptr + o_w)
    if SCALED:
        b_y *= tl.load(x_scales_ptr + o_x)[:, None]
    p_y = y_ptr + o_x[:, None] * N + o_n
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_m[:, None] & m_n)


def tiles(R: int, E: int, N: int, itemsize: int, device: torch.device) -> dict[str, Any]:
    """Sizes for R rows of so many bytes an element, in E groups, by N outputs."""
    rows = -(-R // E)  # in the mean: few read every weight once, many are bound by products
    if itemsize == 4:
        return {"BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_N": 64, "BLOCK_K": 32}
    if rows <= 32:
        programs = min(E, R) * -(-N // 64)
        BLOCK_N = 64 if programs >= 2 * processors(device) else 32
        sizes = {"BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_N": BLOCK_N, "BLOCK_K": 128}
        return {**sizes, "num_warps": 4, "num_stages": 4}
    BLOCK_K = 128 // itemsize
    if rows <= 128:
        sizes = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": BLOCK_K}
        return {**sizes, "num_warps": 4, "num_stages": 3}
    sizes = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": BLOCK_K}
    return {**sizes, "num_warps": 8, "num_stages": 3}


def _triton(x: Weight, w: Quantized, ends: torch.Tensor | None, y: torch.Tensor) -> None:
    rows, scales = (x.codes, x.scales) if isinstance(x, Quantized) else (x, None)
    (R, K), (E, N, _) = rows.shape, w.shape
    sizes = tiles(R, E, N, rows.itemsize, rows.device)
    count = most_tiles(R, E, sizes["BLOCK_M"])
    if ends is None:
        count = -(-R // sizes["BLOCK_M"])
    _grouped_gemm_kernel[(count * -(-N // sizes["BLOCK_N"]),)](
        rows,
        scales,
        w.codes,
        w.scales,
        y,
        ends,
        R,
        E,
        N,
        K,
        rows.stride(0),
        ONE=ends is None,
        SCALED=scales is not None,
        EVEN=K % sizes["BLOCK_K"] == 0,
        GROUP=4,
        BLOCK_E=next_power_of_2(E),
        PRECISION=dot_precision(rows.dtype),
        **sizes,
        **early(rows.device),
    )


def _torch(x: Weight, w: Quantized, ends: torch.Tensor | None, y: torch.Tensor) -> None:
    rows = (x.codes if isinstance(x, Quantized) else x).float()
    begin = 0
    for e, end in enumerate([len(rows)] if ends is None else ends.tolist()):
        if begin < end:
            part = F.linear(rows[begin:end], w.codes[e].float()).mul_(w.scales[e])
            if isinstance(x, Quantized):
                part.mul_(x.scales[begin:end, None])
            y[begin:end] = part
        begin = end


def _library(x: Quantized, w: Quantized, ends: torch.Tensor) -> torch.Tensor:
    """PyTorch's grouped product, of fp8 on Hopper."""
    by_row = F.ScalingType.RowWise
    weights, kind = w.codes.transpose(1, 2), torch.bfloat16
    product = F.scaled_grouped_mm  # type: ignore[attr-defined]
    return product(
        x.codes, weights, x.scales, by_row, w.scales, by_row, offs=ends, output_dtype=kind
    )


def grouped_gemm(
    x: Weight, w: Quantized, ends: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """x [R, K], rows of any distance, w [E, N, K] -> [R, N] in `dtype`.

    x is quantised like w where w is fp8, and of `dtype` where w is int8. ends [E] int32, on the
    device: where each group's rows end, ends[E - 1] = R; None where E is 1.
    """
    rows = x.codes if isinstance(x, Quantized) else x
    (R, K), (E, N, _) = rows.shape, w.shape
    fp8 = w.codes.is_floating_point()
    assert w.shape == (E, N, K) and w.codes.is_contiguous() and w.scales.is_contiguous()
    assert rows.dtype == (w.codes.dtype if fp8 else dtype) and rows.stride(-1) == 1
    assert E == 1 if ends is None else ends.shape == (E,) and ends.dtype == torch.int32
    if R and fp8 and ends is not None and rows.is_cuda and dtype == torch.bfloat16:
        assert isinstance(x, Quantized)
        if card(rows.device) == (9, 0) and N % 16 == K % 16 == 0 and rows.is_contiguous():
            return _library(x, w, ends)
    y = torch.empty(R, N, dtype=dtype, device=rows.device)
    if R:
        (_triton if rows.is_cuda else _torch)(x, w, ends, y)
    return y
