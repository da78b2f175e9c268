"""Finds tile sizes of the kernels for the card at hand, and writes kernels/tuning.json.

    python -m benchmarks.tune [--only attend_one ...] [--classes 2x128 ...] [--seconds 500]

For every shape class each candidate is compiled, held against float64 at ugly lengths, cut and
uncut, and only then timed; what is wrong, or does not fit the card, cannot win, and what is in use
is tried first. On Hopper the kernels of lightning_prefill_hopper and paged_prefill_hopper have
fixed tiles: of the former's class the first pass alone is tuned, and what is found for the latter's
serves other sizes of pages. Each class of a prefill has a second one, such as 2x128-short: how
sequences of middling length are read in one pass, which is not done where it was not measured. The
table is written after each class; once the seconds are over, what is not tried keeps what it had.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import accumulate, product
from typing import Any, TypeVar

import torch

from benchmarks.pages import Paged
from benchmarks.timing import milliseconds
from kernels import (
    lightning_decode,
    lightning_prefill,
    lightning_ring,
    paged_decode,
    paged_prefill,
    tuning,
)
from kernels.lightning_reference import lightning_reference
from kernels.packing import Packing
from kernels.segments import Work
from kernels.tuning import (
    SHORT,
    DecodeTuning,
    KeysTuning,
    PrefillTuning,
    RereadTuning,
    RingTuning,
    RowsTuning,
    Tiles,
)
from model.lightning import drafts

T = TypeVar("T")
Found = Iterator[tuple[str, dict[str, Any] | None]]  # classes and their rows, None for no row
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOPES = (0.9, 0.03, 4.05e-8, 0.0)
UGLY = (1, 63, 64, 100, 257, 781, 3000)
LONG = 65_536
MIDDLING = [(T, H) for H in (16, 8, 64) for T in (128, 256, 512, 1024, 2048, 4096)]
PLENTY = 64  # programs that a processor is said to hold, so that sequences are cut
R = 16


def bound(dtype: torch.dtype) -> float:
    """Greatest relative error that a candidate may have."""
    return 1e-5 if dtype == torch.float32 else 4e-3


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in norm; NaN where anything is."""
    return float((actual.double() - expected).norm() / expected.norm())


def packing(lengths: tuple[int, ...], starts: int) -> Packing:
    """Sequences in the slots of their order."""
    rows = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    N = len(lengths)
    slots = torch.arange(N, dtype=torch.int32, device=DEVICE)
    return Packing(lengths, rows, slots, torch.full((N,), starts, device=DEVICE))


def best(
    name: str,
    candidates: Iterable[T],
    check: Callable[[T], float],
    limit: float,
    measure: Callable[[T], float],
    deadline: float = math.inf,
) -> T:
    """The fastest of the candidates that are right, of those that there is time for."""
    times: list[tuple[float, int, T]] = []
    tried = list(candidates)
    for i, candidate in enumerate(tried):
        if times and time.monotonic() > deadline:
            print(f"{name}: no time for the last {len(tried) - i} of {len(tried)} candidates")
            break
        try:
            wrong = check(candidate)
            if not wrong <= limit:
                print(f"{name}: {candidate} is wrong by {wrong:.1e}")
                continue
            times.append((measure(candidate), i, candidate))
            print(f"{name} {i + 1}/{len(tried)}: {times[-1][0]:.4f} ms {candidate}", flush=True)
        except Exception as failure:  # whatever the compiler says of a candidate, others follow
            print(f"{name}: {candidate} fails: {type(failure).__name__}: {failure}"[:300])
            torch.cuda.synchronize()
    times.sort()
    for milli, _, candidate in times[:3]:
        print(f"{name} best: {milli:.4f} ms {candidate}", flush=True)
    if not times:
        raise SystemExit(f"{name}: no candidate is right")
    return times[0][2]


def due(names: Iterable[str], classes: list[str], deadline: float) -> Iterator[str]:
    """Those of the classes that were asked for, as long as there is time."""
    for name in names:
        if classes and name not in classes:
            continue
        if time.monotonic() > deadline:
            print(f"{name}: no time, it keeps what it had")
            continue
        yield name


def timed(work: Callable[[T], Callable[[], Any]]) -> Callable[[T], float]:
    """Milliseconds of a candidate's work."""
    return lambda candidate: milliseconds(work(candidate), rounds=5)


class Prefilling:
    """The inputs of a shape class: ugly lengths to be checked, a long sequence to be timed."""

    def __init__(self, dtype: torch.dtype, dk: int, dv: int) -> None:
        self.dtype, self.dk, self.dv = dtype, dk, dv
        self.slopes = torch.tensor(SLOPES, device=DEVICE)
        self.ugly = self.inputs(sum(UGLY), len(SLOPES))
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
        work = lightning_prefill.work_for(states, where, candidate)
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
        work = lightning_prefill.work_for(self.states[H], self.packings[T], candidate)
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
    return chosen.reread and asdict(chosen.reread)


class Decoding:
    """B sequences of 16 heads of 128 x 128 in so many layers that no state stays in the cache."""

    def __init__(self, B: int, H: int, dtype: torch.dtype, layers: int) -> None:
        self.slopes = torch.logspace(-5, -0.1, H, device=DEVICE)
        self.states = [torch.randn(B, H, 128, 128, device=DEVICE).to(dtype) for _ in range(layers)]
        self.rings = [
            torch.randn(B, H, R, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
        ]
        self.folded = torch.zeros(B, H, 2, dtype=torch.int64, device=DEVICE)
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
        memory = self.states[layer], *self.rings, self.folded
        where = self.slots, self.starts, drafts(R), self.o
        lightning_ring._triton(*self.inputs, self.slopes, 1.0, *memory, *where, tuning=candidate)

    def check(self, step: Callable[[int, Any], None], candidate: Any) -> float:
        """Greatest error of 2 R + 1 tokens of the last sequence."""
        self.starts.fill_(7)
        self.folded.fill_(7)
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
        options = [RingTuning(*each) for each in product((16, 32, 64), (2, 4, 8), (96, 128, 255))]
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
