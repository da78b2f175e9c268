"""Gated units: y = silu(a) * b or y = a * b, and silu alone, silu(x) = x / (1 + exp(-x))."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.language import early, jit, start_early, tl

BLOCK = 1024


def silu_reference(x: torch.Tensor) -> torch.Tensor:
    """Elementwise, float64."""
    return x.double() / (1 + torch.exp(-x.double()))


def silu_mul_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise, float64."""
    return silu_reference(a) * b.double()


def mul_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Elementwise, float64."""
    return a.double() * b.double()


@jit
def _silu_mul_kernel(
    a_ptr,
    b_ptr,
    y_ptr,
    a_stride,
    b_stride,
    y_stride,
    D,
    GATED: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start_early(EARLY)
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    b_a = tl.load(a_ptr + i_row * a_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = b_a * tl.sigmoid(b_a)  # [BLOCK]
    if GATED:
        b_y *= tl.load(b_ptr + i_row * b_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(y_ptr + i_row * y_stride + o_d, b_y.to(y_ptr.dtype.element_ty), mask=m_d)


@jit
def _mul_kernel(
    a_ptr, b_ptr, y_ptr, a_stride, b_stride, D, EARLY: tl.constexpr, BLOCK: tl.constexpr
):
    start_early(EARLY)
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_d = o_d < D
    b_y = tl.load(a_ptr + i_row * a_stride + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK]
    b_y *= tl.load(b_ptr + i_row * b_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(y_ptr + i_row * D + o_d, b_y.to(y_ptr.dtype.element_ty), mask=m_d)


def _triton(a: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor, silu: bool) -> None:
    T, D = a.shape
    grid = T, -(-D // BLOCK)
    if not silu:
        assert b is not None
        strides = a.stride(0), b.stride(0)
        _mul_kernel[grid](a, b, y, *strides, D, BLOCK=BLOCK, **early(a.device))
        return
    _silu_mul_kernel[grid](
        a,
        b,
        y,
        a.stride(0),
        0 if b is None else b.stride(0),
        y.stride(0),
        D,
        GATED=b is not None,
        BLOCK=BLOCK,
        **early(a.device),
    )


def _torch(a: torch.Tensor, b: torch.Tensor | None, y: torch.Tensor, silu: bool) -> None:
    if not silu:
        assert b is not None
        torch.mul(a, b, out=y)
    elif b is None:
        y.copy_(F.silu(a.float())) if y is not a else F.silu(y, inplace=True)
    elif a.dtype == torch.float32:
        torch.mul(F.silu(a), b, out=y)
    else:
        y.copy_(F.silu(a.float()).mul_(b))


def silu_mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a, b [T, D], rows anywhere (halves of one [T, 2 D], say) -> silu(a) * b [T, D]."""
    return _product(a, b, True)


def mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a, b [T, D], rows anywhere -> a * b [T, D], each product rounded once."""
    return _product(a, b, False)


def _product(a: torch.Tensor, b: torch.Tensor, silu: bool) -> torch.Tensor:
    assert a.ndim == 2 and a.shape == b.shape and a.stride(-1) == b.stride(-1) == 1
    assert a.dtype == b.dtype
    y = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    (_triton if a.is_cuda else _torch)(a, b, y, silu)
    return y


def silu_(x: torch.Tensor) -> torch.Tensor:
    """x [T, D], rows anywhere: silu in place; returns x."""
    assert x.ndim == 2 and x.stride(-1) == 1
    (_triton if x.is_cuda else _torch)(x, None, x, True)
    return x
