"""Lists of tensor names, written short: numbers that differ become ranges."""

from __future__ import annotations

import re
from collections.abc import Iterable

NUMBER = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")  # without leading zeros


def folded(names: Iterable[str]) -> list[str]:
    """All names, those that differ in numbers only as one: `layers.{0-3,5}.experts.{0-31}.w1`.

    Every name that is given, and no other, is one of those that the result spells.
    """
    parts = [NUMBER.split(name) for name in names]
    numbers = [[int(n) for n in NUMBER.findall(name)] for name in names]
    rows: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for part, number in zip(parts, numbers, strict=True):
        rows.setdefault(tuple(part), set()).add(tuple(number))
    return [
        "".join(text + range_ for text, range_ in zip(texts, [*ranges, ""], strict=True))
        for texts, found in rows.items()
        for ranges in _boxes(found)
    ]


def _boxes(rows: set[tuple[int, ...]]) -> list[list[str]]:
    """Rows of numbers as lists of ranges whose products are disjoint and make up the rows."""
    if rows == {()}:
        return [[]]
    by_tail: dict[tuple[int, ...], set[int]] = {}
    for row in rows:
        by_tail.setdefault(row[1:], set()).add(row[0])
    by_first: dict[frozenset[int], set[tuple[int, ...]]] = {}
    for tail, firsts in by_tail.items():
        by_first.setdefault(frozenset(firsts), set()).add(tail)
    return [
        [_ranges(firsts), *rest] for firsts, tails in by_first.items() for rest in _boxes(tails)
    ]


def _ranges(numbers: Iterable[int]) -> str:
    """{1,2,3,5} as "{1-3,5}"; one number as itself."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)
    return text if text.isdigit() else f"{{{text}}}"
