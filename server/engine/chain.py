"""The chain: prefixes of token sequences, named by a hash over everything before.

A sequence is cut into blocks of BLOCK tokens. The digest of a block is SHA-256 over the digest of
the one before it and its own tokens; that of the root is over what else a state depends on. So a
digest names a whole prefix.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from functools import lru_cache

from server.engine.positions import LEAST

BLOCK = 256
MILESTONES = 64  # between n and 2 n blocks; all of the first 2 MILESTONES are
AHEAD = 64  # blocks whose digests are computed together: whoever asks for one goes on to the next
STONE = 8  # bytes of a digest that a milestone shows


def salt_digest(salt: str) -> str:
    """A salt as files name it."""
    return hashlib.sha256(salt.encode()).hexdigest()


@lru_cache(maxsize=256)
def root_of(identity: str, salt: str) -> bytes:
    """What a sequence begins with: the model and how it computes (Capacity.identity), and the
    digest of a salt that keeps tenants apart."""
    parts = (hashlib.sha256(part.encode()).digest() for part in (identity, salt))
    return hashlib.sha256(b"steadystate\0" + b"".join(parts)).digest()


class Chain:
    """Digests of a growing sequence's blocks, each computed once; digests[0] is the root's."""

    def __init__(self, root: bytes, tokens: array[int], digests: list[bytes] | None = None) -> None:
        self.tokens = tokens
        self._digests = [root] if digests is None else list(digests)
        self._keys: dict[int, str] = {}
        self._head = b""

    @property
    def known(self) -> int:
        """Of how many blocks the digests are known."""
        return len(self._digests) - 1

    @property
    def head(self) -> bytes:
        """The root and the first LEAST tokens, or as many as there are."""
        if self._head:
            return self._head
        head = self._digests[0] + self.chunk(0, LEAST)
        if len(self.tokens) >= LEAST:
            self._head = head
        return head

    def digest(self, index: int) -> bytes:
        """Of the first `index` whole blocks."""
        if self.known < index:
            last, size = self._digests[-1], 4 * BLOCK
            end = max(index, min(index + AHEAD, len(self.tokens) // BLOCK))
            with memoryview(self.tokens) as ids, ids.cast("B") as data:
                for at in range(self.known * size, end * size, size):
                    hashed = hashlib.sha256(last)
                    hashed.update(data[at : at + size])
                    last = hashed.digest()
                    self._digests.append(last)
        return self._digests[index]

    def digests(self, index: int) -> list[bytes]:
        """Those of the first `index` blocks, the root's before them."""
        self.digest(index)
        return self._digests[: index + 1]

    def chunk(self, index: int, length: int = BLOCK) -> bytes:
        """The first `length` tokens, or as many as there are, of the block after `index` blocks."""
        return self.tokens[index * BLOCK : index * BLOCK + length].tobytes()

    def within(self, index: int, most: int) -> bytes:
        """The tokens of the block after `index` blocks, up to position `most`."""
        return self.chunk(index, max(0, min(BLOCK, most - index * BLOCK)))

    def key(self, position: int) -> str:
        """The name of the prefix of so many tokens, in hexadecimal."""
        key = self._keys.get(position)
        if key is None:
            index, rest = divmod(position, BLOCK)
            digest, tail = self.digest(index), self.chunk(index, rest)
            key = self._keys[position] = (tail_digest(digest, tail) if rest else digest).hex()
        return key


def milestone(blocks: int) -> tuple[int, int]:
    """The last milestone within so many blocks: its number, and after how many blocks it stands.
    Milestones are the same for all sequences."""
    shift = max(0, blocks.bit_length() - MILESTONES.bit_length())
    return (blocks >> shift) + MILESTONES * shift, blocks >> shift << shift


def trail(chain: Chain, blocks: int) -> bytes:
    """The beginnings of the digests at all milestones within so many blocks: enough to tell where
    a sequence leads without its tokens."""
    at, stones = 0, []
    while at <= blocks:
        stones.append(chain.digest(at)[:STONE])
        at += 1 << max(0, at.bit_length() - MILESTONES.bit_length())
    return b"".join(stones)


def shared(one: Chain, other: Chain) -> int:
    """How many tokens two sequences of one root begin with in common."""
    low, high = 0, min(len(one.tokens), len(other.tokens)) // BLOCK
    while low < high:
        middle = (low + high + 1) // 2
        if one.digest(middle) == other.digest(middle):
            low = middle
        else:
            high = middle - 1
    if one.digest(low) != other.digest(low):
        return 0
    return low * BLOCK + common(one.chunk(low), other.chunk(low))


def leads(one: Chain, other: Chain) -> bool:
    """Whether a sequence begins with all of another's tokens."""
    if len(other.tokens) < len(one.tokens):
        return False
    index, rest = divmod(len(one.tokens), BLOCK)
    same = one.digest(index) == other.digest(index)
    return same and one.chunk(index, rest) == other.chunk(index, rest)


def tail_digest(digest: bytes, tail: bytes) -> bytes:
    """Of a whole block and tokens after it that do not fill another."""
    return hashlib.sha256(b"tail" + digest + tail).digest()


def tail_digests(digest: bytes, tail: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """Of a whole block and the beginnings of a tail that have so many bytes."""
    hashed, at = hashlib.sha256(b"tail" + digest), 0
    for size in sorted(size for size in sizes if size <= len(tail)):
        hashed.update(tail[at:size])
        at = size
        yield hashed.copy().digest()


def common(one: bytes, other: bytes) -> int:
    """How many int32 tokens two byte strings begin with in common."""
    size = min(len(one), len(other)) // 4
    if one[: 4 * size] == other[: 4 * size]:
        return size
    low, high = 0, 1  # the first `low` are equal, the first `high` are not
    while one[: 4 * high] == other[: 4 * high]:
        low, high = high, min(2 * high, size)
    while high - low > 1:
        middle = (low + high) // 2
        if one[4 * low : 4 * middle] == other[4 * low : 4 * middle]:
            low = middle
        else:
            high = middle
    return low
