"""The rows of a token's experts joined: y_t = sum_k weight_tk z_r, r = place_tk.

The sum is float32 and in the order of k. Who reads y once and soon takes it as Parts, and adds up
on the way (kernels/residual_rmsnorm.py).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.language import early, jit, next_power_of_2, start_early, tl

BLOCK = 1024


@dataclass(slots=True, frozen=True, eq=False)
class Parts:
    """Rows y [T, D] that are not added up yet: z [T K, D], weights [T, K] float32, place [T K]
    integers, or None where r = t K + k."""

    z: torch.Tensor
    weights: torch.Tensor
    place: torch.Tensor | None = None

    def __post_init__(self) -> None:
        T, K = self.weights.shape
        assert len(self.z) == T * K and self.z.is_contiguous() and self.weights.is_contiguous()
        assert self.weights.dtype == torch.float32
        place = self.place
        assert place is None or (place.shape == (T * K,) and place.is_contiguous())

    @property
    def shape(self) -> torch.Size:
        """That of y."""
        return torch.Size((len(self.weights), self.z.shape[1]))


Rows = torch.Tensor | Parts


def join_reference(parts: Parts) -> torch.Tensor:
    """As join, in float64."""
    rows = parts.z.double() if parts.place is None else parts.z.double()[parts.place]
    return (rows.view(*parts.weights.shape, -1) * parts.weights.double()[:, :, None]).sum(1)


@jit
def joined(
    z_ptr,
    weights_ptr,
    place_ptr,
    i_t,
    o_d,
    m_d,
    D,
    K: tl.constexpr,
    PLACED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of y_t, float32."""
    b_y = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = i_t * K + k
        if PLACED:
            row = tl.load(place_ptr + row).to(tl.int64)
        b_z = tl.load(z_ptr + row * D + o_d, mask=m_d, other=0.0)
        b_y += b_z.to(tl.float32) * tl.load(weights_ptr + i_t * K + k)
    return b_y


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
    b_y = joined(z_ptr, weights_ptr, place_ptr, i_t, o_d, m_d, D, K, PLACED, BLOCK)
    tl.store(y_ptr + i_t * D + o_d, b_y.to(y_ptr.dtype.element_ty), mask=m_d)


def _triton(parts: Parts, y: torch.Tensor) -> None:
    (T, D), K = y.shape, parts.weights.shape[1]
    size = min(BLOCK, next_power_of_2(D))
    _join_kernel[(T, -(-D // size))](
        parts.z,
        parts.weights,
        parts.place,
        y,
        D,
        K=K,
        PLACED=parts.place is not None,
        BLOCK=size,
        **early(y.device),
    )


def _torch(parts: Parts, y: torch.Tensor) -> None:
    rows = parts.z if parts.place is None else parts.z[parts.place]
    rows = rows.view(*parts.weights.shape, -1)
    y.copy_((rows.float() * parts.weights[:, :, None]).sum(1))


def join(rows: Rows) -> torch.Tensor:
    """y [T, D] in z's dtype; a tensor as it is."""
    if isinstance(rows, torch.Tensor):
        return rows
    y = torch.empty(rows.shape, dtype=rows.z.dtype, device=rows.z.device)
    if len(y):
        (_triton if y.is_cuda else _torch)(rows, y)
    return y
