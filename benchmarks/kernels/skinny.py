"""Products of few rows with what surrounds them, as kernels/tuning.json has it, beside the
library's product and kernels one by one.

The floor is one read of the weights and of the rows, and one write of what comes out.
"""

from __future__ import annotations

import torch

from benchmarks.result import Row
from benchmarks.skinny import CLASSES, Trial
from benchmarks.timing import milliseconds
from kernels.tuning import skinny_of

BEFORE = {"plain": "", "norm": "residual sum and norm, ", "gate": "norm and gate, "}
AFTER = {"": "", "mul": ", halves multiplied", "silu_mul": ", halves multiplied, one by silu"}


def title(trial: Trial) -> str:
    """The work in words."""
    end = ", silu of half" if trial.silu else ", float32" if trial.head else AFTER[trial.pair]
    shape = f"{trial.rows} rows by {trial.N} x {trial.K}"
    return f"{BEFORE[trial.start]}{shape}{end}"


def rows(bandwidth: float, deadline: float) -> list[Row]:
    """The classes of the repository's shapes that one kernel serves on this card."""
    result = []
    device = torch.device("cuda")
    for name in CLASSES:
        tuning = skinny_of(device, name)
        if tuning is None:
            continue
        trial = Trial(name, device)
        work = title(trial)
        wrong = trial.check(tuning)
        if not wrong <= trial.limit:
            raise AssertionError(f"{work}: error {wrong:.1e} > {trial.limit}")
        several = milliseconds(trial.work(None)) / len(trial.weights)
        value = milliseconds(trial.work(tuning)) / len(trial.weights)
        others = {"separate kernels": several}
        floor = trial.bytes / bandwidth * 1e3
        print(f"{work}: {value / floor:.2f}x floor, error {wrong:.1e}, {tuning}")
        result.append(
            Row(work=work, value=value, unit="ms", better="lower", floor=floor, peers=others)
        )
        del trial
        torch.cuda.empty_cache()
    return result
