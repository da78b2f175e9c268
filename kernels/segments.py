"""Segments: how a prefill cuts long sequences, so that a single one fills the card."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch

from kernels.packing import Packing

LENGTHS = [m << n for n in range(7, 20) for m in (4, 5, 6, 7)]  # of segments, 512 rows and more
OVERHEAD = 256  # rows that cost as much as a state that is written, scanned and read
LAUNCHES = 512  # and rows that cost as much as two more launches
TWICE = 1.5  # k and v of a sequence that is cut are read once more
SCRATCH = 280_000_000  # bytes of segment states


@dataclass(slots=True, frozen=True)
class Work:
    """What a prefill does: items and chains, rows of four int32 on the device.

    item:  first row, rows, sequence, whether it ends the sequence. Segments that continue a
           sequence come first, then those that begin one, then whole sequences, longest first.
    chain: sequence, the item that begins it, the first of those that continue it, their count.
    length: rows of a segment; continuing, segments: how many items continue a sequence, are cut.
    """

    length: int
    items: torch.Tensor
    chains: torch.Tensor
    continuing: int
    segments: int


def segment_length(lengths: tuple[int, ...], H: int, programs: int, state_bytes: int) -> int:
    """Rows of a segment: as many as should end first where `programs` heads go on at a time."""
    long = [n for n in lengths if n > LENGTHS[0]]
    best, least = LENGTHS[0], float("inf")
    for L in LENGTHS if long else ():
        cut = sum(-(-n // L) for n in long if n > L)
        if cut * H * state_bytes > SCRATCH and LENGTHS[-1] > L:
            continue
        items = cut + sum(n <= L for n in long) + len(lengths) - len(long)
        longest = min(L, max(long)) + OVERHEAD
        rows = (sum(lengths) + items * OVERHEAD) * H
        waves = -(-rows // (programs * longest))
        time = waves * longest * (TWICE if cut else 1) + (LAUNCHES if cut else 0)
        if time < least:
            best, least = L, time
        if not cut:
            break
    return best


@lru_cache(maxsize=4)
def plan(packing: Packing, H: int, programs: int, state_bytes: int) -> Work:
    """The work of a step, which its layers share: one transfer, and nothing asked of the device."""
    L = segment_length(packing.lengths, H, programs, state_bytes)
    continuing: list[tuple[int, ...]] = []
    beginning: list[tuple[int, ...]] = []
    whole: list[tuple[int, ...]] = []
    chains: list[tuple[int, ...]] = []
    for i, (n, end) in enumerate(zip(packing.lengths, accumulate(packing.lengths), strict=True)):
        if n <= L:
            whole.append((end - n, n, i, 1))
            continue
        chains.append((i, len(chains), len(continuing), -(-n // L) - 1))
        beginning.append((end - n, L, i, 0))
        for row in range(end - n + L, end, L):
            continuing.append((row, min(L, end - row), i, int(row + L >= end)))
    whole.sort(key=lambda item: -item[1])
    chains = [(i, len(continuing) + j, first, count) for i, j, first, count in chains]
    device = packing.slots.device
    table = torch.tensor(
        [*continuing, *beginning, *whole, *chains],
        dtype=torch.int32,
        pin_memory=device.type == "cuda",
    ).to(device, non_blocking=True)
    items, chained = table.split((len(table) - len(chains), len(chains)))
    return Work(L, items, chained, len(continuing), len(continuing) + len(beginning))
