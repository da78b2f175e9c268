"""Finds tile sizes of the kernels for the card at hand, and writes kernels/tuning.json.

    python -m benchmarks.tune [--only attend_one ...] [--classes 2x128 ...] [--seconds 500]

For every shape class each candidate is compiled, held against float64 at ugly lengths, cut and
uncut, and only then timed; what is wrong, or does not fit the card, cannot win, and what is in use
is tried first. On Hopper the kernels of lightning_prefill_hopper and paged_prefill_hopper have
fixed tiles: of the former's class the first pass alone is tuned, and what is found for the latter's
serves other sizes of pages. Each class of a prefill has a second one, such as 2x128-short: how
sequences of middling length are read in one pass, which is not done where it was not measured. The
table is written after each class; once the seconds are over, what is not tried keeps what it had.
For mixtures of experts PyTorch's operations are candidates too: a class that they win has no row.
Classes of `skinny` may have wildcards, and be others than the usual ones: 'norm-*-2x1x*'.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.candidates import DEVICE, Found, best, due, error, timed
from benchmarks.pages import Paged
from benchmarks.prefilling import tune_prefill
from benchmarks.tune_experts import tune_mixtures, tune_routing
from benchmarks.tune_skinny import tune_skinny
from kernels import lightning_decode, lightning_ring, paged_decode, paged_prefill, tuning
from kernels.lightning_reference import lightning_reference
from kernels.tuning import DecodeTuning, KeysTuning, RingTuning, RowsTuning
from model.lightning import drafts

R = 16


class Decoding:
    """B sequences of 16 heads of 128 x 128 in so many layers that no state stays in the cache."""

    def __init__(self, B: int, H: int, dtype: torch.dtype, layers: int) -> None:
        self.slopes = torch.logspace(-5, -0.1, H, device=DEVICE)
        self.states = [torch.randn(B, H, 128, 128, device=DEVICE).to(dtype) for _ in range(layers)]
        shape = B, H, lightning_ring.parts(128), 2
        self.rings = [
            (
                torch.randn(B, H, R, 128, device=DEVICE, dtype=torch.bfloat16),
                torch.randn(B, H, R, 128, device=DEVICE, dtype=torch.bfloat16),
                torch.zeros(shape, dtype=torch.int64, device=DEVICE),  # folded
            )
            for _ in range(layers)
        ]
        self.slots = torch.randperm(B, device=DEVICE).int()
        self.starts = torch.full((B,), 7, device=DEVICE)
        self.inputs = [
            torch.randn(B, H, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)
        ]
        self.o = torch.empty_like(self.inputs[0])

    def plain(self, layer: int, candidate: DecodeTuning) -> None:
        where = self.slots, self.starts, self.o
        state = self.states[layer]
        lightning_decode._triton(*self.inputs, self.slopes, 1.0, state, *where, tuning=candidate)

    def ring(self, layer: int, candidate: RingTuning) -> None:
        memory = self.states[layer], *self.rings[layer]
        where = self.slots, self.starts, drafts(R), self.o
        lightning_ring._triton(*self.inputs, self.slopes, 1.0, *memory, *where, tuning=candidate)

    def check(self, step: Callable[[int, Any], None], candidate: Any) -> float:
        """Greatest error of 2 R + 1 tokens of the last sequence."""
        self.starts.fill_(7)
        self.rings[0][-1].fill_(7)
        slot = int(self.slots[-1])
        initial = self.states[0][slot].clone()
        steps, outputs = [], []
        for _ in range(2 * R + 1):
            for x in self.inputs:
                x.normal_()
            steps.append([x[-1].clone() for x in self.inputs])
            self.o.fill_(torch.nan)
            step(0, candidate)
            outputs.append(self.o[-1].clone())
            self.starts += 1
        q, k, v = (torch.stack([step[j] for step in steps]) for j in range(3))
        expected, _ = lightning_reference(q, k, v, self.slopes, 1.0, initial)
        return error(torch.stack(outputs), expected)


class BothSizes:
    """A batch that hardly fills the card, and one that does."""

    def __init__(self, dtype: torch.dtype, ring: bool) -> None:
        self.sizes = [Decoding(32, 16, dtype, 16), Decoding(256, 16, dtype, 2)]
        self.steps = [size.ring if ring else size.plain for size in self.sizes]

    def check(self, candidate: Any) -> float:
        return self.sizes[0].check(self.steps[0], candidate)

    def work(self, candidate: Any) -> Callable[[], None]:
        def run() -> None:
            for size, step in zip(self.sizes, self.steps, strict=True):
                for layer in range(len(size.states)):
                    step(layer, candidate)
                size.starts += 1

        return run


def tune_decoding(ring: bool, classes: list[str], deadline: float) -> Found:
    """By the state's dtype."""
    options: list[Any]
    if ring:
        options = [
            RingTuning(strip, columns, warps, registers)
            for strip, columns in product((32, 64, 128), repeat=2)
            for warps, registers in product((1, 2, 4), (96, 128, 168, 255))
            if strip <= columns
        ]
    else:
        options = [DecodeTuning(*each) for each in product((2048, 4096, 8192, 16384), (2, 4, 8))]
    for itemsize in due("42", classes, deadline):
        dtype = torch.float32 if itemsize == "4" else torch.bfloat16
        trial = BothSizes(dtype, ring)
        name = f"{'ring' if ring else 'decode'} {itemsize}"
        limit = 4e-3 if dtype == torch.float32 else 8e-3
        usual = (tuning.ring_tuning if ring else tuning.decode_tuning)(DEVICE, dtype.itemsize)
        rule = limit, timed(trial.work), deadline
        yield itemsize, asdict(best(name, [usual, *options], trial.check, *rule))
        del trial
        torch.cuda.empty_cache()


