"""Logits: the head's product with normed rows, as if rows and product were float32.

A bfloat16 weight stays as it is: rows are split into two bfloat16 terms, high and low, that both go
through the matrix units with float32 accumulation. Logits come as terms [S, R, V] of which they are
the sum over S, 1 or 2: who draws adds them up on the way (kernels/sampling.py).
"""

from __future__ import annotations

import torch

from kernels.fused_linear import Residual, skinny
from kernels.linear import linear
from kernels.skinny_gemm import skinny_gemm


def logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [R, D] float32, weight [V, D] -> [S, R, V] float32, both terms by one library
    product."""
    assert hidden.dtype == torch.float32
    if weight.dtype == torch.float32:
        return linear(hidden, weight)[None]
    high = hidden.to(weight.dtype)
    low = (hidden - high.float()).to(weight.dtype)
    stacked = torch.cat((high, low))
    if weight.is_cuda:
        both = torch.mm(stacked, weight.t(), out_dtype=torch.float32)
    else:  # no float32 output there: convert the weight a slice at a time
        both = torch.cat([stacked.float() @ part.float().t() for part in weight.split(8192)], dim=1)
    return both.view(2, len(hidden), len(weight))


def residual_logits(residual: Residual, weight: torch.Tensor) -> torch.Tensor:
    """residual of R rows, weight [V, D] -> terms [S, R, V] of the logits of its norm; the stream
    ends here."""
    tuning = skinny(residual.outline(), weight, whole=True)
    if tuning is None:
        return logits(residual.normed(torch.float32)[1], weight)
    return skinny_gemm(residual.before(), weight, tuning, out_dtype=torch.float32)[0][None]
