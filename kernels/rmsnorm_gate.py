"""Output norm and gate of a lightning layer: y = RMSNorm(o) * weight * sigmoid(gate)."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import jit, next_power_of_2, tl
from kernels.rmsnorm import rmsnorm_reference


def rmsnorm_gate_reference(
    o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """o, gate [T, D] -> [T, D] float64."""
    return rmsnorm_reference(o, weight, eps) * torch.sigmoid(gate.double())


@jit
def _rmsnorm_gate_kernel(
    o_ptr, gate_ptr, weight_ptr, y_ptr, o_stride, gate_stride, D, eps, BLOCK_D: tl.constexpr
):
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_o = tl.load(o_ptr + i_row * o_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_g = tl.load(gate_ptr + i_row * gate_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_w = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_y = b_o / tl.sqrt(tl.sum(b_o * b_o) / D + eps) * b_w * tl.sigmoid(b_g)  # [BLOCK_D]
    tl.store(y_ptr + i_row * D + o_d, b_y.to(y_ptr.dtype.element_ty), mask=m_d)


def _triton(
    o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor
) -> None:
    T, D = o.shape
    BLOCK_D = next_power_of_2(D)
    _rmsnorm_gate_kernel[(T,)](
        o,
        gate,
        weight,
        y,
        o.stride(0),
        gate.stride(0),
        D,
        eps,
        BLOCK_D=BLOCK_D,
        num_warps=min(max(BLOCK_D // 512, 1), 16),
    )


def _torch(
    o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, y: torch.Tensor
) -> None:
    o = o.float()
    z = torch.sigmoid(gate.float()).mul_(weight).mul_(o)
    y.copy_(z.mul_(o.square().mean(-1, keepdim=True).add_(eps).rsqrt_()))


def rmsnorm_gate(
    o: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """o, gate [T, D], rows anywhere, weight [D] -> [T, D] in o's dtype. D spans all heads."""
    assert o.ndim == 2 and o.shape == gate.shape and o.stride(-1) == gate.stride(-1) == 1
    assert weight.shape == o.shape[-1:] and weight.is_contiguous()
    y = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    (_triton if o.is_cuda else _torch)(o, gate, weight, eps, y)
    return y
