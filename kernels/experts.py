"""Mixture of experts: y_t = sum_k weight_tk down_e (silu(gate_e x_t) * (up_e x_t)), e = ids_tk.

Where kernels/tuning.json has measured our kernels faster they serve: a row at a time, or tiles of
sorted rows. Elsewhere rows are copied into order for grouped products. What ends in a row for each
k leaves their sum to whoever reads it (kernels/join.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import expert_rows, expert_tiles
from kernels.gated import silu_mul
from kernels.grouped_gemm import grouped_gemm
from kernels.join import Parts, Rows
from kernels.linear import activations, linear
from kernels.quantize import Quantized, Weight
from kernels.sorting import by_expert, sort_by_expert
from kernels.tuning import MixtureTuning, mixture_tuning


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


def grouped_moe(
    x: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> Parts:
    """As moe, by grouped products of sorted copies of rows; any number of them, on any device."""
    T, K = expert_ids.shape
    order, ends = sort_by_expert(expert_ids.flatten(), len(gate_up))
    both = _product(activations(x, gate_up)[order // K], gate_up, ends, x.dtype)
    gated = silu_mul(*both.chunk(2, dim=1))
    y = _product(activations(gated, down), down, ends, x.dtype)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=x.device))
    return Parts(y, weights.contiguous(), place)


def fused_moe(
    x: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    tuning: MixtureTuning,
) -> Rows:
    """As moe, in two or three launches; not with fp8, and T > 0."""
    up_rows, down_rows = tuning.up.rows == 1, tuning.down.rows == 1
    if not (up_rows and down_rows):
        order, ends = by_expert(expert_ids.flatten(), len(gate_up))
    if up_rows:
        h = expert_rows.up(x, gate_up, expert_ids, tuning.up)
    else:
        h = expert_tiles.up(x, gate_up, order, ends, tuning.up)
    if down_rows:
        return expert_rows.down(h, down, expert_ids, weights, tuning.down)
    return expert_tiles.down(h, down, order, ends, weights, tuning.down)


def _tuning(x: torch.Tensor, gate_up: Weight, rows: int) -> MixtureTuning | None:
    """How our kernels multiply so many rows; None where grouped products do."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or rows == 0:
        return None
    codes = gate_up.codes if isinstance(gate_up, Quantized) else gate_up
    if isinstance(gate_up, Quantized) and codes.is_floating_point():
        return None  # rows would have to be quantised between the products
    return mixture_tuning(x.device, codes.itemsize, rows, len(gate_up))


def moe(
    x: torch.Tensor,
    gate_up: Weight,
    down: Weight,
    expert_ids: torch.Tensor | None,
    weights: torch.Tensor | None,
) -> Rows:
    """x [T, D], gate_up [E, 2 I, D] (gate rows first), down [E, D, I] -> [T, D] in x's dtype,
    maybe in parts.

    gate_up and down may be quantised, both alike. expert_ids [T, K] integers below E, weights
    [T, K] float32; both None where E is 1. Sums over K are float32 and in the order of K, and no
    row's depends on others', so the result does not depend on how rows are scheduled.
    """
    T, D = x.shape
    E, I2, _ = gate_up.shape
    assert gate_up.shape == (E, I2, D) and down.shape == (E, D, I2 // 2)
    if E == 1:
        return _expert(x, gate_up[0], down[0])
    assert expert_ids is not None and weights is not None
    assert expert_ids.shape == weights.shape == (T, weights.shape[1])
    assert weights.dtype == torch.float32
    tuning = _tuning(x, gate_up, expert_ids.numel())
    if tuning is None:
        return grouped_moe(x, gate_up, down, expert_ids, weights)
    return fused_moe(x, gate_up, down, expert_ids, weights, tuning)
