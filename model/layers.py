"""What every family uses: slopes of the decay, rotary frequencies, the language-model head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def alibi_slopes(heads: int) -> torch.Tensor:
    """2^(-8 (h + 1) / H) for h = 0 .. H-1, float64 [H] (ALiBi, section 3; any H)."""
    return torch.tensor(
        [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)], dtype=torch.float64
    )


def rotary_frequencies(dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """theta^(-2 i / dim) for i = 0 .. dim/2 - 1, float64 [dim / 2] (RoFormer, section 3.2.2)."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    return math.pow(theta, -1.0) ** exponents


def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """hidden [R, D] float32, weight [V, D] -> logits [R, V] as if the product were float32.

    A bfloat16 weight stays as it is: hidden is split into two bfloat16 terms, high and low, that go
    through one bfloat16 GEMM with float32 accumulation, and the halves are added.
    """
    assert hidden.dtype == torch.float32
    if weight.dtype == torch.float32:
        return F.linear(hidden, weight)
    high = hidden.to(weight.dtype)
    low = (hidden - high.float()).to(weight.dtype)
    stacked = torch.cat((high, low))
    if weight.is_cuda:
        both = torch.mm(stacked, weight.t(), out_dtype=torch.float32)
    else:  # no float32 output there: convert the weight a slice at a time
        both = torch.cat([stacked.float() @ part.float().t() for part in weight.split(8192)], dim=1)
    return both[: len(hidden)] + both[len(hidden) :]
