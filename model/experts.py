"""Experts: gated experts of one layer, and the routers that choose among them."""

from __future__ import annotations

import torch

from kernels.experts import moe
from model.weights import Parameters


class Experts:
    """y = sum_k weight_k down_e (silu(gate_e h) * up_e h). One expert alone needs no router."""

    def __init__(
        self,
        parameters: Parameters,
        prefix: str,
        names: tuple[str, str, str],
        *,
        count: int,
        hidden: int,
        width: int,
    ) -> None:
        """Tensors `prefix`.E.`name`.weight, names being those of gate, up and down."""
        self.gate_up = parameters.matrices(count, 2 * width, hidden)
        self.down = parameters.matrices(count, hidden, width)
        gate, up, down = names
        for e in range(count):
            parameters.places[f"{prefix}.{e}.{gate}.weight"] = self.gate_up[e, :width]
            parameters.places[f"{prefix}.{e}.{up}.weight"] = self.gate_up[e, width:]
            parameters.places[f"{prefix}.{e}.{down}.weight"] = self.down[e]

    def __call__(
        self, h: torch.Tensor, ids: torch.Tensor | None, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """h [T, D], ids and weights [T, K] (None: there is one expert) -> [T, D]."""
        return moe(h, self.gate_up, self.down, ids, weights)


def softmax_route(logits: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] -> the `top` best ids [T, K] and their shares, which add up to 1, float32."""
    weights, ids = logits.softmax(-1, dtype=torch.float32).topk(top, dim=-1)
    return ids, weights / weights.sum(-1, keepdim=True)
