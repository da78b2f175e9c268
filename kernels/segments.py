"""Segments: how a prefill cuts long sequences, so that a single one fills the card."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch

from kernels.packing import Packing

LENGTHS = [*range(128, 512, 64), *(m << n for n in range(7, 20) for m in (4, 5, 6, 7))]  # rows
SHORT = range(64, 1024, 64)  # of segments that read again what comes before them
OVERHEAD = 256  # rows that cost as much as a state that is written, scanned and read
LAUNCHES = 640  # and rows that cost as much as two more launches
COPY = 128  # or as one that copies states
TWICE = 1.5  # k and v of a sequence that is cut are read once more
SCRATCH = 280_000_000  # bytes of segment states


@dataclass(slots=True, frozen=True)
class Work:
    """What a prefill does: items and chains, rows of four int32 on the device.

    item:  first row, rows, sequence, whether it ends the sequence. Segments that continue a
           sequence come first, then those that begin one, then whole sequences, longest first;
           segments that read again what comes before them are in order of that, most first.
    chain: sequence, the item that begins it, the first of those that continue it, their count.
    length: rows of a segment; reread: whether segments read again what comes before them.
    continuing: items for whose sake a first pass reads; segments: items that start from one of so
           many `states` that lie beside the slots: the item's own or, if reread, the sequence's.
           Without such states they start from that in the slot, which one of them is to change.
    """

    length: int
    reread: bool
    items: torch.Tensor
    chains: torch.Tensor
    continuing: int
    segments: int
    states: int


def uncut(items: torch.Tensor) -> Work:
    """The work of sequences that stay whole: their items are all there is."""
    return Work(0, False, items, items[:0], 0, 0, 0)


def scanned(lengths: tuple[int, ...], H: int, programs: int, state_bytes: int) -> tuple[int, float]:
    """Rows of a segment, and the time in rows: as many as should end first where `programs` heads
    go on at a time. Sequences may stay whole."""
    long = [n for n in lengths if n > LENGTHS[0]]
    best, least = LENGTHS[0], float("inf")
    for L in LENGTHS:
        cut = sum(-(-n // L) for n in long if n > L)
        if cut * H * state_bytes > SCRATCH and LENGTHS[-1] > L:
            continue
        items = cut + sum(n <= L for n in long) + len(lengths) - len(long)
        longest = min(L, max(lengths)) + OVERHEAD
        rows = (sum(lengths) + items * OVERHEAD) * H
        waves = -(-rows // (programs * longest))
        time = waves * longest * (TWICE if cut else 1) + (LAUNCHES if cut else 0)
        if time < least:
            best, least = L, time
        if not cut:
            break
    return best, least


def reread(
    lengths: tuple[int, ...], H: int, programs: int, cost: float, copied: bool
) -> tuple[int, float]:
    """The same of segments that read again what comes before them, a row for `cost`: only where
    all go on at a time, and something is cut."""
    longest = max(lengths)
    best, least = SHORT[0], float("inf")
    for L in SHORT if len(lengths) * H <= programs else ():
        if longest > L and sum(-(-n // L) for n in lengths) * H <= programs:
            time = L + OVERHEAD + cost * (-(-longest // L) - 1) * L + COPY * copied
            if time < least:
                best, least = L, time
    return best, least


def choose(
    packing: Packing, H: int, programs: int, state_bytes: int, once: tuple[int, float, int] | None
) -> tuple[int, bool]:
    """Rows of a segment, and whether segments read again what comes before them.

    once: programs that go on at a time then, the cost of a row, and how many programs may share
    states because they surely go on at a time; more of them start from copies.
    """
    L, time = scanned(packing.lengths, H, programs, state_bytes)
    if once is None:
        return L, False
    at_a_time, cost, sharing = once
    copied = not sharing and (packing.past is None or any(packing.past))
    shorter, sooner = reread(packing.lengths, H, at_a_time, cost, copied)
    return (shorter, True) if sooner < time else (L, False)


@lru_cache(maxsize=4)
def plan(
    packing: Packing,
    H: int,
    programs: int,
    state_bytes: int,
    once: tuple[int, float, int] | None = None,
) -> Work:
    """The work of a step, which its layers share: one transfer, and nothing asked of the device."""
    L, again = choose(packing, H, programs, state_bytes, once)
    begins = (0, *accumulate(packing.lengths))
    continuing: list[tuple[int, ...]] = []
    beginning: list[tuple[int, ...]] = []
    whole: list[tuple[int, ...]] = []
    chains: list[tuple[int, ...]] = []
    for i, (begin, end) in enumerate(pairwise(begins)):
        if end - begin <= L:
            whole.append((begin, end - begin, i, 1))
            continue
        rows = range(begin + L, end, L)
        chains.append((i, len(chains), len(continuing), len(rows)))
        beginning.append((begin, L, i, 0))
        continuing += [(row, min(L, end - row), i, int(row + L >= end)) for row in rows]
    whole.sort(key=lambda item: -item[1])
    cut = continuing + beginning
    if again:
        cut.sort(key=lambda item: begins[item[2]] - item[0])
        started = packing.past is None or any(packing.past[i] for i, *_ in chains)
        copied = started and (once is None or len(cut) * H > once[2])
        chains = [(i, i, 0, 0) for i, *_ in chains] if copied else []
        counts = 0, len(cut) * started, len(packing.lengths) * copied
    else:
        chains = [(i, len(continuing) + j, first, count) for i, j, first, count in chains]
        counts = len(continuing), len(cut), len(cut)
    device = packing.slots.device
    table = torch.tensor(
        [*cut, *whole, *chains], dtype=torch.int32, pin_memory=device.type == "cuda"
    ).to(device, non_blocking=True)
    items, chained = table.split((len(table) - len(chains), len(chains)))
    return Work(L, again, items, chained, *counts)
