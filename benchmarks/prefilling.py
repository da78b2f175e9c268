"""Tuning of prefills: both passes of each shape class, and the single pass of middling lengths."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate, product
from typing import Any

import torch

from benchmarks.candidates import DEVICE, Found, best, due, error, timed
from benchmarks.timing import milliseconds
from kernels import lightning_prefill, lightning_prefill_hopper, tuning
from kernels.lightning_reference import lightning_reference
from kernels.packing import Packing
from kernels.segments import Work
from kernels.tuning import SHORT, PrefillTuning, RereadTuning, Tiles

SLOPES = (0.9, 0.03, 4.05e-8, 0.0)
UGLY = (1, 63, 64, 100, 257, 781, 3000)
LONG = 65_536
MIDDLING = [(T, H) for H in (16, 8, 64) for T in (128, 256, 512, 1024, 2048, 4096)]
PLENTY = 64  # programs that a processor is said to hold, so that sequences are cut


def bound(dtype: torch.dtype) -> float:
    """Greatest relative error that a candidate may have."""
    return 1e-5 if dtype == torch.float32 else 4e-3


def packing(lengths: tuple[int, ...], starts: int) -> Packing:
    """Sequences in the slots of their order."""
    rows = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    N = len(lengths)
    slots = torch.arange(N, dtype=torch.int32, device=DEVICE)
    return Packing(lengths, rows, slots, torch.full((N,), starts, device=DEVICE))


class Prefilling:
    """The inputs of a shape class: ugly lengths to be checked, a long sequence to be timed."""

    def __init__(self, dtype: torch.dtype, dk: int, dv: int) -> None:
        self.dtype, self.dk, self.dv = dtype, dk, dv
        self.slopes = torch.tensor(SLOPES, device=DEVICE)
        self.ugly = self.inputs(sum(UGLY), len(SLOPES))
        self.bulk = lightning_prefill_hopper.serves(*self.ugly)
        self.initial = torch.randn(len(UGLY), len(SLOPES), dk, dv, device=DEVICE)
        parts = [x.split(UGLY) for x in self.ugly]
        sure = [
            lightning_reference(q, k, v, self.slopes, 0.3, S)
            for q, k, v, S in zip(*parts, self.initial, strict=True)
        ]
        self.expected = torch.cat([o for o, _ in sure]), torch.stack([S for _, S in sure])

    def inputs(self, rows: int, H: int) -> list[torch.Tensor]:
        widths = self.dk, self.dk, self.dv
        return [torch.randn(rows, H, d, device=DEVICE).to(self.dtype) for d in widths]

    def check(self, candidate: PrefillTuning) -> float:
        """Greatest error of outputs and states of all in a batch; the longest is cut."""
        wrong, work = self.wrong(replace(candidate, resident=PLENTY), 0, len(UGLY))
        if not work.segments:
            raise AssertionError(f"none of {UGLY} is cut")
        return wrong

    def check_reread(self, candidate: PrefillTuning) -> float:
        """The same of long ones, each alone, as if a row that is read again cost nothing."""
        if candidate.reread:
            free = replace(candidate.reread, resident=PLENTY, cost=0.0)
            candidate = replace(candidate, reread=free)
        errors = []
        for i in (i for i, n in enumerate(UGLY) if n > 512):
            wrong, work = self.wrong(candidate, i, i + 1)
            errors.append(wrong)
            if work.reread != bool(candidate.reread):
                raise AssertionError(f"{UGLY[i]} rows are cut into {work.length} for three passes")
        return float(torch.tensor(errors).max())  # NaN if one is

    def wrong(self, candidate: PrefillTuning, first: int, end: int) -> tuple[float, Work]:
        """The error of some of the sequences, and how they were cut."""
        states, o = self.initial[first:end].clone(), torch.full_like(self.ugly[2], torch.nan)
        begins = [0, *accumulate(UGLY)]
        rows, where = slice(begins[first], begins[end]), packing(UGLY[first:end], 5)
        inputs, memory = [x[rows] for x in self.ugly], (self.slopes, 0.3, states, where, o[rows])
        lightning_prefill._triton(*inputs, *memory, tuning=candidate)
        sure = self.expected[0][rows], self.expected[1][first:end]
        found = zip((o[rows], states), sure, strict=True)
        errors = [error(actual, expected) for actual, expected in found]
        work = lightning_prefill.work_for(states, where, candidate, self.bulk)
        return float(torch.tensor(errors).max()), work  # NaN if one is

    def reading(self, T: int, H: int) -> Callable[[PrefillTuning], Callable[[], Any]]:
        """One sequence of T rows that goes on, by a candidate."""
        inputs, where = self.inputs(T, H), packing((T,), 1)
        slopes = torch.logspace(-5, -0.1, H, device=DEVICE)
        state = torch.randn(1, H, self.dk, self.dv, device=DEVICE)
        memory = slopes, 1.0, state, where, torch.empty_like(inputs[2])
        return lambda candidate: (
            lambda: lightning_prefill._triton(*inputs, *memory, tuning=candidate)
        )


class Middling:
    """Times of sequences of middling length; what is cut alike is measured once."""

    def __init__(self, trial: Prefilling) -> None:
        self.trial = trial
        self.works = {shape: trial.reading(*shape) for shape in MIDDLING}
        self.states = {H: torch.empty(1, H, trial.dk, trial.dv, device=DEVICE) for _, H in MIDDLING}
        self.packings = {T: packing((T,), 1) for T, _ in MIDDLING}
        self.measured: dict[tuple[Any, ...], float] = {}

    def time(self, shape: tuple[int, int], candidate: PrefillTuning) -> float:
        """Milliseconds of a shape."""
        T, H = shape
        where = self.packings[T]
        work = lightning_prefill.work_for(self.states[H], where, candidate, self.trial.bulk)
        stages = candidate.reread.stages if candidate.reread and work.reread else 0
        key = shape, min(work.length, T), work.reread, stages
        if key not in self.measured:
            self.measured[key] = milliseconds(self.works[shape](candidate), rounds=5)
            way = f"read again, {stages} stages" if work.reread else "scanned or whole"
            print(
                f"  {T} rows, {H} heads: {self.measured[key]:.5f} ms by {key[1]} rows, {way}",
                flush=True,
            )
        return self.measured[key]

    def mean(self, candidate: PrefillTuning) -> float:
        """The geometric mean over all shapes."""
        times = [self.time(shape, candidate) for shape in self.works]
        return math.exp(sum(map(math.log, times)) / len(times))


def tune_prefill(classes: list[str], deadline: float) -> Found:
    """Both passes of each shape class; the single pass over sequences of middling length."""
    kinds = {f"{itemsize}x{dk}": (itemsize, dk) for itemsize, dk in tuning.PREFILL}
    for name in due([*kinds, *(name + SHORT for name in kinds)], classes, deadline):
        tune = tune_short if name.endswith(SHORT) else tune_passes
        yield name, tune(*kinds[name.removesuffix(SHORT)], deadline)
        torch.cuda.empty_cache()


def tune_passes(itemsize: int, dk: int, deadline: float) -> dict[str, Any]:
    """First the outputs, then the contributions; what is in use now is tried first."""
    name = f"prefill {itemsize}x{dk}"
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    chosen = replace(tuning.prefill_tuning(DEVICE, itemsize, dk), reread=None)
    trial = Prefilling(dtype, dk, min(dk, 128))
    if itemsize == 4:
        grid = product((16, 32), (16, 32, 64), (4, 8), (1,))
    else:
        grid = product((32, 64), (64, 128), (4, 8), (1, 2, 3))
    tiles = [Tiles(*each) for each in grid if each[1] <= trial.dv]
    find = partial(
        best,
        check=trial.check,
        limit=bound(dtype),
        measure=timed(trial.reading(LONG, 16)),
        deadline=deadline,
    )
    if (itemsize, dk) != (2, 128) or tuning.card(DEVICE) != (9, 0):
        options = [replace(chosen, outputs=t, resident=r) for t in tiles for r in (1, 2)]
        chosen = find(f"{name} outputs", [chosen, *options])
    options = [replace(chosen, contributions=each) for each in tiles]
    chosen = find(f"{name} contributions", [chosen, *options])
    row = asdict(chosen)
    del row["reread"]
    return row


def tune_short(itemsize: int, dk: int, deadline: float) -> dict[str, Any] | None:
    """Whether and how sequences of middling length are read in one pass."""
    name = f"{itemsize}x{dk}{SHORT}"
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    usual = replace(tuning.prefill_tuning(DEVICE, itemsize, dk), reread=None)
    trial = Prefilling(dtype, dk, min(dk, 128))
    find = partial(best, limit=bound(dtype), measure=Middling(trial).mean, deadline=deadline)
    if (itemsize, dk) == (2, 128) and tuning.card(DEVICE) == (9, 0):
        kinds = [(2, 2), (4, 1), (3, 1)]
    else:
        kinds = [(usual.outputs.stages, 1), (usual.outputs.stages, 2), (2, 1), (2, 2)]
    ways = [RereadTuning(*kind, cost) for kind in kinds for cost in (0.3, 0.2, 0.45, 0.65)]
    options = [usual, *(replace(usual, reread=way) for way in ways)]
    chosen = find(f"prefill {name}", options, trial.check_reread)
    return None if chosen.reread is None else asdict(chosen.reread)
