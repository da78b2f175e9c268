"""Lightning attention as its recurrence, token by token in float64: the only specification.

    S_t = exp(-s) S_{t-1} + k_t v_t^T        o_t = scale q_t^T S_t

Lightning Attention-2 (arXiv 2401.04658, section 3), MiniMax-01 (arXiv 2501.08313, section 2.2).
"""

from __future__ import annotations

import torch


def lightning_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence: q, k [T, H, dk], v [T, H, dv], slopes [H], state [H, dk, dv] or None for zero.

    Returns o [T, H, dv] and the state after the last token [H, dk, dv], both float64.
    """
    q, k, v = q.double(), k.double(), v.double()
    decay = torch.exp(-slopes.double())[:, None, None]
    s = k.new_zeros(k.shape[1], k.shape[2], v.shape[2]) if state is None else state.double()
    rows = []
    for q_t, k_t, v_t in zip(q, k, v, strict=True):
        s = decay * s + k_t[:, :, None] * v_t[:, None, :]
        rows.append(scale * (q_t[:, None, :] @ s).squeeze(1))
    return torch.stack(rows), s
