"""Ids to text as they come: whole characters only, and the pieces joined are the text of the whole.

Byte-level vocabularies are decoded exactly, by bytes; others by decoding a short window again.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from tokenizers import Tokenizer as Backend

HELD = 8  # tokens that an unfinished character may hold back where bytes are not known
UNFINISHED = "\ufffd"


class Detokenizer(Protocol):
    """Text of one sequence."""

    def push(self, token: int) -> str:
        """What one more token completes."""
        ...

    def flush(self) -> str:
        """What is left at the end; half a character becomes U+FFFD."""
        ...


class ByteDetokenizer:
    """For vocabularies whose tokens are bytes. Bytes that are no UTF-8 become U+FFFD at once."""

    def __init__(self, vocabulary: ByteVocabulary, skipped: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        return self._decoder.decode(self._vocabulary[token])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class PrefixDetokenizer:
    """For any vocabulary: decode the tokens since the last emission with and without the new ones.

    `context` are the last tokens of the prompt, after which a leading space is kept.
    """

    def __init__(
        self, backend: Backend, skipped: frozenset[int], context: Sequence[int] = ()
    ) -> None:
        self._backend = backend
        self._skipped = skipped
        self._window = [token for token in context if token not in skipped]
        self._read = len(self._window)

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        self._window.append(token)
        text = self._new()
        if text.endswith(UNFINISHED) and len(self._window) - self._read < HELD:
            return ""
        return self._emit(text) if text else ""

    def flush(self) -> str:
        return self._emit(self._new())

    def _new(self) -> str:
        before = self._decode(self._window[: self._read])
        return self._decode(self._window)[len(before) :]

    def _emit(self, text: str) -> str:
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return text

    def _decode(self, tokens: list[int]) -> str:
        return self._backend.decode(tokens, skip_special_tokens=False)


class ByteVocabulary:
    """The bytes of each id of a byte-level tokenizer; ids that it does not know are empty."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._bytes: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = _unmap(self._backend.id_to_token(token) or "")
        return known


def _unmap(text: str) -> bytes:
    """A token's bytes; a token with a character outside of the byte alphabet stands for itself."""
    alphabet = _byte_alphabet()
    try:
        return bytes(alphabet[char] for char in text)
    except KeyError:
        return text.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: visible Latin-1 is itself, the rest counts from U+0100."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    stand_ins = {chr(0x100 + index): byte for index, byte in enumerate(hidden)}
    return {chr(byte): byte for byte in visible} | stand_ins
