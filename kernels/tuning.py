"""Tile sizes by operation, card, element size and head size: measured once, then looked up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(slots=True, frozen=True)
class Tiles:
    """C rows at a time, columns of the state per program, warps per program, stages of its loop."""

    C: int
    columns: int
    warps: int
    stages: int


@dataclass(slots=True, frozen=True)
class PrefillTuning:
    """Tiles of the two passes of a prefill; programs of the second that a processor holds."""

    contributions: Tiles
    outputs: Tiles
    resident: int


@dataclass(slots=True, frozen=True)
class RingTuning:
    """Rows of the state read at a time, warps per program, registers per thread."""

    rows: int
    warps: int
    registers: int


# by bytes of an element and the power of two that holds a key; the outputs of (2, 128) only where
# lightning_prefill_hopper does not serve
HOPPER = {
    (2, 64): PrefillTuning(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 1), 2),
    (2, 128): PrefillTuning(Tiles(64, 128, 8, 3), Tiles(64, 64, 4, 2), 2),
    (2, 256): PrefillTuning(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), 1),
    (4, 64): PrefillTuning(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), 2),
    (4, 128): PrefillTuning(Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1), 1),
    (4, 256): PrefillTuning(Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1), 1),
}
ELSEWHERE = {
    (2, 64): PrefillTuning(Tiles(32, 64, 4, 1), Tiles(32, 64, 4, 1), 2),
    (2, 128): PrefillTuning(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), 2),
    (2, 256): PrefillTuning(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), 1),
    (4, 64): PrefillTuning(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), 2),
    (4, 128): PrefillTuning(Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1), 1),
    (4, 256): PrefillTuning(Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1), 1),
}
PREFILL = {(9, 0): HOPPER}


@lru_cache(maxsize=16)
def card(device: torch.device) -> tuple[int, int]:
    """Compute capability; (0, 0) of what is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of the card; 1 of what is no GPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def prefill_tuning(device: torch.device, itemsize: int, BLOCK_K: int) -> PrefillTuning:
    """The card's tiles, or modest ones where it was never measured."""
    return PREFILL.get(card(device), ELSEWHERE)[itemsize, max(BLOCK_K, 64)]


# by bytes of an element of the state
RING = {4: RingTuning(32, 4, 128), 2: RingTuning(16, 2, 128)}


def ring_tuning(device: torch.device, itemsize: int) -> RingTuning:
    """How decoding with a ring reads states of such elements."""
    return RING[itemsize]
