"""Layers of random experts and tokens that have chosen among them, and what is due."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.experts import fused_moe, grouped_moe
from kernels.join import join
from kernels.quantize import Quantized, Weight
from kernels.routing import Choice, choose
from kernels.tuning import MixtureTuning

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYER_BYTES = 600_000_000  # that the weights of all layers take, about: many times the cache


@dataclass(slots=True, frozen=True)
class Shape:
    """A model's mixture."""

    name: str
    D: int
    width: int
    E: int
    choice: Choice
    biased: bool

    def logits(self, T: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of T tokens, and the bias of the experts."""
        bias = torch.randn(self.E, device=DEVICE) * 0.1 if self.biased else None
        return torch.randn(T, self.E, device=DEVICE), bias


SHAPES = [
    Shape("minimax-2b", 2048, 2048, 8, Choice(2), False),
    Shape("Ring-mini-linear-2.0", 2048, 512, 256, Choice(8, 8, 4, factor=2.5), True),
]


def expected(
    x: torch.Tensor, gate_up: Weight, down: Weight, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """What moe has to make of it, expert by expert -> [T, D] float64."""
    y = torch.zeros(*ids.shape, x.shape[1], dtype=torch.float64, device=x.device)
    for e in ids.unique().tolist():
        at = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[at[0]].double() @ gate_up[e].double().t()).chunk(2, 1)
        y[at] = (F.silu(gate) * up) @ down[e].double().t()
    return (y * weights.double()[:, :, None]).sum(1)


class Layers:
    """Experts of so many layers that a step finds none of them in the cache."""

    def __init__(
        self, shape: Shape, codes: torch.dtype | None, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.shape, self.dtype = shape, dtype
        size = 3 * shape.E * shape.D * shape.width * (codes or dtype).itemsize
        self.weights = [
            (
                self._matrices(2 * shape.width, shape.D, codes),
                self._matrices(shape.D, shape.width, codes),
            )
            for _ in range(min(-(-LAYER_BYTES // size), 4))
        ]

    def _matrices(self, N: int, K: int, codes: torch.dtype | None) -> Weight:
        E = self.shape.E
        if codes is None:
            return torch.randn(E, N, K, device=DEVICE, dtype=self.dtype).mul_(K**-0.5)
        matrices = Quantized.empty((E, N, K), codes, DEVICE)
        for e in range(E):
            matrices[e].copy_(torch.randn(N, K, device=DEVICE) * K**-0.5)
        return matrices


class Mixture:
    """T tokens in each layer, and in turns that each meet other experts."""

    def __init__(self, layers: Layers, T: int, turns: int = 4) -> None:
        self.layers, self.turns = layers, max(turns, len(layers.weights))
        shape = layers.shape
        self.x = torch.randn(T, shape.D, device=DEVICE, dtype=layers.dtype)
        self.routed = [choose(*shape.logits(T), shape.choice) for _ in range(self.turns)]
        logits, bias = shape.logits(T)
        logits[:, shape.E // 2] += 20  # an expert that all choose
        self.skewed = choose(logits, bias, shape.choice)

    def run(
        self, turn: int, tuning: MixtureTuning | None, routed: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """By our kernels, or by grouped products where there is no tuning."""
        weights = self.layers.weights[turn % len(self.layers.weights)]
        if tuning is None:
            return join(grouped_moe(self.x, *weights, *routed))
        return join(fused_moe(self.x, *weights, *routed, tuning))

    def step(self, tuning: MixtureTuning | None) -> None:
        """Each turn once."""
        for turn, routed in enumerate(self.routed):
            self.run(turn, tuning, routed)

    def due(self) -> list[torch.Tensor]:
        """What turn 0 has to make, as it is and skewed."""
        weights = self.layers.weights[0]
        return [expected(self.x, *weights, *routed) for routed in (self.routed[0], self.skewed)]

    def check(self, tuning: MixtureTuning | None, due: list[torch.Tensor]) -> float:
        """Greatest error of both, relative, in norm; NaN where anything is."""
        pairs = zip((self.routed[0], self.skewed), due, strict=True)
        found = [(self.run(0, tuning, routed).double(), sure) for routed, sure in pairs]
        return float(torch.stack([(y - sure).norm() / sure.norm() for y, sure in found]).max())

    def bytes(self) -> float:
        """Of the experts that a turn meets, in the mean, and of its tokens in and out."""
        met = sum(len(ids.unique()) for ids, _ in self.routed) / self.turns
        matrices = self.layers.weights[0]
        return met * sum(w.nbytes / len(w) for w in matrices) + 2 * self.x.nbytes
