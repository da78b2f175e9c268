"""Output norm and gate of a lightning layer: y = RMSNorm(o) * weight * sigmoid(gate).

The norm is over all heads, or over G groups of them each; TransNormer has neither the weight nor
the sigmoid.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import early, jit, next_power_of_2, start_early, tl
from kernels.rmsnorm import rmsnorm_reference


def rmsnorm_gate_reference(
    o: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    groups: int = 1,
    sigmoid: bool = True,
) -> torch.Tensor:
    """o, gate [T, D] -> [T, D] float64."""
    y = rmsnorm_reference(o.unflatten(1, (groups, -1)), None, eps).flatten(1)
    y = y if weight is None else y * weight.double()
    return y * (torch.sigmoid(gate.double()) if sigmoid else gate.double())


@jit
def _rmsnorm_gate_kernel(
    o_ptr,
    gate_ptr,
    weight_ptr,
    y_ptr,
    o_stride,
    gate_stride,
    D,
    WIDTH,
    eps,
    HAS_WEIGHT: tl.constexpr,
    SIGMOID: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start_early(EARLY)
    i_row = tl.program_id(0).to(tl.int64)
    o_w = tl.arange(0, BLOCK)
    m_w = o_w < WIDTH
    o_d = tl.program_id(1) * WIDTH + o_w
    b_o = tl.load(o_ptr + i_row * o_stride + o_d, mask=m_w, other=0.0).to(tl.float32)
    b_g = tl.load(gate_ptr + i_row * gate_stride + o_d, mask=m_w, other=0.0).to(tl.float32)
    b_y = b_o / tl.sqrt(tl.sum(b_o * b_o) / WIDTH + eps)  # [BLOCK]
    if HAS_WEIGHT:
        b_y *= tl.load(weight_ptr + o_d, mask=m_w, other=0.0).to(tl.float32)
    if SIGMOID:
        b_g = tl.sigmoid(b_g)
    b_y *= b_g
    tl.store(y_ptr + i_row * D + o_d, b_y.to(y_ptr.dtype.element_ty), mask=m_w)


def _triton(
    o: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    groups: int,
    sigmoid: bool,
    y: torch.Tensor,
) -> None:
    T, D = o.shape
    BLOCK = next_power_of_2(D // groups)
    _rmsnorm_gate_kernel[(T, groups)](
        o,
        gate,
        weight,
        y,
        o.stride(0),
        gate.stride(0),
        D,
        D // groups,
        eps,
        HAS_WEIGHT=weight is not None,
        SIGMOID=sigmoid,
        BLOCK=BLOCK,
        num_warps=min(max(BLOCK // 512, 1), 16),
        **early(o.device),
    )


def _torch(
    o: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    groups: int,
    sigmoid: bool,
    y: torch.Tensor,
) -> None:
    o = o.float().unflatten(1, (groups, -1))
    scale = o.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    z = torch.mul(o, scale).flatten(1).mul_(torch.sigmoid(gate.float()) if sigmoid else gate)
    y.copy_(z if weight is None else z.mul_(weight))


def rmsnorm_gate(
    o: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    groups: int = 1,
    sigmoid: bool = True,
) -> torch.Tensor:
    """o, gate [T, D], rows anywhere, weight [D] or None -> [T, D] in o's dtype. D spans all heads,
    of which each of `groups` equal parts is normed alone."""
    assert o.ndim == 2 and o.shape == gate.shape and o.stride(-1) == gate.stride(-1) == 1
    assert weight is None or (weight.shape == o.shape[-1:] and weight.is_contiguous())
    assert o.shape[1] % groups == 0
    y = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    (_triton if o.is_cuda else _torch)(o, gate, weight, eps, groups, sigmoid, y)
    return y
