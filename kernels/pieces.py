"""Pieces: how the attention of prompt chunks is cut, so that any mix of them fills the card.

Rows of a chunk are pairs (token, one of the G heads of a key-value head), token by token. A tile is
`rows` of them; where its keys are many beside all the work there is, it is cut into pieces of keys,
whose results are joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from kernels.packing import Packing

KEYS = 128  # pieces begin at its multiples
LEAST = 8  # times KEYS: shorter pieces cost more in joining than they save
SHARE = 4  # pieces are at most this part of what a processor has to do


@dataclass(slots=True, frozen=True)
class Work:
    """Items and joins, rows of five int32 on the device; parts: how many pieces must be joined.

    item: sequence, first pair, first key, end of its keys, part or -1 where the tile is not cut.
    join: sequence, first pair, first part, their count, 0.
    """

    items: torch.Tensor
    joins: torch.Tensor
    parts: int


@lru_cache(maxsize=4)
def plan(packing: Packing, first: int, G: int, Hkv: int, rows: int, programs: int) -> Work:
    """The work of sequences from `first` on, which a step's layers share: one transfer."""
    assert packing.past is not None
    tiles: list[tuple[int, int, int]] = []  # sequence, first pair, end of its keys
    for i, (n, past) in enumerate(zip(packing.lengths, packing.past, strict=True)):
        for pair in range(0, n * G if i >= first else 0, rows):
            tiles.append((i, pair, past + min((pair + rows - 1) // G + 1, n)))
    total = sum(-(-end // KEYS) for _, _, end in tiles) * Hkv
    most = max(-(-total // (programs * SHARE)), LEAST)
    items: list[tuple[int, int, int, int, int]] = []
    joins: list[tuple[int, int, int, int, int]] = []
    parts = 0
    for i, pair, end in tiles:
        blocks = -(-end // KEYS)
        size = -(-blocks // max(round(blocks / most), 1)) * KEYS
        count = -(-end // size)
        if count == 1:
            items.append((i, pair, 0, end, -1))
            continue
        for j in range(count):
            items.append((i, pair, j * size, min((j + 1) * size, end), parts + j))
        joins.append((i, pair, parts, count, 0))
        parts += count
    items.sort(key=lambda item: item[2] - item[3])
    device = packing.starts.device
    table = torch.tensor(items + joins, dtype=torch.int32, pin_memory=device.type == "cuda").to(
        device, non_blocking=True
    )
    return Work(table[: len(items)], table[len(items) :], parts)
