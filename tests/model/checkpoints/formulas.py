"""The formulas that the oracles are made of, float64, one token at a time, plain PyTorch.

Nothing here is shared with model/ or kernels/: that is the point.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Config = dict[str, Any]
Weights = Mapping[str, Tensor]
Oracle = Callable[[list[int]], Tensor]  # ids -> logits [T, V], of every position


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rmsnorm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """Over the last dimension."""
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def slopes_of(heads: int) -> list[float]:
    """ALiBi's: a geometric sequence for powers of two, and else one and every second of another."""
    if heads & (heads - 1) == 0:
        ratio = 2 ** (-8 / heads)
        return [ratio ** (h + 1) for h in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return slopes_of(below) + slopes_of(2 * below)[0::2][: heads - below]


def turn(x: Tensor, position: int, theta: float, dims: int) -> Tensor:
    """Rotary, x [H, d]: dimension i < dims / 2 is turned with dimension i + dims / 2."""
    y, half = x.clone(), dims // 2
    for i in range(half):
        angle = position * theta ** (-2 * i / dims)
        cos, sin = math.cos(angle), math.sin(angle)
        y[:, i] = x[:, i] * cos - x[:, i + half] * sin
        y[:, i + half] = x[:, i + half] * cos + x[:, i] * sin
    return y


class Recurrence:
    """S_t = e^-s S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t, a layer's heads."""

    def __init__(self, slopes: list[float], scale: float) -> None:
        self.decay = torch.exp(-torch.tensor(slopes, dtype=torch.float64))[:, None, None]
        self.scale = scale
        self.state: Tensor | float = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k [H, dk], v [H, dv] of the next token -> [H, dv]."""
        self.state = self.decay * self.state + torch.einsum("hk,hv->hkv", k, v)
        return self.scale * torch.einsum("hk,hkv->hv", q, self.state)


class Attention:
    """Softmax attention over all tokens so far; a group of query heads shares a key head."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [H, d], k, v [Hkv, d] of the next token -> [H, d]."""
        self.keys.append(k)
        self.values.append(v)
        group = len(q) // len(k)
        keys = torch.stack(self.keys).repeat_interleave(group, dim=1)
        values = torch.stack(self.values).repeat_interleave(group, dim=1)
        scores = torch.einsum("hd,thd->ht", q, keys) * q.shape[-1] ** -0.5
        return torch.einsum("ht,thd->hd", scores.softmax(-1), values)


def gated(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """An expert, or a dense feed-forward layer."""
    return down @ (silu(gate @ x) * (up @ x))


@dataclass(frozen=True)
class Shapes:
    """The names and shapes of a checkpoint's tensors, drawn at random in their order."""

    shapes: dict[str, tuple[int, ...]]

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Norms around 1, all else so that a product keeps the size of its input."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, shape in self.shapes.items():
            if "norm" in name:
                tensor = torch.rand(shape, generator=generator) + 0.5
            else:
                tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            tensors[name] = tensor
        return tensors


def save(directory: Path, config: Config, tensors: Weights) -> None:
    """config.json and the weights in two shards with an index, as large releases have them."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def double(tensors: Weights) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}
