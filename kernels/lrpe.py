"""LRPE (TransNormerLLM, arXiv 2307.14995): y = [x cos(theta p), x sin(theta p)] at position p.

theta is learned, one angle a head and dimension; the inner product of two such y is that of the x,
weighted by the cosine of theta times their distance.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import early, jit, next_power_of_2, start_early, tl


def lrpe_reference(x: torch.Tensor, theta: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [T, G H, d], theta [H, d], positions [T] -> [T, G H, 2 d] float64."""
    angles = positions.double()[:, None, None] * theta.double()
    angles = angles.repeat(1, x.shape[1] // len(theta), 1)
    return torch.cat((x.double() * angles.cos(), x.double() * angles.sin()), dim=-1)


@jit
def _lrpe_kernel(
    x_ptr,
    theta_ptr,
    positions_ptr,
    y_ptr,
    x_row_stride,
    x_head_stride,
    H,
    D,
    GROUPS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    start_early(EARLY)
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m = (o_h < H) & (o_d < D)
    b_theta = tl.load(theta_ptr + o_h * D + o_d, mask=m, other=0.0).to(tl.float64)
    # whole turns are taken off in float64; what is left is at most pi and good in float32
    b_turns = b_theta * tl.load(positions_ptr + i_t).to(tl.float64) * 0.15915494309189535
    b_angle = ((b_turns - tl.floor(b_turns + 0.5)) * 6.283185307179586).to(tl.float32)
    b_cos, b_sin = tl.cos(b_angle), tl.sin(b_angle)  # [BLOCK_H, BLOCK_D]
    for g in tl.static_range(GROUPS):
        p_x = x_ptr + i_t * x_row_stride + (g * H + o_h) * x_head_stride + o_d
        b_x = tl.load(p_x, mask=m, other=0.0).to(tl.float32)
        p_y = y_ptr + (i_t * (GROUPS * H) + g * H + o_h) * (2 * D) + o_d
        tl.store(p_y, (b_x * b_cos).to(y_ptr.dtype.element_ty), mask=m)
        tl.store(p_y + D, (b_x * b_sin).to(y_ptr.dtype.element_ty), mask=m)


def _triton(x: torch.Tensor, theta: torch.Tensor, positions: torch.Tensor, y: torch.Tensor) -> None:
    T, heads, D = x.shape
    H = len(theta)
    BLOCK_D = next_power_of_2(D)
    BLOCK_H = min(next_power_of_2(H), max(1024 // BLOCK_D, 1))
    _lrpe_kernel[(T, -(-H // BLOCK_H))](
        x,
        theta,
        positions,
        y,
        x.stride(0),
        x.stride(1),
        H,
        D,
        GROUPS=heads // H,
        BLOCK_H=BLOCK_H,
        BLOCK_D=BLOCK_D,
        **early(x.device),
    )


def _torch(x: torch.Tensor, theta: torch.Tensor, positions: torch.Tensor, y: torch.Tensor) -> None:
    D = x.shape[-1]
    angles = positions.double()[:, None, None] * theta.double()
    turned = angles.sub_((angles / (2 * torch.pi)).round_().mul_(2 * torch.pi)).float()[:, None]
    x, y = x.unflatten(1, (-1, len(theta))), y.unflatten(1, (-1, len(theta)))  # [T, G, H, ...]
    y[..., :D] = x * turned.cos()
    y[..., D:] = x * turned.sin()


def lrpe(x: torch.Tensor, theta: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [T, G H, d], rows and heads anywhere, theta [H, d] float32, positions [T] int64.

    Returns [T, G H, 2 d] in x's dtype; head g H + h turns by theta[h], so q and k go together.
    """
    T, heads, d = x.shape
    assert x.stride(-1) == 1 and heads % len(theta) == 0 and theta.shape[1:] == (d,)
    assert theta.dtype == torch.float32 and theta.is_contiguous()
    assert positions.shape == (T,) and positions.dtype == torch.int64
    y = torch.empty(T, heads, 2 * d, dtype=x.dtype, device=x.device)
    (_triton if x.is_cuda else _torch)(x, theta, positions, y)
    return y
