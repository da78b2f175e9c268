"""What a tokenizer's split pattern can match across two characters, proved from the pattern itself.

A regular expression becomes positions (one for each place where it reads a character) and the
positions that may follow each (V. M. Glushkov, 1961). Where no position that reads `a` is followed
by one that reads `b`, no match holds both. Of whatever is not understood nothing is claimed.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

Reads = Callable[[str], bool | None]  # whether a character is read; None: that is not sure

PLAIN_CONTROLS = "\t\n\r"
MOST_COPIES = 16  # of what is counted in braces


class NotUnderstoodError(ValueError):
    """The pattern has something of which nothing can be claimed."""


@cache
def category(char: str) -> str | None:
    """The general category where every version of Unicode agrees on it; controls, formats and marks
    are left out, because engines differ about them."""
    now = unicodedata.category(char)
    if now != unicodedata.ucd_3_2_0.category(char) or now[0] in "CM":
        return now if char in PLAIN_CONTROLS else None
    return now


@dataclass(slots=True, eq=False)
class Position:
    """A place that reads a character, or, if `ahead`, looks at it and fails or not."""

    reads: Reads
    ahead: bool = False
    follow: set[Position] = field(default_factory=set)


@dataclass(slots=True)
class Part:
    """A part of the expression: may it match nothing, and where does it begin and end."""

    empty: bool
    first: set[Position] = field(default_factory=set)
    last: set[Position] = field(default_factory=set)


class Pattern:
    """Claims about an expression. Raises NotUnderstoodError."""

    def __init__(self, expression: str) -> None:
        self._all = _Parser(expression, sure=False)
        self._sure = _Parser(expression, sure=True)

    def parts(self, a: str, b: str) -> bool:
        """Whether matches before a point between `a` and `b` and matches after it are the same if
        the text ends, or begins, at this point; then no match holds both."""
        for position in self._all.positions:
            if position.ahead or position.reads(a) is False:
                continue
            if any(follower.reads(b) is not False for follower in position.follow):
                return False
        return True

    def covers(self, char: str) -> bool:
        """Whether no such character is ever left outside of all matches."""
        whole = self._sure.whole
        return any(position.reads(char) is True for position in whole.first & whole.last)

    def reads(self, char: str) -> bool:
        """Whether a match may hold such a character."""
        return any(p.reads(char) is not False for p in self._all.positions if not p.ahead)


class _Parser:
    """Recursive descent. With `sure`, only what is certain to match is kept: a path that looks
    ahead, or that may not be tried again, counts for nothing."""

    def __init__(self, expression: str, *, sure: bool) -> None:
        self._text = expression
        self._at = 0
        self._sure = sure
        self._folded = False
        self.positions: list[Position] = []
        self.whole = self._alternatives()
        if self._at < len(self._text):
            raise NotUnderstoodError(f"{expression!r} at {self._at}")
        if self.whole.empty and not sure:
            raise NotUnderstoodError(f"{expression!r} may match nothing")

    def _alternatives(self) -> Part:
        part = self._sequence()
        while self._take("|"):
            other = self._sequence()
            part = Part(part.empty or other.empty, part.first | other.first, part.last | other.last)
        return part

    def _sequence(self) -> Part:
        part = Part(True)
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            part = _joined(part, self._quantified())
        return part

    def _quantified(self) -> Part:
        start = self._at
        part = self._atom()
        end = self._at
        while self._at < len(self._text):
            if self._take("*"):
                part = self._loop(part, empty=True)
            elif self._take("+"):
                part = self._loop(part, empty=part.empty)
            elif self._take("?"):
                part = Part(True, part.first, part.last)
            elif self._text[self._at] == "{":
                part = self._counted(part, start, end)
            else:
                break
            if self._take("?"):
                continue  # lazy: the same matches are possible
            if self._take("+"):  # possessive, or once more a loop: more is assumed to be possible
                part = self._loop(part, empty=part.empty)
                if self._sure:
                    part = Part(False)
        return part

    def _loop(self, part: Part, *, empty: bool) -> Part:
        for position in part.last:
            position.follow |= part.first
        return Part(empty, part.first, part.last)

    def _counted(self, part: Part, start: int, end: int) -> Part:
        """X{n}, X{n,}, X{n,m}: so many copies, each parsed anew for positions of its own."""
        close = self._text.find("}", self._at)
        low, comma, high = self._text[self._at + 1 : close].partition(",")
        least = int(low) if low.isdecimal() else -1
        most = int(high) if high.isdecimal() else least
        if close < 0 or not 0 <= least <= most <= MOST_COPIES or (high and not high.isdecimal()):
            raise NotUnderstoodError(f"a count in {self._text!r}")
        whole = Part(True)
        for number in range(max(most, 1)):
            if number:
                self._at = start
                part = self._atom()
                assert self._at == end
            if comma and not high and number == max(most, 1) - 1:
                part = self._loop(part, empty=part.empty)
            optional = number >= least
            whole = _joined(whole, Part(part.empty or optional, part.first, part.last))
        self._at = close + 1
        return whole

    def _atom(self) -> Part:
        if self._take("(?:"):
            return self._group(self._folded)
        if self._take("(?i:"):
            return self._group(True)
        for opening, wanted in (("(?=", True), ("(?!", False)):
            if self._take(opening):
                return self._ahead(wanted)
        if self._text.startswith("(?", self._at):
            raise NotUnderstoodError(f"a group in {self._text!r}")
        if self._take("("):
            return self._group(self._folded)
        return self._read(self._single())

    def _group(self, folded: bool) -> Part:
        before, self._folded = self._folded, folded
        part = self._alternatives()
        self._folded = before
        self._expect(")")
        return part

    def _ahead(self, wanted: bool) -> Part:
        """One character only. At the end of the text there is none, and so it must be as if `b`
        were not of its kind, which is what reads() of this position says."""
        reads = self._single()
        self._expect(")")
        if self._sure:
            return Part(False)
        position = Position(reads, ahead=True)
        self.positions.append(position)
        return Part(True, {position}, {position})

    def _read(self, reads: Reads) -> Part:
        position = Position(reads)
        self.positions.append(position)
        return Part(False, {position}, {position})

    def _single(self) -> Reads:
        if self._take("["):
            return self._folding_class(self._class())
        char = self._next()
        if char == "\\":
            return self._escape()
        if char == ".":
            return lambda c: c != "\n" or None
        if char in "^$*+?{":
            raise NotUnderstoodError(f"{char!r} in {self._text!r}")
        return self._literal(char)

    def _class(self) -> Reads:
        negated = self._take("^")
        members: list[Reads] = []
        while not self._take("]"):
            if self._text.startswith(("[", "&&"), self._at):
                raise NotUnderstoodError(f"a class in {self._text!r}")
            char = self._next()
            if char == "\\":
                code = self._text[self._at]
                if code.isalpha() and code not in "nrtux":
                    members.append(self._escape())
                    continue
                char = self._escaped_char()
            end = char
            if not self._text.startswith("-]", self._at) and self._take("-"):
                end = self._next()
                if end == "[":
                    raise NotUnderstoodError(f"a range in {self._text!r}")
                if end == "\\":
                    end = self._escaped_char()
            members.append(_range(char, end))
        if not members:
            raise NotUnderstoodError(f"an empty class in {self._text!r}")
        return _any_of(members, negated)

    def _escape(self) -> Reads:
        code = self._text[self._at]
        if code in "pP":
            self._at += 1
            self._expect("{")
            end = self._text.find("}", self._at)
            name = self._text[self._at : end]
            self._at = end + 1
            negated = (code == "P") != name.startswith("^")
            return self._folding_class(_any_of([_property(name.removeprefix("^"))], negated))
        if code in "sSdDwW":
            self._at += 1
            kinds = {"s": _space, "d": _digit, "w": _word}
            return self._folding_class(_any_of([kinds[code.lower()]], code.isupper()))
        return self._literal(self._escaped_char())

    def _escaped_char(self) -> str:
        code = self._next()
        if code in "nrt":
            return {"n": "\n", "r": "\r", "t": "\t"}[code]
        if code == "u":
            self._at += 4
            return chr(int(self._text[self._at - 4 : self._at], 16))
        if code == "x" and self._take("{"):
            end = self._text.find("}", self._at)
            char = chr(int(self._text[self._at : end], 16))
            self._at = end + 1
            return char
        if code.isalnum():  # anchors, borders, references
            raise NotUnderstoodError(f"\\{code} in {self._text!r}")
        return code

    def _literal(self, char: str) -> Reads:
        if not self._folded:
            return lambda c: c == char

        def reads(c: str) -> bool | None:
            if c == char:
                return True
            folded = c.casefold()
            return None if len(folded) > 1 or folded == char.casefold() else False

        return reads

    def _folding_class(self, reads: Reads) -> Reads:
        if not self._folded:
            return reads
        return lambda c: None if c.lower() != c.upper() else reads(c)

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise NotUnderstoodError(f"{self._text!r} ends too early")
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _expect(self, text: str) -> None:
        if not self._take(text):
            raise NotUnderstoodError(f"{self._text!r} lacks {text!r} at {self._at}")


def _joined(a: Part, b: Part) -> Part:
    for position in a.last:
        position.follow |= b.first
    return Part(
        a.empty and b.empty,
        a.first | b.first if a.empty else a.first,
        a.last | b.last if b.empty else b.last,
    )


def _any_of(members: list[Reads], negated: bool) -> Reads:
    def reads(char: str) -> bool | None:
        found: bool | None = False
        for member in members:
            one = member(char)
            if one:
                return not negated
            if one is None:
                found = None
        return found if found is None else negated

    return reads


def _range(low: str, high: str) -> Reads:
    return lambda char: low <= char <= high


def _property(name: str) -> Reads:
    """A general category or its first letter; scripts and the rest are not known here."""
    known = len(name) in (1, 2) and name[0] in "LMNPSZ"

    def reads(char: str) -> bool | None:
        of = category(char)
        return None if of is None or not known else of.startswith(name)

    return reads


def _space(char: str) -> bool | None:
    of = category(char)
    return None if of is None else of[0] == "Z" or char in PLAIN_CONTROLS


def _digit(char: str) -> bool | None:
    of = category(char)
    return None if of is None else of == "Nd"


def _word(char: str) -> bool | None:
    of = category(char)
    if of is None or of in ("Nl", "No", "So", "Sk"):
        return None
    return of[0] == "L" or of in ("Nd", "Pc")
