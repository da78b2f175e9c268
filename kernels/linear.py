"""Linear layers: y_t = w x_t, w [N, K] as it is or quantised (kernels/grouped_gemm.py has the
formula).

Few rows of bfloat16 go through kernels/skinny_gemm.py where that is known to be faster. fp8 goes
through PyTorch's scaled product, many rows of int8 through its product of bfloat16, few through the
grouped kernel with one group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.grouped_gemm import grouped_gemm
from kernels.quantize import Quantized, Weight, quantized
from kernels.skinny_gemm import Before, skinny_gemm
from kernels.tuning import card, skinny_tuning

ROWS = 512  # from so many on, products and not weights are what a GPU's time goes to
SLICE = 1 << 25  # weights that are bfloat16 at a time, about
ALIGNED = 256  # outputs, so that each slice of them begins where products like it


def linear_reference(x: torch.Tensor, w: Weight) -> torch.Tensor:
    """x [T, K], w [N, K] -> [T, N] float64; x is quantised where w is fp8."""
    return activations(x, w).double() @ w.double().t()


def activations(x: torch.Tensor, w: Weight) -> Weight:
    """Rows x [T, K] as products with w take them: quantised where w is fp8."""
    if isinstance(w, Quantized) and w.codes.is_floating_point():
        return quantized(x, w.codes.dtype)
    return x


def _scaled(x: Quantized, w: Quantized) -> torch.Tensor:
    """PyTorch's product of fp8 by fp8, a scale each row and each output; bfloat16 on CUDA."""
    by_row = F.ScalingType.RowWise
    row_scales, scales = x.scales[:, None], w.scales[None]
    return F.scaled_mm(x.codes, w.codes.t(), row_scales, by_row, scales, by_row)


def _sliced(x: torch.Tensor, w: Quantized) -> torch.Tensor:
    """PyTorch's product with weights that are made bfloat16 again, some outputs at a time."""
    N, K = w.shape
    y = torch.empty(len(x), N, dtype=x.dtype, device=x.device)
    step = max(SLICE // K // ALIGNED, 1) * ALIGNED
    for n in range(0, N, step):
        part = w[n : n + step]
        weights = torch.empty(part.shape, dtype=x.dtype, device=x.device)
        torch.mul(part.codes, part.scales[:, None], out=weights)
        torch.mm(x, weights.t(), out=y[:, n : n + step])
    return y


def linear(x: torch.Tensor, w: Weight) -> torch.Tensor:
    """x [T, K], w [N, K] -> [T, N] in x's dtype."""
    if isinstance(w, torch.Tensor):
        tuning = skinny_tuning(w.device, w.itemsize, "plain", len(x), *w.shape)
        return F.linear(x, w) if tuning is None else skinny_gemm(Before(x=x), w, tuning)[0]
    (N, K), fast = w.shape, x.is_cuda and x.dtype == torch.bfloat16 and len(x) > 0
    rows = activations(x, w)
    if isinstance(rows, Quantized):
        # before sm_90 PyTorch's rowwise kernel has stalled on side streams, as graphs record on
        if fast and card(x.device) >= (9, 0) and N % 16 == K % 16 == 0:
            return _scaled(rows, w)
    elif fast and len(x) >= ROWS:
        return _sliced(x, w)
    return grouped_gemm(rows, w[None], None, x.dtype)
