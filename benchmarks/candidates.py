"""The fastest of some ways to do a work, among those that are right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from benchmarks.timing import milliseconds

T = TypeVar("T")
Found = Iterator[tuple[str, dict[str, Any] | None]]  # shape classes and their rows of the table


def bound(dtype: torch.dtype) -> float:
    """Greatest relative error that a candidate may have."""
    return 1e-5 if dtype == torch.float32 else 4e-3


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in norm; NaN where anything is."""
    return float((actual.double() - expected).norm() / expected.norm())


def best(
    name: str,
    candidates: Iterable[T],
    check: Callable[[T], float],
    limit: float,
    work: Callable[[T], Callable[[], Any]],
) -> T:
    """The fastest of the candidates that are right."""
    times: list[tuple[float, int, T]] = []
    tried = list(candidates)
    for i, candidate in enumerate(tried):
        try:
            wrong = check(candidate)
            if not wrong <= limit:
                print(f"{name}: {candidate} is wrong by {wrong:.1e}")
                continue
            times.append((milliseconds(work(candidate), rounds=5), i, candidate))
        except Exception as failure:  # whatever the compiler says of a candidate, others follow
            print(f"{name}: {candidate} fails: {type(failure).__name__}")
            torch.cuda.synchronize()
    times.sort()
    for milli, _, candidate in times[:3]:
        print(f"{name}: {milli:.4f} ms {candidate}")
    if not times:
        raise SystemExit(f"{name}: no candidate is right")
    return times[0][2]
