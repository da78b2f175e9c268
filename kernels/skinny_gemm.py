"""Products of few rows with what stands before and after them, each weight read once:

    y = after(w t / rms(z)),    z = alpha x + beta f,    t = z * weight * gate,    w [N, K]

where rms(z) = sqrt(mean(z^2) + eps); f, weight, gate and the norm may be absent. The norm divides
sums and not rows, so that no program waits for a whole row before it multiplies. After the product
come silu of the first outputs, or the product of both halves of the outputs. On the way the sum z,
or the normed row t / rms(z), is kept for what follows.

A single row is summed by ordinary arithmetic in float32, more go through the matrix units: there t
is rounded to w's dtype, or kept whole as two terms of it. Every sum has a fixed order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from kernels.language import dot_precision, early, jit, next_power_of_2, start_early, tl
from kernels.rmsnorm import rmsnorm_reference
from kernels.tuning import SkinnyTuning

Keep = Literal["", "sum", "normed"]
Pair = Literal["", "mul", "silu_mul"]


@dataclass(slots=True, frozen=True, eq=False, kw_only=True)
class Before:
    """The rows of a product before they are computed: x, f, gate [M, K], rows anywhere; weight [K].

    Without `norm` nothing is divided. With `groups` each equal part of a row is normed alone. A
    gate counts as it is, or through a sigmoid.
    """

    x: torch.Tensor
    f: torch.Tensor | None = None
    alpha: float = 1.0
    beta: float = 1.0
    weight: torch.Tensor | None = None
    norm: bool = False
    eps: float = 0.0
    groups: int = 1
    gate: torch.Tensor | None = None
    sigmoid: bool = False


def before_reference(b: Before) -> tuple[torch.Tensor, torch.Tensor]:
    """z and t / rms(z), [M, K] float64."""
    z = b.alpha * b.x.double() + (0.0 if b.f is None else b.beta * b.f.double())
    t = z
    if b.norm:
        t = rmsnorm_reference(z.unflatten(1, (b.groups, -1)), None, b.eps).flatten(1)
    if b.weight is not None:
        t = t * b.weight.double()
    if b.gate is not None:
        t = t * (b.gate.double().sigmoid() if b.sigmoid else b.gate.double())
    return z, t


def skinny_gemm_reference(
    b: Before, w: torch.Tensor, *, silu: int = 0, pair: Pair = ""
) -> torch.Tensor:
    """As skinny_gemm, in float64."""
    y = before_reference(b)[1] @ w.double().t()
    if pair:
        one, two = y.chunk(2, dim=1)
        return (F.silu(one) if pair == "silu_mul" else one) * two
    return torch.cat((F.silu(y[:, :silu]), y[:, silu:]), dim=1)


@jit
def _load(p, m, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(p)
    else:
        return tl.load(p, mask=m, other=0.0)


@jit
def _before(
    p_x,
    p_f,
    p_gate,
    p_weight,
    m,
    alpha,
    beta,
    HAS_F: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    GATE: tl.constexpr,
    EVEN: tl.constexpr,
):
    """z and t, float32."""
    b_z = alpha * _load(p_x, m, EVEN).to(tl.float32)
    if HAS_F:
        b_z += beta * _load(p_f, m, EVEN).to(tl.float32)
    b_t = b_z
    if HAS_WEIGHT:
        b_t *= _load(p_weight, m, EVEN).to(tl.float32)
    if GATE != "":
        b_gate = _load(p_gate, m, EVEN).to(tl.float32)
        b_t *= tl.sigmoid(b_gate) if GATE == "sigmoid" else b_gate
    return b_z, b_t


@jit
def _outputs(i_n, N, PAIR: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which rows of w a program reads, in int64. Of a pair those of the two halves take turns, so
    that what is multiplied at last lies side by side."""
    o_j = tl.arange(0, BLOCK_N)
    if PAIR != "":
        o_n = i_n * (BLOCK_N // 2) + o_j // 2
        return tl.minimum(o_n, N - 1).to(tl.int64) + o_j % 2 * N
    else:
        return tl.minimum(i_n * BLOCK_N + o_j, N - 1).to(tl.int64)


@jit
def _after(b_y, i_n, SILU, PAIR: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """b_y [ROWS, BLOCK_N] -> what is stored, [ROWS, BLOCK_N] or half as wide."""
    if PAIR != "":
        b_one, b_two = tl.split(tl.reshape(b_y, [ROWS, BLOCK_N // 2, 2]))
        if PAIR == "silu_mul":
            b_one *= tl.sigmoid(b_one)
        return b_one * b_two
    else:
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        return tl.where((o_n < SILU)[None, :], b_y * tl.sigmoid(b_y), b_y)


@jit
def _row_kernel(
    x_ptr,
    f_ptr,
    gate_ptr,
    weight_ptr,
    w_ptr,
    y_ptr,
    kept_ptr,
    alpha,
    beta,
    eps,
    N,
    K,
    SILU,
    HAS_F: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NORM: tl.constexpr,
    GROUPED: tl.constexpr,
    GATE: tl.constexpr,
    KEEP: tl.constexpr,
    PAIR: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
):
    """One row by BLOCK_N rows of w. The next weights are under way while these are multiplied, and
    the first before the kernel that makes x has ended, if this one may start early."""
    i_n = tl.program_id(0)
    o_k = tl.arange(0, BLOCK_K)
    p_w = w_ptr + _outputs(i_n, N, PAIR, BLOCK_N)[:, None] * K + o_k[None, :]
    b_w = _load(p_w, (o_k < K)[None, :], EVEN)  # [N, K]
    start_early(EARLY)
    b_sum = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    b_squares = tl.zeros([BLOCK_K], tl.float32)
    for k in range(0, K, BLOCK_K):
        p_w += BLOCK_K
        b_next = tl.load(p_w, mask=(o_k < K - BLOCK_K - k)[None, :], other=0.0)
        o = k + o_k
        where = x_ptr + o, f_ptr + o, gate_ptr + o, weight_ptr + o, o < K
        b_z, b_t = _before(*where, alpha, beta, HAS_F, HAS_WEIGHT, GATE, EVEN)
        if GROUPED:  # a block is a group
            b_t /= tl.sqrt(tl.sum(b_z * b_z) / BLOCK_K + eps)
        elif NORM:
            b_squares += b_z * b_z
        b_product = b_w.to(tl.float32) * b_t[None, :]
        b_sum += tl.sum(tl.reshape(b_product, [BLOCK_N, BLOCK_K // 8, 8]), 2)  # within a thread
        b_w = b_next
    rms = 1.0
    if NORM and not GROUPED:
        rms = tl.sqrt(tl.sum(b_squares) / K + eps)
    b_y = _after((tl.sum(b_sum, 1) / rms)[None, :], i_n, SILU, PAIR, 1, BLOCK_N)
    STORED: tl.constexpr = BLOCK_N // 2 if PAIR != "" else BLOCK_N
    o_n = i_n * STORED + tl.arange(0, STORED)
    tl.store(y_ptr + o_n[None, :], b_y.to(y_ptr.dtype.element_ty), mask=(o_n < N)[None, :])
    if KEEP != "":  # each program a part
        o = i_n * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)
        where = x_ptr + o, f_ptr + o, gate_ptr + o, weight_ptr + o, o < K
        b_z, b_t = _before(*where, alpha, beta, HAS_F, HAS_WEIGHT, GATE, False)
        b_kept = b_t / rms if KEEP == "normed" else b_z
        tl.store(kept_ptr + o, b_kept.to(kept_ptr.dtype.element_ty), mask=o < K)


@jit(do_not_specialize=["M"])
def _tile_kernel(
    x_ptr,
    f_ptr,
    gate_ptr,
    weight_ptr,
    w_ptr,
    y_ptr,
    kept_ptr,
    alpha,
    beta,
    eps,
    M,
    N,
    K,
    SILU,
    x_stride,
    f_stride,
    gate_stride,
    HAS_F: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NORM: tl.constexpr,
    GROUPED: tl.constexpr,
    GATE: tl.constexpr,
    KEEP: tl.constexpr,
    PAIR: tl.constexpr,
    EVEN: tl.constexpr,
    EARLY: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
):
    """BLOCK_M rows by BLOCK_N rows of w; programs that read the same weights are neighbours."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    i_n = tl.program_id(0) // tiles_m
    o_k = tl.arange(0, BLOCK_K)
    o_m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    i_m = tl.minimum(o_m, M - 1).to(tl.int64)[:, None]  # rows past the last repeat it
    p_w = w_ptr + _outputs(i_n, N, PAIR, BLOCK_N)[None, :] * K + o_k[:, None]
    p_x, p_f = x_ptr + i_m * x_stride, f_ptr + i_m * f_stride
    p_gate = gate_ptr + i_m * gate_stride
    start_early(EARLY)
    b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_squares = tl.zeros([BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        o = k + o_k[None, :]
        b_w = _load(p_w + k, (k + o_k < K)[:, None], EVEN)  # [K, N]
        where = p_x + o, p_f + o, p_gate + o, weight_ptr + o, o < K
        b_z, b_t = _before(*where, alpha, beta, HAS_F, HAS_WEIGHT, GATE, EVEN)
        if GROUPED:  # a block is a group
            b_t /= tl.sqrt(tl.sum(b_z * b_z, 1) / BLOCK_K + eps)[:, None]
        elif NORM:
            b_squares += tl.sum(b_z * b_z, 1)
        b_high = b_t.to(b_w.dtype)
        b_y = tl.dot(b_high, b_w, b_y, input_precision=PRECISION)
        if WHOLE:
            b_low = (b_t - b_high.to(tl.float32)).to(b_w.dtype)
            b_y = tl.dot(b_low, b_w, b_y, input_precision=PRECISION)
    m_m = (o_m < M)[:, None]
    if NORM and not GROUPED:
        b_rms = tl.sqrt(b_squares / K + eps)[:, None]
        b_y /= b_rms
    b_y = _after(b_y, i_n, SILU, PAIR, BLOCK_M, BLOCK_N)
    STORED: tl.constexpr = BLOCK_N // 2 if PAIR != "" else BLOCK_N
    o_n = i_n * STORED + tl.arange(0, STORED)[None, :]
    p_y = y_ptr + o_m.to(tl.int64)[:, None] * N + o_n
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_m & (o_n < N))
    if KEEP != "":  # each program a part
        o = i_n * BLOCK_KEPT + tl.arange(0, BLOCK_KEPT)[None, :]
        where = p_x + o, p_f + o, p_gate + o, weight_ptr + o, o < K
        b_z, b_t = _before(*where, alpha, beta, HAS_F, HAS_WEIGHT, GATE, False)
        b_kept = b_t / b_rms if KEEP == "normed" else b_z
        p_kept = kept_ptr + o_m.to(tl.int64)[:, None] * K + o
        tl.store(p_kept, b_kept.to(kept_ptr.dtype.element_ty), mask=m_m & (o < K))


def skinny_gemm(
    b: Before,
    w: torch.Tensor,
    tuning: SkinnyTuning,
    *,
    silu: int = 0,
    pair: Pair = "",
    keep: Keep = "",
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """b of M rows, w [N, K] -> y [M, N], and z or the normed rows [M, K] if kept.

    silu: of so many first outputs. pair: y [M, N / 2], the halves multiplied, the first through
    silu or not. out_dtype: float32 keeps t in two terms where w has 16 bits. Groups must be as wide
    as tuning.inputs, a power of two. Triton alone has this way; fused_linear knows the other.
    """
    (M, K), (N, _) = b.x.shape, w.shape
    rows = [x for x in (b.x, b.f, b.gate) if x is not None]
    assert M > 0 and (M == 1 or tuning.rows > 1) and w.shape == (N, K) and w.is_contiguous()
    assert all(x.shape == (M, K) and x.stride(1) == 1 for x in rows)
    assert b.weight is None or (b.weight.shape == (K,) and b.weight.is_contiguous())
    assert b.groups == 1 or (b.norm and not keep and K // b.groups == tuning.inputs)
    assert keep != "normed" or b.norm
    assert K % b.groups == 0 and not (pair and silu) and not (pair and N % 2)
    stored = tuning.outputs // 2 if pair else tuning.outputs
    N = N // 2 if pair else N
    programs = -(-N // stored)
    y = torch.empty(M, N, dtype=out_dtype or b.x.dtype, device=b.x.device)
    kept = torch.empty(M, K, dtype=b.x.dtype, device=b.x.device) if keep else None
    options = {
        "HAS_F": b.f is not None,
        "HAS_WEIGHT": b.weight is not None,
        "NORM": b.norm,
        "GROUPED": b.groups > 1,
        "GATE": "" if b.gate is None else "sigmoid" if b.sigmoid else "plain",
        "KEEP": keep,
        "PAIR": pair,
        "EVEN": K % tuning.inputs == 0,
        "BLOCK_N": tuning.outputs,
        "BLOCK_K": tuning.inputs,
        "BLOCK_KEPT": max(next_power_of_2(-(-K // programs)), 16),
        "num_warps": tuning.warps,
        **early(w.device, tuning.early),
    }
    # what is absent is read nowhere
    pointers = b.x, *(b.x if p is None else p for p in (b.f, b.gate, b.weight)), w, y, kept
    numbers = float(b.alpha), float(b.beta), b.eps
    if tuning.rows == 1:
        _row_kernel[(programs,)](*pointers, *numbers, N, K, silu, **options)
        return y, kept
    strides = [0 if x is None else x.stride(0) for x in (b.x, b.f, b.gate)]
    _tile_kernel[(programs * -(-M // tuning.rows),)](
        *pointers,
        *numbers,
        M,
        N,
        K,
        silu,
        *strides,
        WHOLE=y.dtype == torch.float32 and w.dtype != torch.float32,
        PRECISION=dot_precision(w.dtype),
        BLOCK_M=tuning.rows,
        num_stages=tuning.stages,
        **options,
    )
    return y, kept
