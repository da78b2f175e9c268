"""Rotary positions (RoFormer, arXiv 2104.09864, section 3.4.2), halves as in GPT-NeoX.

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

where x1 and x2 are the halves of a head's first r dimensions; the others pass through. Models with
qk-norm put z = RMSNorm(x) * weight, over each head, in the place of x.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import early, jit, next_power_of_2, start_early, tl
from kernels.rmsnorm import rmsnorm_reference


def rotary_angles(
    positions: torch.Tensor, inv_freq: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions [T] int64, inv_freq [r / 2] float64 -> cos, sin [T, r / 2] float32.

    The angle is float64: in float32 it is off by up to 0.09 rad at 4 million positions.
    """
    assert positions.dtype == torch.int64 and inv_freq.dtype == torch.float64
    angles = positions[:, None] * inv_freq  # float64, as everything until the end
    cos, sin = torch.empty(2, *angles.shape, dtype=torch.float32, device=angles.device).unbind()
    return torch.cos(angles, out=cos), torch.sin(angles, out=sin)


def rotary_reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """x [T, H, d], cos, sin [T, r / 2], weight [d] -> [T, H, d] float64."""
    half = cos.shape[-1]
    x = x.double() if weight is None else rmsnorm_reference(x, weight, eps)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    x1, x2, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1)


@jit
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    y_ptr,
    x_row_stride,
    x_head_stride,
    H,
    D,
    HALF,
    eps,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start_early(EARLY)
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    m_rotated = o_d < 2 * HALF
    m_first = o_d < HALF
    o_other = tl.where(m_first, o_d + HALF, o_d - HALF)  # the dimension that it is rotated with
    o_angle = i_t * HALF + o_d % HALF
    b_cos = tl.load(cos_ptr + o_angle, mask=m_rotated, other=1.0)  # [BLOCK_D]
    b_sin = tl.load(sin_ptr + o_angle, mask=m_rotated, other=0.0)
    b_sin = tl.where(m_first, -b_sin, b_sin)
    p_x = x_ptr + i_t * x_row_stride + o_h[:, None] * x_head_stride  # [BLOCK_H, 1]
    m_h = o_h[:, None] < H
    b_x = tl.load(p_x + o_d, mask=m_h & m_d, other=0.0).to(tl.float32)  # [BLOCK_H, BLOCK_D]
    b_other = tl.load(p_x + o_other, mask=m_h & m_rotated, other=0.0).to(tl.float32)
    if NORM:
        b_scale = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=1) / D + eps)[:, None]
        b_x *= b_scale * tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_w = tl.load(weight_ptr + o_other, mask=m_rotated, other=0.0).to(tl.float32)
        b_other *= b_scale * b_w
    b_y = b_x * b_cos + b_other * b_sin
    p_y = y_ptr + (i_t * H + o_h[:, None]) * D + o_d
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_h & m_d)


def _triton(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
) -> None:
    T, H, D = x.shape
    BLOCK_D = next_power_of_2(D)
    BLOCK_H = min(next_power_of_2(H), max(4096 // BLOCK_D, 1))
    _rotary_kernel[(T, -(-H // BLOCK_H))](
        x,
        cos,
        sin,
        weight,
        y,
        x.stride(0),
        x.stride(1),
        H,
        D,
        cos.shape[1],
        eps,
        NORM=weight is not None,
        BLOCK_H=BLOCK_H,
        BLOCK_D=BLOCK_D,
        **early(x.device),
    )


def _torch(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
) -> None:
    half = cos.shape[1]
    cos, sin = cos[:, None], sin[:, None]
    if weight is not None:
        x = x.float()
        x = x * x.square().mean(-1, keepdim=True).add_(eps).rsqrt_() * weight
    x1, x2 = x[..., :half].float(), x[..., half : 2 * half].float()
    y[..., :half] = (x1 * cos).addcmul_(x2, sin, value=-1)
    y[..., half : 2 * half] = (x2 * cos).addcmul_(x1, sin)
    if 2 * half < x.shape[-1]:
        y[..., 2 * half :] = x[..., 2 * half :]


def _launch(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    T, _, d = x.shape
    assert x.stride(-1) == 1
    assert cos.shape == sin.shape and len(cos) == T and 2 * cos.shape[1] <= d
    assert cos.dtype == sin.dtype == torch.float32 and cos.is_contiguous() and sin.is_contiguous()
    assert weight is None or (weight.shape == (d,) and weight.is_contiguous())
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (_triton if x.is_cuda else _torch)(x, cos, sin, weight, eps, y)
    return y


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, H, d], rows and heads anywhere, cos, sin [T, r / 2] float32 -> [T, H, d]."""
    return _launch(x, cos, sin, None, 0.0)


def norm_rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """rotary of RMSNorm(x) * weight over each head, in one pass; weight [d]."""
    return _launch(x, cos, sin, weight, eps)
