"""Tile sizes by operation, card and shape class: measured once, committed, looked up.

tuning.json holds, for each card that was measured, the winners that `python -m benchmarks.tune`
found; other cards get modest tiles. null: what a kernel was measured against has won, and serves.
Nothing is measured while a server runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_suffix(".json")
SHORT = "-short"  # ends the name of a prefill's class whose row is a RereadTuning


@dataclass(slots=True, frozen=True)
class Tiles:
    """C rows at a time, columns of the state per program, warps per program, stages of its loop."""

    C: int
    columns: int
    warps: int
    stages: int


@dataclass(slots=True, frozen=True)
class RereadTuning:
    """A single pass over segments that read again what comes before them: stages of its loop,
    programs that a processor holds, what a row read again costs of a row with its output."""

    stages: int
    resident: int
    cost: float


@dataclass(slots=True, frozen=True)
class PrefillTuning:
    """Tiles of the two passes of a prefill; programs of the second that a processor holds; how
    short sequences are read in one pass, if that was measured."""

    contributions: Tiles
    outputs: Tiles
    resident: int
    reread: RereadTuning | None = None


@dataclass(slots=True, frozen=True)
class RingTuning:
    """Columns of a row read side by side, columns of a program, its warps, and registers per
    thread."""

    strip: int
    columns: int
    warps: int
    registers: int


@dataclass(slots=True, frozen=True)
class DecodeTuning:
    """Elements of the state per program, and its warps."""

    elements: int
    warps: int


@dataclass(slots=True, frozen=True)
class RowsTuning:
    """Attention of chunks: pairs (token, head) and keys at a time, warps, stages of its loop;
    programs that a processor holds."""

    rows: int
    keys: int
    warps: int
    stages: int
    resident: int


@dataclass(slots=True, frozen=True)
class KeysTuning:
    """Attention of single tokens: keys at a time, warps per program, stages of its loop; programs
    for each processor that a batch is split into."""

    keys: int
    warps: int
    stages: int
    resident: int


@dataclass(slots=True, frozen=True)
class SkinnyTuning:
    """Products of few rows: rows that one program takes, 1 without the matrix units; outputs and
    inputs at a time, warps, stages of its loop; whether it starts before the kernel in front of it
    has ended."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    early: bool


@dataclass(slots=True, frozen=True)
class RouteTuning:
    """Choosing experts: warps per token; whether they make the token's logits too, of a small
    router."""

    warps: int
    fused: bool


