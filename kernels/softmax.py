"""What the attention kernels share: a softmax over keys that come block by block, and its tiles.

FlashAttention-2 (arXiv 2307.08691).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import Any

import torch

from kernels.language import dot_precision, jit, next_power_of_2, tl


@jit
def softmax_step(b_scores, b_v, b_max, b_sum, b_o, PRECISION: tl.constexpr):
    """b_scores [M, N], base 2, -inf where unseen, b_v [N, D] -> b_max, b_sum [M], b_o [M, D].

    A row that has seen nothing yet keeps the maximum -inf, the sum 0 and the output 0.
    """
    b_new = tl.maximum(b_max, tl.max(b_scores, 1))
    b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
    b_p = tl.exp2(b_scores - b_base[:, None])
    b_rescale = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_o = b_o * b_rescale[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    return b_new, b_sum, b_o


def tiles(pairs: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes and warps for at most `pairs` rows of (token, head) a sequence and heads of D."""
    BLOCK_D = max(next_power_of_2(D), 16)
    row_bytes = BLOCK_D * dtype.itemsize
    return {
        "BLOCK_M": 16 if pairs <= 16 or row_bytes > 512 else 64,
        "BLOCK_N": 64 if row_bytes <= 128 else 32,
        "BLOCK_D": BLOCK_D,
        "PRECISION": dot_precision(dtype),
        "num_warps": 4 if row_bytes <= 256 else 8,
    }
