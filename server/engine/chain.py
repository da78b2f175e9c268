"""The chain: which prefixes of token sequences are known, by a hash over everything before.

A sequence is cut into blocks of BLOCK tokens. The digest of a block is SHA-256 over the digest of
the one before it and its own tokens; that of the root is over what else a state depends on. So a
digest names a whole prefix. A match is verified by the tokens themselves all the same.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeVar

BLOCK = 256
NEIGHBOURS = 64  # of a block, looked at to see where sequences part
GHOSTS = 65_536  # prefixes given up, remembered to tell a miss from a first time


def salt_digest(salt: str) -> str:
    """A salt as files name it."""
    return hashlib.sha256(salt.encode()).hexdigest()


def root_of(fingerprint: str, dtype: str, salt: str) -> bytes:
    """What a sequence begins with: the model, how it computes, and the digest of a salt that keeps
    tenants apart."""
    parts = (hashlib.sha256(part.encode()).digest() for part in (fingerprint, dtype, salt))
    return hashlib.sha256(b"steadystate\0" + b"".join(parts)).digest()


class Chain:
    """Digests of a growing sequence's blocks, each computed once; digests[0] is the root's."""

    def __init__(self, root: bytes, tokens: array[int], digests: list[bytes] | None = None) -> None:
        self.tokens = tokens
        self._digests = [root] if digests is None else list(digests)

    def digest(self, index: int) -> bytes:
        """Of the first `index` whole blocks."""
        while len(self._digests) <= index:
            chunk = self.chunk(len(self._digests) - 1)
            self._digests.append(hashlib.sha256(self._digests[-1] + chunk).digest())
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
        index, rest = divmod(position, BLOCK)
        digest, tail = self.digest(index), self.chunk(index, rest)
        return (_tail(digest, tail) if rest else digest).hex()


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


class Leaf(Protocol):
    """What hangs on a block: something at a position inside the block that follows."""

    @property
    def position(self) -> int: ...


L = TypeVar("L", bound=Leaf)


@dataclass(slots=True, eq=False)
class Block(Generic[L]):
    """A known block: its tokens, the blocks seen after it, and the leaves between."""

    digest: bytes
    tokens: bytes
    parent: Block[L] | None
    children: dict[bytes, Block[L]] = field(default_factory=dict)
    tails: dict[bytes, L] = field(default_factory=dict)  # by the tokens after the block

    def leaf(self, rest: bytes) -> L | None:
        """The farthest leaf that a sequence, which goes on with `rest`, comes by."""
        if self.tails:
            for length in range(len(rest), -1, -4):
                if (leaf := self.tails.get(rest[:length])) is not None:
                    return leaf
        return None


class Tree(Generic[L]):
    """Blocks of all sequences that lead to a leaf; a block without leaf or child is dropped."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, Block[L]] = {}
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def known(self, chain: Chain) -> list[Block[L]]:
        """The longest path of known blocks that a sequence follows, the root first."""
        path: list[Block[L]] = []
        for index in range(len(chain.tokens) // BLOCK + 1):
            block = self.blocks.get(chain.digest(index))
            if block is None or (index and block.tokens != chain.chunk(index - 1)):
                break
            path.append(block)
        return path

    def parting(self, chain: Chain, path: list[Block[L]]) -> int:
        """How many tokens a sequence shares with any other that is known."""
        if not path:
            return 0
        index, last = len(path) - 1, path[-1]
        rest = chain.chunk(index)
        tails = islice(reversed(last.tails), NEIGHBOURS)
        blocks = islice(reversed(last.children.values()), NEIGHBOURS)
        others = [*tails, *(block.tokens for block in blocks)]
        return index * BLOCK + max((common(rest, other) for other in others), default=0)

    def gone(self, chain: Chain, path: list[Block[L]]) -> bool:
        """Whether what follows the known blocks was known once."""
        index = max(0, len(path) - 1)
        rest = chain.chunk(index)
        digest = chain.digest(index)
        following = (_tail(digest, rest[:n]) for n in range(4, len(rest), 4))
        if len(rest) == 4 * BLOCK and chain.digest(index + 1) in self._ghosts:
            return True
        return any(digest in self._ghosts for digest in following)

    def chain(self, block: Block[L], leaf: L) -> Chain:
        """The sequence that leads to a leaf."""
        path = [block]
        while (parent := path[-1].parent) is not None:
            path.append(parent)
        path.reverse()
        tail = next(tail for tail, other in block.tails.items() if other is leaf)
        tokens = array("i", b"".join([*(step.tokens for step in path), tail]))
        return Chain(path[0].digest, tokens, [step.digest for step in path])

    def add(self, chain: Chain, leaf: L) -> Block[L]:
        """Hang a leaf at its position, and the blocks that lead there."""
        index, rest = divmod(leaf.position, BLOCK)
        digests = chain.digests(index)
        at = index
        while at > 0 and digests[at] not in self.blocks:
            at -= 1
        block = self.blocks.get(digests[at])
        if block is None:
            block = self.blocks[digests[0]] = Block(digests[0], b"", None)
        for i in range(at, index):
            child = Block(digests[i + 1], chain.chunk(i), block)
            block.children[child.digest] = self.blocks[child.digest] = child
            block = child
        tail = chain.chunk(index, rest)
        assert tail not in block.tails, f"two leaves at {leaf.position} tokens of one sequence"
        block.tails[tail] = leaf
        return block

    def remove(self, block: Block[L], leaf: L) -> None:
        """Take a leaf away, and the blocks that lead to no other."""
        tail = next(tail for tail, other in block.tails.items() if other is leaf)
        del block.tails[tail]
        self._forget(_tail(block.digest, tail) if tail else block.digest)
        while not block.tails and not block.children:
            del self.blocks[block.digest]
            self._forget(block.digest)
            if block.parent is None:
                break
            del block.parent.children[block.digest]
            block = block.parent

    def _forget(self, digest: bytes) -> None:
        self._ghosts[digest] = None
        self._ghosts.move_to_end(digest)
        if len(self._ghosts) > GHOSTS:
            self._ghosts.popitem(last=False)


def _tail(digest: bytes, tail: bytes) -> bytes:
    return hashlib.sha256(b"tail" + digest + tail).digest()


def common(one: bytes, other: bytes) -> int:
    """How many int32 tokens two byte strings begin with in common."""
    size = min(len(one), len(other)) // 4
    if one[: 4 * size] == other[: 4 * size]:
        return size
    low, high = 0, size  # the first `low` are equal, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        if one[4 * low : 4 * middle] == other[4 * low : 4 * middle]:
            low = middle
        else:
            high = middle
    return low
