"""The rows of a token's experts joined: y_t = sum_k weight_tk z_r, r = place_tk.

The sum is float32 and in the order of k.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import early, jit, next_power_of_2, start_early, tl

BLOCK = 1024


def join_reference(
    z: torch.Tensor, weights: torch.Tensor, place: torch.Tensor | None = None
) -> torch.Tensor:
    """As join, in float64."""
    rows = z.double() if place is None else z.double()[place]
    return (rows.view(*weights.shape, -1) * weights.double()[:, :, None]).sum(1)


@jit
def _join_kernel(
    z_ptr,
    weights_ptr,
    place_ptr,
    y_ptr,
    D,
    K: tl.constexpr,
    PLACED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of one y_t."""
    start_early(EARLY)
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    b_y = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = i_t * K + k
        if PLACED:
            row = tl.load(place_ptr + row).to(tl.int64)
        b_z = tl.load(z_ptr + row * D + o_d, mask=m_d, other=0.0)
        b_y += b_z.to(tl.float32) * tl.load(weights_ptr + i_t * K + k)
    tl.store(y_ptr + i_t * D + o_d, b_y.to(y_ptr.dtype.element_ty), mask=m_d)


def _triton(
    z: torch.Tensor, weights: torch.Tensor, place: torch.Tensor | None, y: torch.Tensor
) -> None:
    (T, K), D = weights.shape, z.shape[1]
    size = min(BLOCK, next_power_of_2(D))
    grid = T, -(-D // size)
    _join_kernel[grid](
        z, weights, place, y, D, K=K, PLACED=place is not None, BLOCK=size, **early(z.device)
    )


def _torch(
    z: torch.Tensor, weights: torch.Tensor, place: torch.Tensor | None, y: torch.Tensor
) -> None:
    rows = (z if place is None else z[place]).view(*weights.shape, -1)
    y.copy_((rows.float() * weights[:, :, None]).sum(1))


def join(z: torch.Tensor, weights: torch.Tensor, place: torch.Tensor | None = None) -> torch.Tensor:
    """z [T K, D], weights [T, K] float32, place [T K] integers or None (row t K + k) -> y [T, D]
    in z's dtype."""
    (T, K), D = weights.shape, z.shape[1]
    assert len(z) == T * K and z.is_contiguous() and weights.is_contiguous()
    assert weights.dtype == torch.float32
    assert place is None or (place.shape == (T * K,) and place.is_contiguous())
    y = torch.empty(T, D, dtype=z.dtype, device=z.device)
    if T:
        (_triton if z.is_cuda else _torch)(z, weights, place, y)
    return y
