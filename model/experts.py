"""Experts: gated experts of one layer, alone or many, and the ways to choose among them."""

from __future__ import annotations

import torch

from kernels.experts import moe
from kernels.fused_linear import pair_linear
from kernels.linear import linear
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


def grouped_sigmoid_route(
    logits: torch.Tensor,
    bias: torch.Tensor,
    *,
    top: int,
    groups: int,
    top_groups: int,
    normed: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E], bias [E], float32 -> ids [T, K], weights [T, K] (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2).

    A sigmoid gives the scores; the bias counts in choosing alone. Of the groups of experts the
    `top_groups` are kept whose two best add up to most, and of their experts the `top` best.
    """
    scores = logits.sigmoid()
    choice = scores + bias
    if top_groups < groups:
        grouped = choice.unflatten(1, (groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        choice = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    ids = choice.topk(top, dim=-1).indices
    weights = scores.gather(1, ids)
    if normed:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * factor


class Dense:
    """down (silu(gate h) * up h): a feed-forward layer that every token takes."""

    def __init__(
        self,
        parameters: Parameters,
        prefix: str,
        names: tuple[str, str, str],
        hidden: int,
        width: int,
    ) -> None:
        """Tensors `prefix`.`name`.weight, names being those of gate, up and down."""
        gate, up, down = (f"{prefix}.{name}.weight" for name in names)
        self.gate_up = parameters.rows([(gate, width), (up, width)], hidden)
        self.down = parameters.matrix(down, hidden, width)

    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """h [T, D] -> [T, D]."""
        return linear(pair_linear(h, self.gate_up, "silu_mul"), self.down)
