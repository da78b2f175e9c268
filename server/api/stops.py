"""Stop strings: text goes through until one is complete; what may become one is held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the stop string that is complete first, however the text is cut into pieces.

    Of two that end at the same character, the longer one counts.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        assert all(stops), "an empty stop string"
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that may go out now, and the stop string that was found, if one was."""
        window = self._held + text
        found: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = window.find(stop)
            if start >= 0:
                hit = (start + len(stop), start, stop)
                found = hit if found is None else min(found, hit)
        if found is not None:
            end, start, stop = found
            self._held = ""
            return window[: end if self._include else start], stop
        keep = max((overlap(window, stop) for stop in self._stops), default=0)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep], None

    def flush(self) -> str:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, tag: str) -> int:
    """Length of the longest end of the text that is a proper beginning of the tag."""
    start = max(0, len(text) - len(tag) + 1)
    while (start := text.find(tag[0], start)) >= 0:
        if tag.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
