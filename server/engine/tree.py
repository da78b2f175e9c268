"""The tree: which prefixes lead to something that is kept, and how far a sequence follows them.

What hangs in the tree, a leaf, is found by the digests of a chain. A match is verified by the
tokens themselves all the same.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from server.engine.chain import BLOCK, Chain, common, tail_digest

GHOSTS = 65_536  # prefixes given up, remembered to tell a miss from a first time


class Leaf(Protocol):
    """What hangs on a block: something at a position inside the block that follows."""

    @property
    def position(self) -> int: ...


L = TypeVar("L", bound=Leaf)


@dataclass(slots=True, eq=False)
class Block(Generic[L]):
    """A known block: its tokens, what was seen after it, and the leaves between it and the next.

    `after` has the tokens of the next blocks and of the tails that end in a leaf, sorted.
    """

    digest: bytes
    tokens: bytes
    parent: Block[L] | None
    after: list[bytes] = field(default_factory=list)
    tails: dict[bytes, L] = field(default_factory=dict)  # by the tokens after the block

    def leaf(self, rest: bytes) -> L | None:
        """The farthest leaf that a sequence, which goes on with `rest`, comes by."""
        if self.tails:
            for length in range(len(rest), -1, -4):
                if (leaf := self.tails.get(rest[:length])) is not None:
                    return leaf
        return None

    def drop(self, tokens: bytes) -> None:
        """Forget that these tokens come next."""
        del self.after[bisect_left(self.after, tokens)]


@dataclass(slots=True)
class Walk(Generic[L]):
    """How far a growing sequence was followed, so that it is not followed from the beginning again:
    the known blocks on its way, the root first, and the farthest leaf up to a position."""

    path: list[Block[L]] = field(default_factory=list)
    found: L | None = None
    most: int = 0
    changes: int = -1  # of the tree, when it was looked at last


class Tree(Generic[L]):
    """Blocks of all sequences that lead to a leaf; a block without leaf or child is dropped."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, Block[L]] = {}
        self.changes = 0
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    def find(self, chain: Chain, walk: Walk[L], most: int) -> L | None:
        """The farthest leaf up to a position that a sequence comes by. Takes time by how much has
        been added to the sequence, unless leaves came or went meanwhile."""
        if (walk.changes, walk.most) == (self.changes, most):
            return walk.found
        self._follow(chain, walk.path)
        start = 0
        if walk.changes == self.changes and walk.most <= most:
            start = walk.most // BLOCK
        else:
            walk.found = None
        walk.changes, walk.most = self.changes, most
        for index in range(min(len(walk.path) - 1, most // BLOCK), start - 1, -1):
            if walk.path[index].tails:
                leaf = walk.path[index].leaf(chain.within(index, most))
                if leaf is not None:
                    walk.found = leaf
                    break
        return walk.found

    def parting(self, chain: Chain, walk: Walk[L]) -> int:
        """How many tokens a sequence shares with any other that is known."""
        self._follow(chain, walk.path)
        if not walk.path:
            return 0
        index, after = len(walk.path) - 1, walk.path[-1].after
        rest = chain.chunk(index)
        at = bisect_left(after, rest)  # those that have most in common are next to it
        return index * BLOCK + max((common(rest, o) for o in after[max(0, at - 1) : at + 1]),
                                   default=0)  # fmt: skip

    def goes_on(self, chain: Chain, walk: Walk[L], least: int) -> bool:
        """Whether all of a sequence leads on to a leaf of at least so many tokens, at its end or
        farther."""
        self._follow(chain, walk.path)
        index = len(chain.tokens) // BLOCK
        if len(walk.path) <= index:
            return False
        after, rest = walk.path[index].after, chain.chunk(index)
        for at in range(bisect_left(after, rest), len(after)):
            if not after[at].startswith(rest):
                break
            if index * BLOCK + len(after[at]) // 4 >= least:
                return True
        return False

    def gone(self, chain: Chain, index: int, most: int) -> bool:
        """Whether what follows so many blocks, up to a position, was known once."""
        rest = chain.within(index, most)
        digest = chain.digest(index)
        if len(rest) == 4 * BLOCK and chain.digest(index + 1) in self._ghosts:
            return True
        following = (tail_digest(digest, rest[:n]) for n in range(4, len(rest) + 1, 4))
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
            insort(block.after, child.tokens)
            self.blocks[child.digest] = block = child
        tail = chain.chunk(index, rest)
        assert tail not in block.tails, f"two leaves at {leaf.position} tokens of one sequence"
        block.tails[tail] = leaf
        insort(block.after, tail)
        self.changes += 1
        return block

    def remove(self, block: Block[L], leaf: L) -> None:
        """Take a leaf away, and the blocks that lead to no other."""
        self.changes += 1
        tail = next(tail for tail, other in block.tails.items() if other is leaf)
        del block.tails[tail]
        block.drop(tail)
        self._forget(tail_digest(block.digest, tail) if tail else block.digest)
        while not block.after:
            del self.blocks[block.digest]
            self._forget(block.digest)
            if block.parent is None:
                break
            block.parent.drop(block.tokens)
            block = block.parent

    def miss(self, chain: Chain, position: int) -> None:
        """Remember a prefix for which there was no room as one that was given up."""
        index, rest = divmod(position, BLOCK)
        if rest:
            self._forget(tail_digest(chain.digest(index), chain.chunk(index, rest)))
        while index and (digest := chain.digest(index)) not in self.blocks:
            if digest in self._ghosts:
                break
            self._forget(digest)
            index -= 1

    def _follow(self, chain: Chain, path: list[Block[L]]) -> None:
        """Go on along known blocks, from where the path still stands. A block goes after those
        that follow it, so that what is left of a path is whole."""
        while path and self.blocks.get(path[-1].digest) is not path[-1]:
            path.pop()
        for index in range(len(path), len(chain.tokens) // BLOCK + 1):
            block = self.blocks.get(chain.digest(index))
            if block is None or (index and block.tokens != chain.chunk(index - 1)):
                break
            path.append(block)

    def _forget(self, digest: bytes) -> None:
        self._ghosts[digest] = None
        self._ghosts.move_to_end(digest)
        if len(self._ghosts) > GHOSTS:
            self._ghosts.popitem(last=False)
