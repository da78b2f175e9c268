"""Candidates for a kernel's tuning: the fastest of those that are right, while there is time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from benchmarks.timing import milliseconds

T = TypeVar("T")
Found = Iterator[tuple[str, dict[str, Any] | None]]  # classes and their rows, None for no row
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in norm; NaN where anything is."""
    return float((actual.double() - expected).norm() / expected.norm())


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
