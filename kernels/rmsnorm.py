"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight, one program per row."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import early, jit, next_power_of_2, start_early, tl


def rmsnorm_reference(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x [..., D] -> [..., D] float64."""
    x = x.double()
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight.double()


@jit
def _rmsnorm_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    x_row_stride,
    x_head_stride,
    H,
    D,
    eps,
    HAS_WEIGHT: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start_early(EARLY)
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    p_x = x_ptr + i_row // H * x_row_stride + i_row % H * x_head_stride + o_d
    b_x = tl.load(p_x, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    b_y = b_x / tl.sqrt(tl.sum(b_x * b_x) / D + eps)
    if HAS_WEIGHT:
        b_y *= tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(y_ptr + i_row * D + o_d, b_y.to(y_ptr.dtype.element_ty), mask=m_d)


def _triton(x: torch.Tensor, weight: torch.Tensor | None, eps: float, y: torch.Tensor) -> None:
    *_, D = x.shape
    H = x.shape[1] if x.ndim == 3 else 1
    BLOCK_D = next_power_of_2(D)
    _rmsnorm_kernel[(y.numel() // D,)](
        x,
        weight,
        y,
        x.stride(0),
        x.stride(1) if x.ndim == 3 else 0,
        H,
        D,
        eps,
        HAS_WEIGHT=weight is not None,
        BLOCK_D=BLOCK_D,
        num_warps=min(max(BLOCK_D // 512, 1), 16),
        **early(x.device),
    )


def _torch(x: torch.Tensor, weight: torch.Tensor | None, eps: float, y: torch.Tensor) -> None:
    x = x.float()
    scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    z = torch.mul(x, scale, out=y if y.dtype == x.dtype else None)
    if weight is not None:
        z.mul_(weight)
    if z is not y:
        y.copy_(z)


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [T, D] or [T, H, D], rows anywhere; weight [D] or None -> the same shape, contiguous."""
    assert x.ndim in (2, 3) and x.stride(-1) == 1
    assert weight is None or (weight.shape == x.shape[-1:] and weight.is_contiguous())
    y = torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device)
    (_triton if x.is_cuda else _torch)(x, weight, eps, y)
    return y
