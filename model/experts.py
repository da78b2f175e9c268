"""Experts: gated experts of one layer, alone or many, and the layer that every token takes."""

from __future__ import annotations

import torch

from kernels.experts import moe
from kernels.fused_linear import pair_linear
from kernels.join import Rows
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
    ) -> Rows:
        """h [T, D], ids and weights [T, K] (None: there is one expert) -> [T, D]."""
        return moe(h, self.gate_up, self.down, ids, weights)


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
