"""Mixture of experts: y_t = sum_k weight_tk down_e (silu(gate_e x_t) * (up_e x_t)), e = ids_tk."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.gated import silu_mul


def moe_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Token by token, shapes as in moe -> [T, D] float64."""
    rows = []
    for x_t, ids_t, weights_t in zip(x.double(), expert_ids.tolist(), weights, strict=True):
        y = torch.zeros_like(x_t)
        for e, weight in zip(ids_t, weights_t.double(), strict=True):
            gate, up = (gate_up[e].double() @ x_t).chunk(2)
            y += weight * (down[e].double() @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def _expert(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """One expert: x [R, D], gate_up [2 I, D], down [D, I] -> [R, D]."""
    return F.linear(silu_mul(*F.linear(x, gate_up).chunk(2, dim=1)), down)


def _grouped(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Rows sorted by expert, one grouped GEMM for each of the two products; bfloat16 on CUDA."""
    both = F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends)
    return F.grouped_mm(silu_mul(*both.chunk(2, dim=1)), down.transpose(1, 2), offs=ends)


def _looped(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Rows sorted by expert, one expert after the other."""
    y = torch.empty_like(x)
    begin = 0
    for e, end in enumerate(ends.tolist()):
        if begin < end:
            y[begin:end] = _expert(x[begin:end], gate_up[e], down[e])
        begin = end
    return y


def _masked(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """Rows sorted by expert; every expert computes every row, which asks nothing of the device: for
    dtypes on CUDA that no grouped GEMM has, where speed is not looked for."""
    y = torch.zeros_like(x)
    row = torch.arange(len(x), device=x.device)[:, None]
    begin = torch.zeros_like(ends[0])
    for e, end in enumerate(ends.unbind()):
        y = torch.where((row >= begin) & (row < end), _expert(x, gate_up[e], down[e]), y)
        begin = end
    return y


def moe(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    expert_ids: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """x [T, D], gate_up [E, 2 I, D] (gate rows first), down [E, D, I] -> [T, D] in x's dtype.

    expert_ids [T, K] integers below E, weights [T, K] float32; both None where E is 1. The sum over
    K is float32 and in the order of K, so the result does not depend on how rows are scheduled.
    """
    T, D = x.shape
    E, I2, _ = gate_up.shape
    assert gate_up.shape == (E, I2, D) and down.shape == (E, D, I2 // 2)
    assert gate_up.is_contiguous() and down.is_contiguous()
    if E == 1:
        return _expert(x, gate_up[0], down[0])
    assert expert_ids is not None and weights is not None
    K = expert_ids.shape[1]
    assert expert_ids.shape == weights.shape == (T, K) and weights.dtype == torch.float32
    experts, order = expert_ids.flatten().sort(stable=True)
    every = torch.arange(E, dtype=experts.dtype, device=x.device)
    ends = torch.searchsorted(experts, every, right=True, out_int32=True)  # [E], no host sync
    on_cuda = _grouped if x.dtype == torch.bfloat16 else _masked
    y = (on_cuda if x.is_cuda else _looped)(x[order // K], gate_up, down, ends)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=x.device))
    return (y[place].view(T, K, D).float() * weights[:, :, None]).sum(1).to(x.dtype)
