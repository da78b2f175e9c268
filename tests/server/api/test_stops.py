"""Stop strings are found however the text is cut, and what is no stop string goes out."""

from __future__ import annotations

import itertools

from hypothesis import example, given
from hypothesis import strategies as st

from server.api.stops import StopStrings

LETTERS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    holder, out = StopStrings(stops, include=include), ""
    for piece in pieces:
        text, found = holder.push(piece)
        out += text
        if found is not None:
            return out, found
    return out + holder.flush(), None


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Letter by letter: the first end at which a stop string is complete, the longest there."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(LETTERS, STOPS, st.lists(st.integers(0, 30), max_size=8), st.booleans())
@example("aab", ["ab", "b"], [1, 2], False)
@example("abab", ["abb", "ba"], [2], True)
def test_any_cut_gives_the_same(
    text: str, stops: list[str], places: list[int], include: bool
) -> None:
    assert run(cut(text, places), stops, include) == naive(text, stops, include)


@given(LETTERS, STOPS)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, stops: list[str]) -> None:
    holder, out = StopStrings(stops), ""
    for position, letter in enumerate(text, 1):
        new, found = holder.push(letter)
        out += new
        if found is not None:
            return
        held = text[len(out) : position]
        assert out + held == text[:position]
        assert not held or any(stop.startswith(held) for stop in stops)
