"""Reasoning apart from the answer: what a model thinks between <think> and </think>, then says."""

from __future__ import annotations

from typing import Literal

from server.api.stops import overlap

OPEN, CLOSE = "<think>", "</think>"


def opened(text: str) -> bool:
    """Whether a text ends inside a block."""
    return text.rfind(OPEN) > text.rfind(CLOSE)


class Reasoning:
    """Splits a reply as it comes, however it is cut into pieces.

    A reply thinks when it begins with <think>, or when the prompt has opened the block already;
    later tags are text like any other. Blanks next to a tag belong to it. When </think> never
    comes, all is reasoning.
    """

    def __init__(self, *, inside: bool) -> None:
        self.state: Literal["before", "inside", "after"] = "inside" if inside else "before"
        self.end: int | None = None  # characters up to </think> and with it, once it has come
        self._taken = 0
        self._held = ""
        self._begun = False  # whether something other than blanks followed the last tag

    def push(self, text: str) -> tuple[str, str]:
        """More of the reply: what of it is known to be reasoning, and what to be the answer."""
        self._taken += len(text)
        text, self._held = self._held + text, ""
        reasoning = ""
        if self.state == "before":
            start = text.lstrip()
            if start.startswith(OPEN):
                self.state, text = "inside", start[len(OPEN) :]
            elif OPEN.startswith(start):
                self._held = text
                return "", ""
            else:
                self.state, self._begun = "after", True
        if self.state == "inside":
            reasoning, text = self._think(text)
        if self.state == "after" and not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return reasoning, text

    def flush(self) -> tuple[str, str]:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return (held, "") if self.state == "inside" else ("", held)

    def _think(self, text: str) -> tuple[str, str]:
        """Reasoning that is complete, and what follows it; the rest is held back."""
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text) and not CLOSE.startswith(text)
        thought, tag, rest = text.partition(CLOSE)
        if tag:
            self.state, self._begun = "after", False
            self.end = self._taken - len(rest)
            return thought.rstrip(), rest
        thought = text[: len(text) - overlap(text, CLOSE)].rstrip()
        self._held = text[len(thought) :]
        return thought, ""
