"""Causal softmax attention of one sequence by cuDNN, for scale: its cost a token grows with T."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.result import Row
from benchmarks.timing import milliseconds

LENGTHS = (1024, 8192, 32_768, 131_072)
H, D = 16, 128


def rows(bandwidth: float, deadline: float) -> Iterator[Row]:
    """One sequence of each length."""
    for T in LENGTHS:
        q, k, v = (torch.randn(1, H, T, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))

        def work(q: torch.Tensor = q, k: torch.Tensor = k, v: torch.Tensor = v) -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        yield Row(
            work=f"softmax attention (cuDNN) 1 x {T} tokens, {H} heads",
            value=milliseconds(work, rounds=5, graphed=T < 100_000),
            unit="ms",
            better="lower",
        )
        del q, k, v
