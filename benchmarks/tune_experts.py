"""Candidates of the kernels of mixtures, against PyTorch's operations, which win where they win."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.candidates import Found, best, due, error, timed
from benchmarks.mixtures import DEVICE, SHAPES, Layers, Mixture, Shape
from kernels import routing
from kernels.expert_tiles_hopper import able
from kernels.language import HOPPER
from kernels.routing import route_reference
from kernels.tuning import MixtureTuning, ProductTuning, RouteTuning, card, mixture_class

TOKENS = [1 << n for n in range(10)]
LIMIT = 8e-3  # of what is rounded to bfloat16 up to four times on its way
ROWS = [(2, 2048, 4, 1), (4, 1024, 4, 1), (4, 2048, 4, 1), (8, 512, 4, 1), (8, 512, 4, 4)]
SHORT_ROWS = [(4, 512, 2, 1), (8, 512, 2, 1), (8, 512, 4, 1), (16, 512, 4, 1)]
BULK = True  # copies of weights
# by the greatest mean number of rows an expert that they are for; no program spills, and those of
# most large tiles are on the card all at once, for the experts of minimax-2b
TILES: dict[int, list[tuple[int, ...]]] = {
    8: [(16, 32, 128, 4, 4), (16, 64, 128, 4, 3), (16, 64, 64, 4, 5), (16, 32, 64, 4, 6)],
    16: [
        (16, 64, 128, 4, 3),
        (32, 32, 128, 4, 3),
        (32, 64, 128, 4, 3),
        (32, 64, 64, 4, 5),
        (64, 64, 64, 4, 4),
        (32, 64, 128, 4, 3, BULK),
        (32, 64, 64, 4, 5, BULK),
        (64, 32, 128, 4, 3, BULK),
        (64, 64, 64, 4, 4, BULK),
        (64, 64, 128, 4, 2, BULK),
    ],
    32: [
        (32, 64, 128, 4, 3),
        (16, 64, 128, 4, 3),
        (64, 64, 64, 4, 4),
        (64, 64, 128, 4, 2),
        (64, 128, 64, 8, 4),
        (64, 32, 128, 4, 3, BULK),
        (64, 64, 64, 4, 4, BULK),
        (64, 64, 128, 4, 2, BULK),
        (64, 64, 128, 4, 3, BULK),
        (64, 128, 64, 8, 4, BULK),
        (64, 128, 64, 8, 5, BULK),
        (64, 128, 128, 8, 2, BULK),
    ],
    64: [
        (64, 128, 64, 8, 3),
        (64, 128, 64, 8, 4),
        (128, 64, 64, 8, 3),
        (128, 64, 64, 8, 4),
        (128, 128, 64, 8, 4),
        (64, 64, 64, 4, 4, BULK),
        (64, 128, 64, 8, 5, BULK),
        (128, 64, 64, 4, 3, BULK),
        (128, 64, 64, 8, 3, BULK),
        (128, 64, 64, 8, 4, BULK),
        (128, 64, 128, 8, 3, BULK),
        (128, 128, 64, 8, 4, BULK),
    ],
    1 << 30: [
        (64, 128, 64, 8, 3),
        (128, 64, 64, 8, 3),
        (128, 64, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (64, 128, 64, 8, 4, BULK),
        (128, 64, 64, 4, 3, BULK),
        (128, 64, 64, 8, 3, BULK),
        (128, 64, 64, 8, 4, BULK),
        (128, 128, 64, 8, 4, BULK),
        (256, 64, 64, 8, 3, BULK),
        (256, 64, 64, 8, 4, BULK),
    ],
}


def products(rows: int, E: int, inputs: int, bulk: bool) -> list[ProductTuning]:
    """Candidates for so many rows, and as many inputs; of weights that bulk copies can read?"""
    found = []
    if rows <= max(16, E // 2):  # more meet too many experts more than once
        alone = ROWS if inputs > 512 else SHORT_ROWS
        found = [ProductTuning(1, *each) for each in alone]
    least = min(most for most in TILES if rows <= most * E)
    tiles = [ProductTuning(*each) for each in TILES[least]]
    return found + [each for each in tiles if bulk or not each.bulk]


def other_way(tuning: ProductTuning, bulk: bool) -> list[ProductTuning]:
    """The same tiles by the other way of copying weights, where there is one."""
    return [replace(tuning, bulk=not tuning.bulk)] if bulk and tuning.rows > 1 else []


def tune_mixture(name: str, mixture: Mixture, rows: int, deadline: float) -> dict[str, Any] | None:
    """First the product with gate and up, then that with down; None: grouped products have won."""
    shape, expected = mixture.layers.shape, mixture.due()

    def work(candidate: MixtureTuning | None) -> Callable[[], None]:
        return partial(mixture.step, candidate)

    rule = {"limit": LIMIT, "measure": timed(work), "deadline": deadline}
    find = partial(best, name, check=partial(mixture.check, due=expected), **rule)
    bulk = card(DEVICE) >= HOPPER and all(map(able, mixture.layers.weights[0]))
    ups, downs = (products(rows, shape.E, D, bulk) for D in (shape.D, shape.width))
    usual = next(each for each in downs if each.rows > 1)
    up = find([MixtureTuning(each, usual) for each in ups]).up
    up = find([MixtureTuning(each, usual) for each in (up, *other_way(up, bulk))]).up
    chosen = find([None, *(MixtureTuning(up, down) for down in downs)])
    if chosen is not None:
        others = [MixtureTuning(up, down) for down in other_way(chosen.down, bulk)]
        chosen = find([chosen, *others])
    return None if chosen is None else asdict(chosen)


def tune_mixtures(classes: list[str], deadline: float) -> Found:
    """By bytes of an element of the weights, rows (tokens times experts of each) and experts."""
    for shape in SHAPES:
        for codes in (None, torch.int8):
            itemsize = 2 if codes is None else 1
            tokens = {mixture_class(itemsize, T * shape.choice.top, shape.E): T for T in TOKENS}
            layers: Layers | None = None
            for name in due(tokens, classes, deadline):
                layers = layers or Layers(shape, codes)
                mixture, rows = Mixture(layers, tokens[name]), tokens[name] * shape.choice.top
                yield name, tune_mixture(f"moe {name}", mixture, rows, deadline)
            del layers
            torch.cuda.empty_cache()


class Routing:
    """Hidden rows of a few tokens and of many, and routers."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        dtype = torch.float32 if shape.biased else torch.bfloat16
        _, self.bias = shape.logits(1)
        self.hidden = [
            torch.randn(T, shape.D, device=DEVICE, dtype=torch.bfloat16) for T in (1, 8, 64, 256)
        ]
        self.routers = [
            torch.randn(shape.E, shape.D, device=DEVICE).mul_(shape.D**-0.5).to(dtype)
            for _ in range(4)
        ]

    def run(
        self, h: torch.Tensor, router: torch.Tensor, candidate: RouteTuning | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As kernels.routing.route does it with such a tuning."""
        if candidate is not None and candidate.fused:
            return routing._triton(h, None, self.shape.choice, router, candidate)
        logits = F.linear(h.to(router.dtype), router)
        if candidate is None:
            return routing._torch(logits, self.bias, self.shape.choice)
        return routing._triton(logits, self.bias, self.shape.choice, None, candidate)

    def check(self, candidate: RouteTuning | None) -> float:
        """Greatest error of the weights. Logits are so few and small whole numbers added up, over
        64, that every dtype holds them: ids cannot differ."""
        errors = []
        D = self.shape.D
        sparse = torch.arange(D, device=DEVICE) % (D // 16) == D // 16 - 1
        for h in self.hidden:
            h = h.sign() * sparse
            router = (self.routers[0] * (2 * D**0.5)).round() / 64
            logits = h.float() @ router.float().t()
            ids, weights = self.run(h, router, candidate)
            want_ids, want = route_reference(logits.to(router.dtype), self.bias, self.shape.choice)
            same = candidate is None or torch.equal(ids.long(), want_ids)
            errors.append(error(weights, want) if same else float("inf"))
        return float(torch.tensor(errors).max())

    def work(self, candidate: RouteTuning | None) -> Callable[[], None]:
        def run() -> None:
            for h in self.hidden:
                for router in self.routers:
                    self.run(h, router, candidate)

        return run


def tune_routing(classes: list[str], deadline: float) -> Found:
    """By the number of experts."""
    shapes = {str(shape.E): shape for shape in SHAPES}
    for name in due(shapes, classes, deadline):
        shape = shapes[name]
        trial = Routing(shape)
        fused = trial.bias is None and trial.routers[0].nbytes <= routing.MOST_BYTES
        options: list[RouteTuning | None] = [None]
        options += [RouteTuning(warps, False) for warps in (1, 2, 4)]
        options += [RouteTuning(warps, True) for warps in (4, 8) if fused]
        rule = 1e-3, timed(trial.work), deadline
        chosen = best(f"route {name}", options, trial.check, *rule)
        yield name, None if chosen is None else asdict(chosen)
