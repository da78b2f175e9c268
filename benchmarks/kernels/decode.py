"""One token of each sequence: the plain kernel, and the ring with a float32 and a bfloat16 state.

The floor is one read and one write of the float32 states. Works take turns over as many pools of
states as a model has layers, so that no state is still in the cache from the step before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.kernels.prefill import MIDDLE, D, slopes_of
from benchmarks.result import Row
from benchmarks.timing import milliseconds
from kernels.lightning_decode import lightning_decode
from kernels.lightning_reference import lightning_reference
from kernels.lightning_ring import lightning_ring_decode, lightning_ring_fold, parts
from model.lightning import drafts

H = 16
R = 16
DRAFTS = drafts(R)  # as a server decodes
POOL_BYTES = 600_000_000  # that the states of a work take at least: many times the cache
FLOAT32_GOALS = {32: 0.9, 256: 0.70, 1024: 0.68}
BFLOAT16_GOALS = {256: 0.45}
CHECKED = {torch.float32: 4e-3, torch.bfloat16: 8e-3}


class Layers:
    """B sequences in the states and rings of some layers; `step` decodes a token in each layer."""

    def __init__(self, B: int, dtype: torch.dtype, ring: bool) -> None:
        self.B = B
        self.ring = ring
        self.slopes = slopes_of(H, MIDDLE)
        count = max(1, POOL_BYTES // (B * H * D * D * dtype.itemsize))
        self.states = [
            torch.randn(B, H, D, D, device="cuda").to(dtype) for _ in range(min(count, 64))
        ]
        self.rings = [
            [
                torch.randn(B, H, R, D, device="cuda", dtype=torch.bfloat16),
                torch.randn(B, H, R, D, device="cuda", dtype=torch.bfloat16),
                torch.zeros(B, H, parts(D), 2, dtype=torch.int64, device="cuda"),
            ]
            for _ in self.states
        ]
        # as if decoding had gone on for long: positions differ, rings are full
        self.starts = torch.arange(1000, 1000 + 7 * B, 7, device="cuda")
        self.slots = torch.randperm(B, device="cuda").int()
        for *_, folded in self.rings:
            self._settle(folded)
        self.inputs = [torch.randn(B, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def _settle(self, folded: torch.Tensor) -> None:
        """Each sequence has folded all that was due: the next step folds a slice of each."""
        folded[..., 0] = 0
        folded[self.slots.long(), ..., 1] = self.starts[:, None, None]

    def layer(self, i: int, inputs: list[torch.Tensor], starts: torch.Tensor) -> torch.Tensor:
        where = self.slots, starts
        if self.ring:
            memory = self.states[i], *self.rings[i]
            return lightning_ring_decode(*inputs, self.slopes, 1.0, *memory, *where, DRAFTS)
        return lightning_decode(*inputs, self.slopes, 1.0, self.states[i], *where)

    def step(self) -> None:
        """One token in each layer; positions go on."""
        for i in range(len(self.states)):
            self.layer(i, self.inputs, self.starts)
        self.starts += 1

    def check(self) -> float:
        """Error of 2 R + 1 tokens of a few sequences and of their states, from given states on."""
        picked = torch.tensor(sorted({0, self.B // 2, self.B - 1}), device="cuda")
        slots = self.slots[picked].long()
        starts = torch.full((self.B,), 5, device="cuda")
        initial = self.states[0][slots].clone()
        if self.ring:
            self.rings[0][2].fill_(5)
        steps = []
        for _ in range(2 * R + 1):
            steps.append([torch.randn_like(x) for x in self.inputs])
        outputs = []
        for inputs in steps:
            outputs.append(self.layer(0, inputs, starts)[picked])
            starts += 1
        if self.ring:
            memory = self.states[0], *self.rings[0]
            lightning_ring_fold(self.slopes, *memory, self.slots, starts, starts, DRAFTS)
            self._settle(self.rings[0][2])
        errors = []
        for n in range(len(picked)):
            q, k, v = (torch.stack([step[j][picked[n]] for step in steps]) for j in range(3))
            o, state = lightning_reference(q, k, v, self.slopes, 1.0, initial[n])
            found = torch.stack([output[n] for output in outputs])
            for actual, sure in ((found, o), (self.states[0][slots[n]], state)):
                errors.append(float((actual.double() - sure).norm() / sure.norm()))
        return float(torch.tensor(errors).max())  # NaN if one is


def fla(B: int) -> Callable[[], Any]:
    """The same by flash-linear-attention's recurrent kernel, which writes its states elsewhere."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    q, k, v = (torch.randn(B, 1, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    slopes = slopes_of(H, MIDDLE)
    count = max(1, min(64, POOL_BYTES // (B * H * D * D * 4)))
    states = [torch.randn(B, H, D, D, device="cuda") for _ in range(count)]

    def work() -> None:
        for state in states:
            fused_recurrent_simple_gla(
                q, k, v, g_gamma=-slopes, scale=1.0, initial_state=state, output_final_state=True
            )

    return work


def rows(bandwidth: float, deadline: float) -> Iterator[Row]:
    """Batches of all sizes by each way."""
    for B in (1, 8, 32, 256, 1024):
        floor = 2 * B * H * D * D * 4 / bandwidth * 1e3
        others = {}
        if time.monotonic() < deadline:
            try:
                count = max(1, min(64, POOL_BYTES // (B * H * D * D * 4)))
                others["FLA fused_recurrent"] = milliseconds(fla(B)) / count
            except ImportError:
                deadline = 0.0
        for ring, dtype, goals in (
            (False, torch.float32, {}),
            (True, torch.float32, FLOAT32_GOALS),
            (True, torch.bfloat16, BFLOAT16_GOALS),
        ):
            layers = Layers(B, dtype, ring)
            wrong = layers.check()
            name = f"decode {B} sequences, {H} heads, {str(dtype).removeprefix('torch.')} state"
            name += f", ring of {R}" if ring else ""
            if not wrong <= CHECKED[dtype]:
                raise AssertionError(f"{name}: error {wrong:.1e} > {CHECKED[dtype]}")
            value = milliseconds(layers.step) / len(layers.states)
            goal = goals.get(B)
            yield Row(
                work=name,
                value=value,
                unit="ms",
                better="lower",
                floor=floor,
                goal=goal and goal * floor,
                peers=others if not ring or dtype == torch.float32 else {},
            )
            print(f"{name}: {value / floor:.2f}x floor, error {wrong:.1e}")
            del layers
            torch.cuda.empty_cache()
