"""What families share: slopes and layer factors of the decay, rotary angles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

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
