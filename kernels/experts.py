"""Mixture of experts: y_t = sum_k weight_tk down_e (silu(gate_e x_t) * (up_e x_t)), e = ids_tk."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.gated import silu_mul
from kernels.grouped_gemm import grouped_gemm
from kernels.linear import activations, linear
from kernels.quantize import Quantized, Weight


def moe_reference(
    x: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Token by token, shapes as in moe -> [T, D] float64. Rows are not quantised."""
    rows = []
    for x_t, ids_t, weights_t in zip(x.double(), expert_ids.tolist(), weights, strict=True):
        y = torch.zeros_like(x_t)
        for e, weight in zip(ids_t, weights_t.double(), strict=True):
            gate, up = (gate_up[e].double() @ x_t).chunk(2)
            y += weight * (down[e].double() @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def _expert(x: torch.Tensor, gate_up: Weight, down: Weight) -> torch.Tensor:
    """One expert: x [R, D], gate_up [2 I, D], down [D, I] -> [R, D]."""
    return linear(silu_mul(*linear(x, gate_up).chunk(2, dim=1)), down)


def _looped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows sorted by expert, one expert after the other: w [E, N, K] -> [R, N]."""
    y = torch.empty(len(x), w.shape[1], dtype=x.dtype, device=x.device)
    begin = 0
    for e, end in enumerate(ends.tolist()):
        if begin < end:
            y[begin:end] = F.linear(x[begin:end], w[e])
        begin = end
    return y


def _masked(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """As _looped, but every expert computes every row, which asks nothing of the device: for dtypes
    on CUDA that no grouped GEMM has, where speed is not looked for."""
    y = torch.zeros(len(x), w.shape[1], dtype=x.dtype, device=x.device)
    row = torch.arange(len(x), device=x.device)[:, None]
    begin = torch.zeros_like(ends[0])
    for e, end in enumerate(ends.unbind()):
        y = torch.where((row >= begin) & (row < end), F.linear(x, w[e]), y)
        begin = end
    return y


def _grouped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """As _looped, by one grouped GEMM; bfloat16 on CUDA."""
    return F.grouped_mm(x, w.transpose(1, 2), offs=ends)


def _product(x: Weight, w: Weight, ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows sorted by expert, x as `activations` makes it for w [E, N, K] -> [R, N]."""
    if isinstance(w, Quantized):
        return grouped_gemm(x, w, ends, dtype)
    assert isinstance(x, torch.Tensor) and w.is_contiguous()
    on_cuda = _grouped if dtype == torch.bfloat16 else _masked
    return (on_cuda if x.is_cuda else _looped)(x, w, ends)


def moe(
    x: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    expert_ids: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> torch.Tensor:
    """x [T, D], gate_up [E, 2 I, D] (gate rows first), down [E, D, I] -> [T, D] in x's dtype.

    gate_up and down may be quantised. expert_ids [T, K] integers below E, weights [T, K] float32;
    both None where E is 1. The sum over K is float32 and in the order of K, so the result does not
    depend on how rows are scheduled.
    """
    T, D = x.shape
    E, I2, _ = gate_up.shape
    assert gate_up.shape == (E, I2, D) and down.shape == (E, D, I2 // 2)
    if E == 1:
        return _expert(x, gate_up[0], down[0])
    assert expert_ids is not None and weights is not None
    K = expert_ids.shape[1]
    assert expert_ids.shape == weights.shape == (T, K) and weights.dtype == torch.float32
    experts, order = expert_ids.flatten().sort(stable=True)
    every = torch.arange(E, dtype=experts.dtype, device=x.device)
    ends = torch.searchsorted(experts, every, right=True, out_int32=True)  # [E], no host sync
    both = _product(activations(x, gate_up)[order // K], gate_up, ends, x.dtype)
    gated = silu_mul(*both.chunk(2, dim=1))
    y = _product(activations(gated, down), down, ends, x.dtype)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=x.device))
    return (y[place].view(T, K, D).float() * weights[:, :, None]).sum(1).to(x.dtype)
