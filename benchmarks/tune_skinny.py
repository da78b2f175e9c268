"""Candidates of products of few rows, against several kernels, which win where they win."""

from __future__ import annotations

from dataclasses import asdict, replace
from fnmatch import fnmatch
from functools import partial

import torch

from benchmarks.candidates import DEVICE, Found, best, due, timed
from benchmarks.skinny import CLASSES, Trial
from kernels.tuning import SkinnyTuning, skinny_of

# outputs at a time, warps; 256 inputs a warp, so that a thread meets each input once
SUMS = [(2, 4), (4, 4), (8, 4), (4, 2), (8, 2), (16, 2), (16, 1)]
# by rows: rows, outputs and inputs at a time, warps, stages
TILES = {
    1: [(16, 16, 256, 2, 5), (16, 32, 128, 4, 5)],
    16: [
        (16, 16, 256, 2, 5),
        (16, 16, 256, 4, 5),
        (16, 32, 128, 4, 5),
        (16, 32, 256, 4, 4),
        (16, 64, 128, 4, 4),
    ],
    32: [
        (32, 16, 256, 4, 4),
        (32, 32, 128, 4, 4),
        (32, 64, 128, 4, 4),
        (32, 128, 64, 8, 4),
        (16, 64, 128, 4, 4),
    ],
    64: [
        (64, 16, 128, 4, 4),
        (64, 32, 128, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 128, 64, 8, 4),
        (32, 64, 128, 4, 4),
    ],
    128: [(64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 64, 64, 8, 4), (128, 128, 64, 8, 4)],
    256: [(64, 128, 64, 4, 4), (128, 64, 64, 8, 4), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3)],
}


def candidates(trial: Trial) -> list[SkinnyTuning]:
    """What may be tried; what does not fit the card falls out when it is compiled."""
    alone = [SkinnyTuning(1, n, 256 * warps, warps, 1, early=False) for n, warps in SUMS]
    tiles = [SkinnyTuning(*tile, early=False) for tile in TILES[trial.rows]]
    found = (alone if trial.rows == 1 else []) + tiles
    if trial.groups > 1:  # a group at a time
        width = trial.K // trial.groups
        found = [replace(each, inputs=width, stages=min(each.stages, 3)) for each in found]
    return list(dict.fromkeys(found))


def tune_skinny(classes: list[str], deadline: float) -> Found:
    """By form, bytes of an element, rows, outputs and inputs; `classes` may have wildcards, or be
    others than the usual ones. No row: several kernels have won."""
    wanted: list[str] = []
    for each in classes or ["*"]:
        met = [name for name in CLASSES if fnmatch(name, each)]
        if not met and set(each) & set("*?["):
            raise SystemExit(f"--classes {each} matches none of {', '.join(CLASSES)}")
        wanted += [name for name in met or [each] if name not in wanted]
    for name in due(wanted, [], deadline):
        trial = Trial(name, DEVICE)
        chosen = tuned(name, trial, deadline)
        yield name, chosen and asdict(chosen)
        del trial
        torch.cuda.empty_cache()


def tuned(name: str, trial: Trial, deadline: float) -> SkinnyTuning | None:
    """First the tiles, then whether to start early; right in everything that goes by this name."""
    find = partial(
        best, f"skinny {name}", limit=trial.limit, measure=timed(trial.work), deadline=deadline
    )
    usual = skinny_of(DEVICE, name)
    options = list(dict.fromkeys([usual, None, *candidates(trial)]))
    while (tiles := find(options, trial.check)) is not None:
        whole = partial(trial.check, every=True)
        pair = [tiles, replace(tiles, early=not tiles.early)]
        if (chosen := find([*pair, None], whole)) is not None:
            return chosen
        options.remove(tiles)
    return None
