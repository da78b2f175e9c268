"""Mixtures of experts at decoding: choosing, sorting and both products of so many tokens.

The floor is one read of the weights of the experts that the tokens meet, and of the tokens in and
out. Works take turns over layers and tokens, so that no expert is still in the cache.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.mixtures import DEVICE, SHAPES, Layers, Mixture
from benchmarks.result import Row
from benchmarks.timing import milliseconds
from kernels.quantize import Quantized
from kernels.routing import route
from kernels.tuning import MixtureTuning, mixture_tuning

TOKENS = 1, 8, 64, 256, 512
ERROR = 8e-3


class Step:
    """What a layer does: rows h to choices by a router, then what they chose."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture, shape = mixture, mixture.layers.shape
        self.choice = shape.choice
        _, self.bias = shape.logits(1)
        dtype = torch.float32 if shape.biased else torch.bfloat16
        self.router = torch.randn(shape.E, shape.D, device=DEVICE).mul_(shape.D**-0.5).to(dtype)

    def run(self, tuning: MixtureTuning | None) -> None:
        """Each turn once. Choices are made, and those of the turn are taken: they are known."""
        for turn, routed in enumerate(self.mixture.routed):
            route(self.mixture.x, self.router, self.bias, self.choice)
            self.mixture.run(turn, tuning, routed)


def rows(bandwidth: float, deadline: float) -> list[Row]:
    """As kernels/tuning.json has it, beside grouped products."""
    result = []
    for shape in SHAPES:
        for codes in (None, torch.int8):
            layers = Layers(shape, codes)
            gate_up = layers.weights[0][0]
            itemsize = gate_up.codes.itemsize if isinstance(gate_up, Quantized) else 2
            for T in TOKENS:
                mixture = Mixture(layers, T)
                tuning = mixture_tuning(DEVICE, itemsize, T * shape.choice.top, shape.E)
                name = f"mixture of {shape.name}, {T} tokens" + (", int8" if codes else "")
                wrong = mixture.check(tuning, mixture.due())
                if not wrong <= ERROR:
                    raise AssertionError(f"{name}: error {wrong:.1e} > {ERROR}")
                step, turns = Step(mixture), mixture.turns
                value = milliseconds(partial(step.run, tuning)) / turns
                others = {}
                if tuning is not None:
                    others["grouped products"] = milliseconds(partial(step.run, None)) / turns
                floor = mixture.bytes() / bandwidth * 1e3
                print(f"{name}: {value / floor:.2f}x floor, error {wrong:.1e}, {tuning}")
                result.append(
                    Row(
                        work=name, value=value, unit="ms", better="lower", floor=floor, peers=others
                    )
                )
            del layers, gate_up, mixture, step
            torch.cuda.empty_cache()
    return result
