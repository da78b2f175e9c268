"""Products of few rows as decode steps have them, by one kernel or by the library's product and a
kernel for each thing that stands before and after it.

A class is named as in kernels/tuning.json: FORM-ITEMSIZExROWSxOUTPUTSxINPUTS. Weights take turns,
so that none is still in the cache from the time before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.candidates import error
from kernels.fused_linear import Residual, after
from kernels.logits import logits
from kernels.rmsnorm_gate import rmsnorm_gate
from kernels.skinny_gemm import (
    Before,
    Keep,
    Pair,
    before_reference,
    skinny_gemm,
    skinny_gemm_reference,
)
from kernels.tuning import SKINNY, SkinnyTuning, skinny_class

EPS = 1e-6
COLD_BYTES = 200_000_000  # of weights that take turns: four times the cache
LIMITS = {2: 6e-3, 4: 1e-5}  # of relative errors, by bytes of an element
# of weights [outputs, inputs] in lightning-1b and minimax-2b of benchmarks/shapes
FORMS = [
    ("norm-silu", 8192, 2048),
    ("norm", 3072, 2048),
    ("gate", 2048, 2048),
    ("norm-mul", 11_264, 2048),
    ("plain", 2048, 5632),
    ("plain", 2048, 2048),
    ("norm-head", 64_000, 2048),
    ("norm-head", 65_536, 2048),
]
# likewise in transnormer-7b and ring-mini-linear-2.0, for single rows
SINGLE = [
    ("norm-silu", 16_384, 4096),
    ("gate", 4096, 4096),
    ("norm-mul", 22_016, 4096),
    ("plain", 4096, 11_008),
    ("norm-head", 64_000, 4096),
    ("norm", 8192, 2048),
    ("gate4", 2048, 2048),
    ("plain-silu_mul", 1024, 2048),
    ("plain-silu_mul", 10_240, 2048),
    ("plain", 2048, 512),
    ("plain", 2048, 5120),
    ("norm-head", 157_184, 2048),
]
CLASSES = [
    *(skinny_class(2, form, rows, N, K) for rows, (form, N, K) in product(SKINNY, FORMS)),
    *(skinny_class(2, form, 1, N, K) for form, N, K in SINGLE),
]


class Trial:
    """One class: what is multiplied, what is due, and both ways to compute it."""

    def __init__(self, name: str, device: torch.device) -> None:
        match = re.fullmatch(r"([a-z]+)(\d*)(?:-(\w+))?-(\d)x(\d+)x(\d+)x(\d+)", name)
        if match is None:
            raise SystemExit(f"{name} is no class: FORM-ITEMSIZExROWSxOUTPUTSxINPUTS is due")
        self.start, groups, end = match[1], match[2], match[3] or ""
        itemsize, self.rows, self.N, self.K = map(int, match.groups()[3:])
        self.groups = int(groups or 1)
        self.pair: Pair = "mul" if end == "mul" else "silu_mul" if end == "silu_mul" else ""
        self.silu = self.N // 2 if end == "silu" else 0
        self.head = end == "head"
        self.limit = 2e-5 if self.head else LIMITS[itemsize]
        self.dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        self.x, self.f, self.gate = (
            torch.randn(self.rows, self.K, device=device).to(self.dtype) for _ in range(3)
        )
        self.weight = torch.randn(self.K, device=device).to(self.dtype)
        count = max(-(-COLD_BYTES // (self.N * self.K * itemsize)), 1)
        self.weights = [
            torch.randn(self.N, self.K, device=device).mul_(self.K**-0.5).to(self.dtype)
            for _ in range(count)
        ]

    @property
    def bytes(self) -> int:
        """Of one product: the weights, rows in and rows out."""
        weights = self.weights[0].nbytes
        out = self.rows * (self.N // 2 if self.pair else self.N)
        rows = {"plain": 1, "norm": 2 if self.head else 3, "gate": 2}[self.start]
        out *= 4 if self.head else self.dtype.itemsize
        return weights + rows * self.x.nbytes + out

    def befores(self, M: int, every: bool = False) -> list[tuple[Before, Keep]]:
        """The first M rows and what is kept of them, as they are timed; or all that families have
        under the name of this class, each a compiled kernel of its own."""
        x, f, gate, weight = self.x[:M], self.f[:M], self.gate[:M], self.weight
        norm = partial(Before, x=x, norm=True, eps=EPS)
        if self.start == "plain":
            return [(Before(x=x), "")]
        if self.start == "gate":
            gated = partial(norm, gate=gate, groups=self.groups)
            found: list[tuple[Before, Keep]] = [(gated(weight=weight, sigmoid=True), "")]
            return found + [(gated(), "")] * every
        found = [(norm(f=f, weight=weight), "" if self.head else "sum")]
        if every and self.head:
            return [*found, (norm(f=f), ""), (norm(f=f, weight=weight, alpha=3.5), "")]
        if every:
            found += [(norm(f=f), "sum"), (norm(alpha=3.5), "sum"), (norm(weight=weight), "")]
            found += [(norm(weight=weight), "normed")]
            found += [(norm(f=f, weight=weight, alpha=3.5, beta=0.7), "normed")]
        return found

    def fused(
        self, w: torch.Tensor, before: Before, keep: Keep, tuning: SkinnyTuning
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """By one kernel."""
        options: dict[str, Any] = {"silu": self.silu, "pair": self.pair, "keep": keep}
        if self.head:
            options["out_dtype"] = torch.float32
        return skinny_gemm(before, w, tuning, **options)

    def separate(self, w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """All rows by several; x, in the place of our own, may become the sum. A head's product is
        left as terms, for drawing adds them."""
        h = x
        if self.start == "gate":
            h = rmsnorm_gate(x, self.gate, self.weight, EPS, groups=self.groups)
        elif self.start == "norm":
            residual = Residual(x, self.f, self.weight, EPS)
            h = residual.normed(torch.float32 if self.head else None)[1]
        return logits(h, w) if self.head else after(F.linear(h, w), self.silu, self.pair)

    def check(self, tuning: SkinnyTuning | None, every: bool = False) -> float:
        """Greatest error of products and of what is kept, for the fewest rows of the class and for
        all; None: of all rows by several kernels."""
        w, errors = self.weights[-1], []
        due = partial(skinny_gemm_reference, w=w, silu=self.silu, pair=self.pair)
        if tuning is None:
            ((before, _),) = self.befores(self.rows)
            y = self.separate(w, self.x.clone())
            return error(y.sum(0) if self.head else y, due(before))
        fewest = max((rows for rows in SKINNY if rows < self.rows), default=0) + 1
        for M in {fewest, self.rows}:
            for before, keep in self.befores(M, every):
                y, kept = self.fused(w, before, keep, tuning)
                errors.append(error(y, due(before)))
                if kept is not None:
                    errors.append(error(kept, before_reference(before)[keep == "normed"]))
        return float(torch.tensor(errors).max())  # NaN if one is

    def work(self, tuning: SkinnyTuning | None) -> Callable[[], None]:
        """All weights in turn, by one kernel or by several."""
        ((before, keep),) = self.befores(self.rows)
        x = self.x.clone()

        def run() -> None:
            for w in self.weights:
                if tuning is None:
                    self.separate(w, x)
                else:
                    self.fused(w, before, keep, tuning)

        return run
