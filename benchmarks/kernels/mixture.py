"""Mixtures of experts at decoding: choosing, sorting and both products of so many tokens.

The floor is one read of the weights of the experts that the tokens meet, and of the tokens in and
out. Works take turns over layers and tokens, so that no expert is still in the cache. Residuals
before and after a mixture stand beside the same by a kernel each, from the cache.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.mixtures import DEVICE, SHAPES, Layers, Mixture
from benchmarks.result import Row
from benchmarks.timing import milliseconds
from kernels.fused_linear import Residual
from kernels.join import Parts, join
from kernels.quantize import Quantized
from kernels.residual_rmsnorm import residual_rmsnorm
from kernels.residual_route import residual_route
from kernels.routing import Choice, route
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


def residuals(bandwidth: float) -> list[Row]:
    """The residual in front of the first shape's mixture with the choice, and that behind it with
    the sum of the parts, each beside kernels one by one."""
    shape, result = SHAPES[0], []
    choice, K, D = Choice(shape.choice.top), shape.choice.top, shape.D

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=DEVICE, dtype=torch.bfloat16)

    router, weight, scales = random(shape.E, D) * D**-0.5, random(D), (3.5, 1.0)
    for T in TOKENS:
        x, f, parts = random(T, D), random(T, D), Parts(random(T * K, D), random(T, K).float())
        before = Residual(x, f, weight, 1e-5, *scales, post=True)

        def apart(before: Residual = before) -> None:
            _, h = before.normed()
            route(h, router, None, choice)

        def joined(x: torch.Tensor = x, parts: Parts = parts) -> None:
            residual_rmsnorm(x, join(parts), *scales, weight, 1e-5)

        chosen = partial(residual_route, before, router, choice)
        summed = partial(residual_rmsnorm, x, parts, *scales, weight, 1e-5)
        row = T * D * 2
        for name, size, work, other in (
            ("residual, norm and choice of experts", 3 * row + router.nbytes, chosen, apart),
            ("sum of experts, residual and norm", (K + 2) * row, summed, joined),
        ):
            result.append(
                Row(
                    work=f"{name} of {shape.name}, {T} tokens",
                    value=milliseconds(work),
                    unit="ms",
                    better="lower",
                    floor=size / bandwidth * 1e3,
                    peers={"separate kernels": milliseconds(other)},
                )
            )
    return result


def rows(bandwidth: float, deadline: float) -> list[Row]:
    """As kernels/tuning.json has it, beside grouped products."""
    result = residuals(bandwidth)
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
