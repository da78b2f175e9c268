"""What families share: slopes and layer factors of the decay, rotary angles, the head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.batch import Batch
from model.store import Store


@dataclass(slots=True, frozen=True, eq=False)
class Step:
    """What the layers share within one step; cos, sin [T, r / 2] turn r dimensions of a head."""

    batch: Batch
    store: Store
    cos: torch.Tensor
    sin: torch.Tensor


def geometric_slopes(heads: int) -> torch.Tensor:
    """2^(-8 (h + 1) / H) for h = 0 .. H-1, float64 [H], whatever H is."""
    return torch.tensor(
        [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)], dtype=torch.float64
    )


def alibi_slopes(heads: int) -> torch.Tensor:
    """ALiBi's slopes (arXiv 2108.12409, section 3), float64 [H].

    Geometric where H is a power of two; else those of the next smaller power of two, followed by
    every second one of its double.
    """
    power = 1 << (heads.bit_length() - 1)
    between = geometric_slopes(2 * power)[::2]
    return torch.cat((geometric_slopes(power), between[: heads - power]))


def layer_factor(index: int, count: int) -> float:
    """1 - l / (L - 1) + 1e-5: the first layer forgets fastest (arXiv 2307.14995)."""
    return 1.0 - index / max(count - 1, 1) + 1e-5


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
