"""Where a text may be cut so that the ids of its pieces are the ids of the whole.

The rules come from tokenizer.json. A point between two characters is safe when
- no added token's text touches it,
- normalising the two sides is normalising the whole,
- every pre-tokenizer treats both sides as it would in the whole, as a point between these two
  characters, whatever else there is,
- and one of them always splits there, or no token of a BPE vocabulary spells both characters.
Where that cannot be proved there is no cut, and a tokenizer may allow none at all.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property, lru_cache
from typing import Any, Literal, get_args

from server.api.detokenizer import _byte_alphabet
from server.api.pattern import NotUnderstoodError, Pattern, category

GPT2 = (  # what ByteLevel splits by
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
SHRINKS = 3  # times that composing makes UTF-8 shorter at most, as three jamo to a syllable
PAIRS = 65_536  # of characters that are remembered
NEAR = 4096  # characters in which any two are looked at
TRIES = 64  # points before spaces, and before newlines, that are looked at before that
COMPOSING = ("\u1100", "\u11ff")  # letters that are put together: Hangul jamo

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]

# What a stage does at a point: None, it may treat the sides in another way than the whole; True, it
# always splits there; False, it may not split, but treats both sides as it would in the whole.
Stage = Callable[[str, str], bool | None]


class Cuts:
    """Safe points for one tokenizer, by its tokenizer.json. `possible`: whether there may be any.

    `prepends`: the normalizer puts something before a text, which pieces other than the first one
    must do without; see without_prepending(). `plain`: special tokens' text is read as text.
    """

    def __init__(self, spec: Mapping[str, Any], *, plain: bool = False) -> None:
        self.understood = True
        self.possible = True
        self._drops = False  # something of the text
        self.prepends = False
        self._form: Form | None = None  # of Unicode normalization
        self._replaced: dict[str, str] = {}
        self._only_before_space = False
        self._stages: list[Stage] = []
        self._byte_level = False
        self._model: Mapping[str, Any] = spec["model"]
        self._splits = lru_cache(PAIRS)(self._split)
        tokens = spec["added_tokens"]
        self._strips = any(token["lstrip"] or token["rstrip"] for token in tokens)
        self._reach = max((len(token["content"]) for token in tokens), default=0)
        self._longest_added = max((len(token["content"].encode()) for token in tokens), default=0)
        self._added = _any_text(token["content"] for token in tokens)
        matched = [token for token in tokens if not (plain and token["special"])]
        self._matched = _any_text(token["content"] for token in matched)
        try:
            for part in _members(spec["normalizer"], "normalizers"):
                self._add_normalizer(part)
            for part in _members(spec["pre_tokenizer"], "pretokenizers"):
                self._add_stage(part)
        except NotUnderstoodError:
            self.understood = self.possible = False
        if any(token["normalized"] for token in tokens) and (
            self._form or self._replaced or self.prepends
        ):
            self.possible = False  # their text in a prompt is not what it is searched as
        if self.prepends and matched:
            around = any(token["lstrip"] or token["single_word"] for token in matched)
            self.possible &= not (plain or around)  # they cannot be told apart beforehand
        if self._model.get("dropout"):
            self.possible = False  # the same text has many encodings

    def find(self, text: str, low: int, high: int) -> int | None:
        """The last safe point found in low < point <= high; the search takes bounded time."""
        if not self.possible:
            return None
        for mark in " ", "\n":
            end = high + 1
            for _ in range(TRIES):
                end = text.rfind(mark, low + 1, end)
                if end < 0:
                    break
                if self.safe(text, end):
                    return end
        for point in range(high, max(low, high - NEAR), -1):
            if self.safe(text, point):
                return point
        return None

    def safe(self, text: str, point: int) -> bool:
        """Whether text[:point] and text[point:] have the ids of the text."""
        if not 0 < point < len(text):
            return False
        if not self.possible or not self._splits(text[point - 1], text[point]):
            return False
        around = text[max(0, point - self._reach) : point + self._reach]
        return self._added.search(around) is None

    def first_added(self, text: str) -> int:
        """Where the first added token begins; the text's length if there is none."""
        found = self._matched.search(text)
        return len(text) if found is None else found.start()

    def most_bytes(self) -> int | None:
        """Bytes of text that one token stands for at most; None where that cannot be said."""
        model = self._model
        spells = self._byte_level or model.get("byte_fallback")
        if not self.understood or model["type"] != "BPE" or not spells or self._drops:
            return None
        if self._strips or self._form in ("NFKC", "NFKD"):
            return None  # of what is left out, or shrinks, there may be any amount
        vocab = model["vocab"]
        if self._byte_level:
            longest = max(map(len, vocab))  # a character a byte
        else:
            undone = {new: old for old, new in self._replaced.items()}
            texts = ("".join(undone.get(char, char) for char in token) for token in vocab)
            longest = max(len(text.encode()) for text in texts)
        longest = max(longest, self._longest_added)
        return longest * (SHRINKS if self._form else 1)

    def _split(self, a: str, b: str) -> bool:
        if (self._only_before_space and b != " ") or (self._strips and a.isspace()):
            return False
        if self._form is not None and not (self._apart(a) and self._apart(b)):
            return False
        a, b = self._replaced.get(a, a)[-1], self._replaced.get(b, b)[0]
        for stage in self._stages:
            always = stage(a, b)
            if always is None:
                return False
            if always:
                return True
        return self._never_joined(a, b)

    def _apart(self, char: str) -> bool:
        """Whether normalization leaves a character alone, beside whatever it stands."""
        return (
            category(char) is not None
            and unicodedata.is_normalized(self._form or "NFC", char)
            and not COMPOSING[0] <= char <= COMPOSING[1]
        )

    def _never_joined(self, a: str, b: str) -> bool:
        """Whether no token can hold both characters, or what was unknown on both sides."""
        model = self._model
        if model["type"] != "BPE" or model.get("ignore_merges"):
            return False
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            return False
        if self._byte_level:
            a, b = (
                _stand_in(a.encode(errors="replace")[-1]),
                _stand_in(b.encode(errors="replace")[0]),
            )
        vocab = model["vocab"]
        return a in vocab and b in vocab and a + b not in self.joined

    @cached_property
    def joined(self) -> frozenset[str]:
        """Two characters that stand together in some token of a BPE vocabulary."""
        vocab = self._model["vocab"] if self._model["type"] == "BPE" else ()
        return frozenset(token[at : at + 2] for token in vocab for at in range(len(token) - 1))

    def _add_normalizer(self, part: Mapping[str, Any]) -> None:
        kind = part["type"]
        if kind in get_args(Form) and not self._replaced and not self.prepends:
            if self._form not in (None, kind):
                raise NotUnderstoodError("two forms")
            self._form = kind
        elif kind == "Prepend":
            self.prepends = True
        elif kind == "Replace" and len(part["pattern"].get("String", "")) == 1 and part["content"]:
            of = part["pattern"]["String"]
            if self._replaced:  # the next one would read what this one has written
                raise NotUnderstoodError("several replacements")
            self._replaced[of] = part["content"]
        else:
            raise NotUnderstoodError(kind)

    def _add_stage(self, part: Mapping[str, Any]) -> None:
        kind = part["type"]
        if self._byte_level:
            raise NotUnderstoodError("a stage that reads bytes")
        if kind == "ByteLevel":
            self._byte_level = True
            self._only_before_space |= part["add_prefix_space"]
            if part.get("use_regex", True):
                self._stages.append(_splitting(Pattern(GPT2), isolated=True))
        elif kind == "Split" and not part["invert"]:
            isolated = part["behavior"] == "Isolated"
            self._drops |= part["behavior"] == "Removed"
            pattern = part["pattern"]
            expression = pattern.get("Regex") or re.escape(pattern["String"])
            if "Regex" not in pattern and len(pattern["String"]) != 1:
                raise NotUnderstoodError("a string to split by")
            self._stages.append(_splitting(Pattern(expression), isolated=isolated))
        elif kind == "Digits":
            individual = part["individual_digits"]
            self._stages.append(
                _splitting(Pattern(r"\p{N}" if individual else r"\p{N}+"), isolated=True)
            )
        elif kind == "Metaspace" and not self._stages:
            space = part["replacement"]
            self._only_before_space = True  # before which nothing is put
            if self._replaced not in ({}, {" ": space}):
                raise NotUnderstoodError("other replacements")
            self._replaced[" "] = space
            if part.get("split", True):
                self._stages.append(lambda a, b: True if b == space else None)
        elif kind in ("Whitespace", "WhitespaceSplit"):
            self._drops = True
            self._stages.append(lambda a, b: True if b in " \n" else None)
        else:
            raise NotUnderstoodError(kind)


def without_prepending(spec: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json for pieces other than the first one."""
    kept = [n for n in _members(spec["normalizer"], "normalizers") if n["type"] != "Prepend"]
    normalizer = {"type": "Sequence", "normalizers": kept} if kept else None
    return {**spec, "normalizer": normalizer}


def _splitting(pattern: Pattern, *, isolated: bool) -> Stage:
    """Matches and what lies between become pieces; if not `isolated`, some of these are joined or
    left out, and only points away from all matches are understood."""

    def stage(a: str, b: str) -> bool | None:
        if not pattern.parts(a, b):
            return None
        if isolated:
            return pattern.covers(a) or pattern.covers(b)
        return None if pattern.reads(a) or pattern.reads(b) else False

    return stage


def _members(part: Mapping[str, Any] | None, plural: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [inner for member in part[plural] for inner in _members(member, plural)]
    return [part]


def _any_text(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


@cache
def _stand_in(byte: int) -> str:
    return next(char for char, of in _byte_alphabet().items() if of == byte)
