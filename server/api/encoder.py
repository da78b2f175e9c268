"""Text to ids in pieces: the ids of the pieces, one after the other, are those of the whole."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

from server.api.cuts import Cuts, without_prepending

WHOLE = 16_384  # characters that are not worth a cut
FIRST = 8_192  # characters of a first piece, encoded in some ten milliseconds; then twice as many
MOST = 65_536  # until they are so many


class Encoder:
    """One way of reading text. `plain`: control tokens' text is text."""

    def __init__(self, backend: Backend, spec: Mapping[str, Any], *, plain: bool = False) -> None:
        self.backend = backend
        self.cuts = Cuts(spec, plain=plain)
        _ = self.cuts.joined  # takes a while for a large vocabulary: not under a request
        self._later = backend
        if self.cuts.prepends:
            self._later = Backend.from_str(json.dumps(without_prepending(spec)))
            self._later.encode_special_tokens = backend.encode_special_tokens
        self.prefix, self.suffix = self._affixes()

    def pieces(self, text: str) -> Iterator[str]:
        """The text, cut where that is safe; the first piece is small."""
        start, size = 0, FIRST if len(text) > WHOLE else WHOLE
        while len(text) - start > size:
            point, reach = None, size
            while point is None and start + reach < len(text):
                point = self.cuts.find(text, start, start + reach)
                reach *= 2  # nowhere around here: the piece becomes longer
            if point is None:
                break
            yield text[start:point]
            start, size = point, min(2 * size, MOST)
        yield text[start:]

    def first(self, text: str) -> array[int]:
        """Ids of a text from its beginning, whole or its first piece, nothing put around it."""
        return encode(self.backend, text)

    def later(self, piece: str) -> array[int]:
        """Ids of any other piece."""
        if not self.cuts.prepends:
            return encode(self.backend, piece)
        added = self.cuts.first_added(piece)  # behind it, the whole has something put there too
        ids = encode(self._later, piece[:added])
        return ids + encode(self.backend, piece[added:]) if added < len(piece) else ids

    def _affixes(self) -> tuple[array[int], array[int]]:
        """What a tokenizer puts before and after a prompt: tokens that begin or end a sequence."""
        probe = encode(self.backend, "a")
        around = encode(self.backend, "a", add_special_tokens=True)
        for start in range(len(around) - len(probe) + 1):
            if around[start : start + len(probe)] == probe:
                return around[:start], around[start + len(probe) :]
        self.cuts.possible = False
        return array("i"), array("i")


def encode(backend: Backend, text: str, *, add_special_tokens: bool = False) -> array[int]:
    """Ids of a text, all at once; other threads may run meanwhile."""
    (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return array("i", encoding.ids)