@dataclass(slots=True, frozen=True)
class ProductTuning:
    """Products of an expert: rows, outputs and inputs at a time, warps, stages of its loop; whether
    Hopper's bulk copies bring the weights, where they can. One row at a time asks for no order of
    rows."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    bulk: bool = False


@dataclass(slots=True, frozen=True)
class MixtureTuning:
    """Products with gate and up, and with down."""

    up: ProductTuning
    down: ProductTuning


# by bytes of an element of the inputs and the power of two that holds a key
PREFILL = {
    (2, 64): PrefillTuning(Tiles(32, 64, 4, 1), Tiles(32, 64, 4, 1), 2),
    (2, 128): PrefillTuning(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), 2),
    (2, 256): PrefillTuning(Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), 1),
    (4, 64): PrefillTuning(Tiles(32, 32, 4, 1), Tiles(32, 32, 4, 1), 2),
    (4, 128): PrefillTuning(Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1), 1),
    (4, 256): PrefillTuning(Tiles(16, 32, 8, 1), Tiles(16, 32, 8, 1), 1),
}
# by bytes of an element of the state
RING = {4: RingTuning(64, 128, 4, 128), 2: RingTuning(64, 128, 4, 128)}
DECODE = {4: DecodeTuning(4096, 4), 2: DecodeTuning(4096, 4)}
SKINNY = (1, 16, 32, 64, 128, 256)  # up to so many rows a product may be skinny: a class each
# by bytes of a head's row: they must fit where shared memory is small
ROWS = {
    128: RowsTuning(64, 64, 4, 2, 2),
    256: RowsTuning(64, 32, 4, 2, 2),
    512: RowsTuning(64, 32, 8, 1, 1),
    1024: RowsTuning(16, 16, 8, 1, 1),
}
KEYS = {
    128: KeysTuning(64, 4, 2, 4),
    256: KeysTuning(32, 4, 2, 4),
    512: KeysTuning(32, 4, 1, 4),
    1024: KeysTuning(16, 4, 1, 4),
}

ROUTE = RouteTuning(4, True)  # where the kernel is asked for by itself


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


@lru_cache(maxsize=4)
def measured(capability: tuple[int, int]) -> dict[str, dict[str, dict[str, Any]]]:
    """What tuning.json says of a card: operation -> shape class -> tuning."""
    table: dict[str, dict[str, dict[str, dict[str, Any]]]] = json.loads(TABLE.read_text())
    return table.get("sm_{}{}".format(*capability), {})


@lru_cache(maxsize=64)
def prefill_tuning(device: torch.device, itemsize: int, BLOCK_K: int) -> PrefillTuning:
    """Tiles for inputs of such elements and keys of such a size."""
    key = itemsize, max(BLOCK_K, 64)
    name = "{}x{}".format(*key)
    found = measured(card(device)).get("prefill", {})
    tuning = prefill_of(found[name]) if name in found else PREFILL[key]
    short = found.get(name + SHORT)
    return tuning if short is None else replace(tuning, reread=RereadTuning(**short))


@lru_cache(maxsize=64)
def ring_tuning(device: torch.device, itemsize: int) -> RingTuning:
    """How decoding with a ring reads states of such elements."""
    found = measured(card(device)).get("ring", {}).get(str(itemsize))
    return RING[itemsize] if found is None else RingTuning(**found)


@lru_cache(maxsize=64)
def decode_tuning(device: torch.device, itemsize: int) -> DecodeTuning:
    """How plain decoding reads states of such elements."""
    found = measured(card(device)).get("decode", {}).get(str(itemsize))
    return DECODE[itemsize] if found is None else DecodeTuning(**found)


@lru_cache(maxsize=64)
def rows_tuning(device: torch.device, itemsize: int, BLOCK_D: int) -> RowsTuning:
    """How attention of chunks reads pages, for heads of such a size of such elements."""
    found = measured(card(device)).get("attend", {}).get(f"{itemsize}x{BLOCK_D}")
    least = ROWS[max(itemsize * BLOCK_D, 128)]
    return least if found is None else RowsTuning(**found)


@lru_cache(maxsize=64)
def keys_tuning(device: torch.device, itemsize: int, BLOCK_D: int) -> KeysTuning:
    """How attention of single tokens reads pages, likewise."""
    found = measured(card(device)).get("attend_one", {}).get(f"{itemsize}x{BLOCK_D}")
    least = KEYS[max(itemsize * BLOCK_D, 128)]
    return least if found is None else KeysTuning(**found)


def skinny_class(itemsize: int, form: str, rows: int, N: int, K: int) -> str:
    """Products [N, K] of up to so many rows, in a form that kernels.fused_linear names."""
    return f"{form}-{itemsize}x{rows}x{N}x{K}"


def skinny_tuning(
    device: torch.device, itemsize: int, form: str, M: int, N: int, K: int
) -> SkinnyTuning | None:
    """How one kernel multiplies M rows with what surrounds the product; None where the kernels one
    by one are not known to be slower."""
    rows = next((most for most in SKINNY if most >= M), 0)
    return skinny_of(device, skinny_class(itemsize, form, rows, N, K)) if M and rows else None


@lru_cache(maxsize=1024)
def skinny_of(device: torch.device, name: str) -> SkinnyTuning | None:
    """What is known of a class; None where that is that several kernels are faster, or nothing."""
    found = measured(card(device)).get("skinny", {}).get(name)
    return None if found is None else SkinnyTuning(**found)


@lru_cache(maxsize=64)
def route_tuning(device: torch.device, E: int) -> RouteTuning | None:
    """How the kernel chooses among so many experts; None where it has not won."""
    found = measured(card(device)).get("route", {}).get(str(E))
    return None if found is None else RouteTuning(**found)


def mixture_class(itemsize: int, rows: int, E: int) -> str:
    """So many rows, each with one of E experts whose weights have elements of such a size."""
    return f"{itemsize}x{1 << max(rows - 1, 0).bit_length()}x{E}"


@lru_cache(maxsize=1024)
def mixture_tuning(device: torch.device, itemsize: int, rows: int, E: int) -> MixtureTuning | None:
    """How the kernels multiply them; None where they have not won."""
    found = measured(card(device)).get("moe", {}).get(mixture_class(itemsize, rows, E))
    return None if found is None else mixture_of(found)


def mixture_of(found: dict[str, Any]) -> MixtureTuning:
    """A row of the table's operation `moe`."""
    return MixtureTuning(ProductTuning(**found["up"]), ProductTuning(**found["down"]))


def prefill_of(found: dict[str, Any]) -> PrefillTuning:
    """A row of the table's operation `prefill`."""
    contributions, outputs = Tiles(**found["contributions"]), Tiles(**found["outputs"])
    return PrefillTuning(contributions, outputs, found["resident"])