ATTENDED = ("2x64", "2x128", "4x128")


class Attending:
    """Works to be checked and works to be timed, of single tokens or of chunks."""

    def __init__(self, name: str, one: bool) -> None:
        itemsize, d = map(int, name.split("x"))
        kinds = {"dtype": torch.float32 if itemsize == 4 else torch.bfloat16, "d": d}
        self.limit = 1e-4 if itemsize == 4 else 6e-3
        self.one = one
        if one:
            pasts: list[tuple[int, ...]] = [(300,) * 256, (32_768,) * 2]
            self.works = [Paged.random((1,) * len(p), p, H=16, Hkv=8, **kinds) for p in pasts]
            past = 0, 1, 63, 64, 100, 257, 781, 5000
            self.ugly = Paged.random((1,) * 8, past, H=16, Hkv=8, **kinds)
        else:
            self.works = [Paged.random((2048,), (8192,), H=16, Hkv=8, **kinds)]
            past = 0, 700, 64, 100, 5000, 0
            self.ugly = Paged.random((63, 781, 100, 2, 257, 64), past, H=16, Hkv=8, **kinds)

    def run(self, work: Paged, candidate: Any) -> torch.Tensor:
        o = torch.full_like(work.q, torch.nan)
        memory = *work.pages, work.tables
        inputs = work.q, work.k, work.v, *memory
        packing = work.packing
        if self.one:
            starts = packing.starts
            paged_decode.decode(*inputs, packing.slots, starts, work.scale, o, candidate)
        else:
            paged_prefill.prefill(*inputs, packing, 0, work.scale, o, candidate)
        return o

    def check(self, candidate: Any) -> float:
        works = self.ugly, *self.works
        return float(torch.tensor([w.wrong(self.run(w, candidate)) for w in works]).max())

    def work(self, candidate: Any) -> Callable[[], None]:
        def run() -> None:
            for work in self.works:
                self.run(work, candidate)

        return run


def tune_attending(one: bool, classes: list[str], deadline: float) -> Found:
    """By bytes of an element and size of a head."""
    for name in due(ATTENDED, classes, deadline):
        trial = Attending(name, one)
        title = f"{'attend_one' if one else 'attend'} {name}"
        rule = {"check": trial.check, "limit": trial.limit, "measure": timed(trial.work)}
        find = partial(best, title, **rule, deadline=deadline)
        chosen: Any
        if one:
            grid = product((32, 64), (2, 4), (1, 2, 3, 5))
            usual: Any = tuning.keys_tuning(DEVICE, *map(int, name.split("x")))
            chosen = find([usual, *(KeysTuning(*each, 4) for each in grid)])
            chosen = find([chosen, *(replace(chosen, resident=count) for count in (2, 4, 8, 16))])
        else:
            tiles = (64, 64, 4), (64, 32, 4), (128, 64, 8)
            if name.startswith("4"):
                tiles = (64, 32, 8), (64, 32, 4), (32, 32, 4), (64, 16, 4)
            usual = tuning.rows_tuning(DEVICE, *map(int, name.split("x")))
            chosen = find([usual, *(RowsTuning(*t, s, 1) for t in tiles for s in (1, 2, 3))])
            chosen = find([chosen, *(replace(chosen, resident=count) for count in (1, 2))])
        yield name, asdict(chosen)
        del trial, find, rule
        torch.cuda.empty_cache()


TUNERS: dict[str, Callable[[list[str], float], Found]] = {
    "prefill": tune_prefill,
    "decode": partial(tune_decoding, False),
    "ring": partial(tune_decoding, True),
    "attend_one": partial(tune_attending, True),
    "attend": partial(tune_attending, False),
    "skinny": tune_skinny,
    "route": tune_routing,
    "moe": tune_mixtures,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=TUNERS, default=list(TUNERS))
    parser.add_argument("--classes", nargs="+", default=[], help="of shapes; default: all")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which none begins")
    parser.add_argument("--dry-run", action="store_true", help="print, do not write")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    torch.manual_seed(0)
    table = json.loads(tuning.TABLE.read_text())
    mine = table.setdefault("sm_{}{}".format(*tuning.card(DEVICE)), {})
    with torch.inference_mode():
        for name in options.only:
            for key, row in TUNERS[name](options.classes, deadline):
                mine.setdefault(name, {}).pop(key, None)
                if row is not None:
                    mine[name][key] = row
                print(f"{name} {key}: {json.dumps(row)}", flush=True)
                if not options.dry_run:
                    tuning.TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
