"""Weighted residual and RMSNorm in one pass: y = RMSNorm(alpha x + beta f) * weight.

With MiniMax's post-norm (arXiv 2501.08313, section 2.2) x is itself a normed value, so the sum is
not kept. With pre-norm it is the stream: x += f, y = RMSNorm(x) * weight. Where f is not added up
yet (kernels/join.py), a kernel of its own does so on the way, to the same numbers.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.join import Parts, Rows, join, joined
from kernels.language import early, jit, next_power_of_2, start_early, tl
from kernels.rmsnorm import rmsnorm_reference


def residual_rmsnorm_reference(
    x: torch.Tensor,
    f: torch.Tensor,
    alpha: float,
    beta: float,
    weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """x, f [T, D] -> [T, D] float64."""
    return rmsnorm_reference(alpha * x.double() + beta * f.double(), weight, eps)


@jit
def _row(
    p_x,
    b_f,
    weight_ptr,
    p_y,
    alpha,
    beta,
    o_d,
    m_d,
    D,
    eps,
    KEEP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """One row, of which b_f is loaded."""
    b_x = tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_z = alpha * b_x + beta * b_f  # [BLOCK_D]
    if KEEP:
        tl.store(p_x + o_d, b_z.to(p_x.dtype.element_ty), mask=m_d)
    b_y = b_z / tl.sqrt(tl.sum(b_z * b_z) / D + eps)
    if HAS_WEIGHT:
        b_y *= tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_y + o_d, b_y.to(p_y.dtype.element_ty), mask=m_d)


@jit
def _residual_rmsnorm_kernel(
    x_ptr,
    f_ptr,
    weight_ptr,
    y_ptr,
    alpha,
    beta,
    x_stride,
    f_stride,
    D,
    eps,
    KEEP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start_early(EARLY)
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_f = tl.load(f_ptr + i_t * f_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    p_x, p_y = x_ptr + i_t * x_stride, y_ptr + i_t * D
    _row(p_x, b_f, weight_ptr, p_y, alpha, beta, o_d, m_d, D, eps, KEEP, HAS_WEIGHT)


@jit
def _joined_rmsnorm_kernel(
    x_ptr,
    z_ptr,
    weights_ptr,
    place_ptr,
    weight_ptr,
    y_ptr,
    alpha,
    beta,
    x_stride,
    D,
    eps,
    K: tl.constexpr,
    PLACED: tl.constexpr,
    KEEP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """f_t is made of K rows of z, and rounded as if it were stored."""
    start_early(EARLY)
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_f = joined(z_ptr, weights_ptr, place_ptr, i_t, o_d, m_d, D, K, PLACED, BLOCK_D)
    b_f = b_f.to(z_ptr.dtype.element_ty).to(tl.float32)
    p_x, p_y = x_ptr + i_t * x_stride, y_ptr + i_t * D
    _row(p_x, b_f, weight_ptr, p_y, alpha, beta, o_d, m_d, D, eps, KEEP, HAS_WEIGHT)


def _triton(
    x: torch.Tensor,
    f: Rows,
    alpha: float,
    beta: float,
    weight: torch.Tensor | None,
    eps: float,
    keep: bool,
    y: torch.Tensor,
) -> None:
    T, D = x.shape
    BLOCK_D = next_power_of_2(D)
    options = {
        "KEEP": keep,
        "HAS_WEIGHT": weight is not None,
        "BLOCK_D": BLOCK_D,
        "num_warps": min(max(BLOCK_D // 512, 1), 16),
        **early(x.device),
    }
    scales = float(alpha), float(beta)
    if isinstance(f, Parts):
        _joined_rmsnorm_kernel[(T,)](
            x,
            f.z,
            f.weights,
            f.place,
            weight,
            y,
            *scales,
            x.stride(0),
            D,
            eps,
            K=f.weights.shape[1],
            PLACED=f.place is not None,
            **options,
        )
    else:
        strides = x.stride(0), f.stride(0)
        _residual_rmsnorm_kernel[(T,)](x, f, weight, y, *scales, *strides, D, eps, **options)


def _torch(
    x: torch.Tensor,
    f: Rows,
    alpha: float,
    beta: float,
    weight: torch.Tensor | None,
    eps: float,
    keep: bool,
    y: torch.Tensor,
) -> None:
    z = torch.add(x.float() * alpha, join(f).float(), alpha=beta)
    if keep:
        x.copy_(z)
    z.mul_(z.square().mean(-1, keepdim=True).add_(eps).rsqrt_())
    if weight is not None and y.dtype == torch.float32:
        torch.mul(z, weight, out=y)
    else:
        y.copy_(z if weight is None else z.mul_(weight))


def residual_rmsnorm(
    x: torch.Tensor,
    f: Rows,
    alpha: float,
    beta: float,
    weight: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x, f [T, D], rows anywhere, f maybe in parts, weight [D] or None -> RMSNorm(alpha x + beta f)
    * weight."""
    y = _allocate(x, f, weight, out_dtype)
    (_triton if x.is_cuda else _torch)(x, f, alpha, beta, weight, eps, False, y)
    return y


def add_rmsnorm_(
    x: torch.Tensor,
    f: Rows,
    weight: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x, f [T, D], likewise, weight [D] or None: x += f -> RMSNorm(x) * weight [T, D]."""
    y = _allocate(x, f, weight, out_dtype)
    (_triton if x.is_cuda else _torch)(x, f, 1.0, 1.0, weight, eps, True, y)
    return y


def _allocate(
    x: torch.Tensor, f: Rows, weight: torch.Tensor | None, dtype: torch.dtype | None
) -> torch.Tensor:
    assert x.ndim == 2 and x.shape == f.shape and x.stride(-1) == 1
    assert isinstance(f, Parts) or f.stride(-1) == 1
    assert weight is None or (weight.shape == x.shape[-1:] and weight.is_contiguous())
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
