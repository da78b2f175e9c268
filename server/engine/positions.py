"""Positions: where the state of a prompt is kept as it is read. Reading pauses there, but not in
front of a last token that can be taken back.

The end of a prompt is kept one token early, or at the message boundary just before, where the same
prompt finds it too: the logits of its last token must be computed anew.
"""

from __future__ import annotations

from collections.abc import Iterable

LEAST = 32  # tokens that a checkpoint must save
END = 16  # a message boundary so close before the end of a prompt is its end
LEAST_SPACING = 1024
BYTES_A_TOKEN = 1024  # of state, that may be kept for a token read: see spacing()


def spacing(state_bytes: int) -> int:
    """How many tokens of a long prompt lie between checkpoints, a power of two.

    A token is read no faster than some microseconds, 1,024 bytes are copied within some
    nanoseconds: so copies take less than 2 % of the time.
    """
    return 1 << max(LEAST_SPACING, state_bytes // BYTES_A_TOKEN).bit_length() - 1


def grid(start: int, end: int, every: int) -> list[int]:
    """Positions in between, `every` apart, and farther the longer the sequence is: four between n
    and 2 n, so that a long prompt has a number that grows with its logarithm."""
    positions: list[int] = []
    at = start
    while True:
        step = max(every, 1 << max(0, at.bit_length() - 3))
        at = (at // step + 1) * step
        if at >= end:
            return positions
        positions.append(at)


def plan(
    length: int,
    *,
    start: int = 0,
    boundaries: Iterable[int] = (),
    every: int,
    whole: bool = False,
    more: bool = False,
) -> list[int]:
    """Where a prompt leaves a checkpoint as it is read: at its end, at boundaries of messages, and
    every so many tokens.

    All boundaries that are new in a turn are kept; of a long chat that is read at once, those near
    its end, and ever fewer before. `whole`: the end itself, for a prompt that will be gone on with.
    `more`: there will be more boundaries, and `length` is only about where it ends.
    """
    known = sorted(b for b in boundaries if LEAST <= b < length)
    kept = _onwards(known, length) if more else _backwards(known, length, whole)
    marks = sorted(kept)
    between = (
        at for at in grid(start, length, every) if all(abs(at - m) >= every // 4 for m in marks)
    )
    return sorted(p for p in {*marks, *between} if p - start >= LEAST)


def _backwards(known: list[int], length: int, whole: bool) -> list[int]:
    """The end of a prompt, and the boundaries that are kept before it."""
    end = length if whole else length - 1
    if not whole and known and known[-1] >= end - END:
        end = known[-1]
    kept = [end]
    for boundary in reversed(known):
        if kept[-1] - boundary >= max(LEAST, (end - kept[-1]) // 4):
            kept.append(boundary)
    if known and known[0] not in kept and kept[-1] - known[0] >= LEAST:
        kept.append(known[0])
    return kept


def _onwards(known: list[int], length: int) -> list[int]:
    """The boundaries that are kept of a prompt's beginning, whatever comes after."""
    kept: list[int] = []
    for boundary in known:
        if not kept or boundary - kept[-1] >= max(LEAST, (length - boundary) // 4):
            kept.append(boundary)
    return kept
