"""The tree: which prefixes lead to something that is kept, and how far a sequence follows them.

What hangs in the tree, a leaf, is found by the digests of a chain. A match is verified by the
tokens themselves all the same.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right, insort
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from server.engine.chain import BLOCK, Chain, common, tail_digest, tail_digests

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
        at = bisect_right(self.after, rest) if self.tails else 0
        while at:  # what the sequence comes by is no farther than what it has in common with this
            before = self.after[at - 1]
            size = 4 * common(rest, before)
            if size == len(before):
                if (leaf := self.tails.get(before)) is not None:
                    return leaf
                size -= 4  # a whole block that comes next
            rest = rest[:size]
            at = bisect_right(self.after, rest, 0, at)
        return None

    def drop(self, tokens: bytes) -> None:
        """Forget that these tokens come next."""
        del self.after[bisect_left(self.after, tokens)]


@dataclass(slots=True, frozen=True)
class Way(Generic[L]):
    """The blocks that lead to a leaf, the root first, and the tokens after them: as they were when
    it was taken, whatever becomes of the tree."""

    blocks: list[Block[L]]
    tail: bytes

    def chain(self) -> Chain:
        """The sequence. Any thread may ask, and take its time over a long one."""
        tokens = array("i", b"".join([*(block.tokens for block in self.blocks), self.tail]))
        return Chain(self.blocks[0].digest, tokens, [block.digest for block in self.blocks])


@dataclass(slots=True)
class Walk(Generic[L]):
    """How far a growing sequence was followed, so that it is not followed from the beginning again:
    the last known block on its way, how many there are with the root, and the farthest leaf up to a
    position."""

    block: Block[L] | None = None
    count: int = 0
    found: L | None = None
    most: int = 0
    changes: int = -1  # of the tree, when it was looked at last


class Tree(Generic[L]):
    """Blocks of all sequences that lead to a leaf; a block without leaf or child is dropped."""

    def __init__(self) -> None:
        self.blocks: dict[bytes, Block[L]] = {}
        self.changes = 0
        self._tails: dict[L, bytes] = {}
        self._ghosts: OrderedDict[bytes, tuple[bytes, int] | None] = OrderedDict()
        self._ends: dict[bytes, Counter[int]] = {}  # bytes of tails given up, by their beginnings

    def find(self, chain: Chain, walk: Walk[L], most: int) -> L | None:
        """The farthest leaf up to a position that a sequence comes by. Takes time by how much has
        been added to the sequence, unless leaves came or went meanwhile."""
        if (walk.changes, walk.most) == (self.changes, most):
            return walk.found
        self._follow(chain, walk)
        start = 0
        if walk.changes == self.changes and walk.most <= most:
            start = walk.most // BLOCK
        else:
            walk.found = None
        walk.changes, walk.most = self.changes, most
        block, index = walk.block, walk.count - 1
        while block is not None and index >= start:
            if block.tails and index <= most // BLOCK:
                leaf = block.leaf(chain.within(index, most))
                if leaf is not None:
                    walk.found = leaf
                    break
            block, index = block.parent, index - 1
        return walk.found

    def parting(self, chain: Chain, walk: Walk[L]) -> int:
        """How many tokens a sequence shares with any other that is known."""
        self._follow(chain, walk)
        if walk.block is None:
            return 0
        index, after = walk.count - 1, walk.block.after
        rest = chain.chunk(index)
        at = bisect_left(after, rest)  # those that have most in common are next to it
        return index * BLOCK + max((common(rest, o) for o in after[max(0, at - 1) : at + 1]),
                                   default=0)  # fmt: skip

    def goes_on(self, chain: Chain, walk: Walk[L], least: int) -> bool:
        """Whether all of a sequence leads on to a leaf of at least so many tokens, at its end or
        farther."""
        self._follow(chain, walk)
        index = len(chain.tokens) // BLOCK
        if walk.block is None or walk.count <= index:
            return False
        after, rest = walk.block.after, chain.chunk(index)
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
        sizes = self._ends.get(_beginning(digest, rest), ())
        return any(digest in self._ghosts for digest in tail_digests(digest, rest, sizes))

    def way(self, block: Block[L], leaf: L) -> Way[L]:
        """What leads to a leaf."""
        path, step = [block], block.parent
        while step is not None:
            path.append(step)
            step = step.parent
        path.reverse()
        return Way(path, self._tails[leaf])

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
        self._tails[leaf] = tail
        insort(block.after, tail)
        self.changes += 1
        return block

    def remove(self, block: Block[L], leaf: L) -> None:
        """Take a leaf away, and the blocks that lead to no other."""
        self.changes += 1
        tail = self._tails.pop(leaf)
        del block.tails[tail]
        block.drop(tail)
        self._forget(block.digest, tail)
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
            self._forget(chain.digest(index), chain.chunk(index, rest))
        while index and (digest := chain.digest(index)) not in self.blocks:
            if digest in self._ghosts:
                break
            self._forget(digest)
            index -= 1

    def _follow(self, chain: Chain, walk: Walk[L]) -> None:
        """Go on along known blocks, from where the way still stands. A block goes after those
        that follow it, so that what is left of a way is whole.

        A chain that was taken from the tree has the very digests of its blocks, and their tokens:
        as far as those go there is nothing to compute and to compare.
        """
        while walk.block is not None and self.blocks.get(walk.block.digest) is not walk.block:
            walk.block, walk.count = walk.block.parent, walk.count - 1
        if walk.block is None and chain.known:
            block = self.blocks.get(chain.digest(chain.known))
            if block is not None and block.digest is chain.digest(chain.known):
                walk.block, walk.count = block, chain.known + 1
        last = walk.block
        for index in range(walk.count, len(chain.tokens) // BLOCK + 1):
            block = self.blocks.get(chain.digest(index))
            if block is None or (index and block.tokens != chain.chunk(index - 1)):
                break
            last, walk.count = block, index + 1
        walk.block = last

    def _forget(self, digest: bytes, tail: bytes = b"") -> None:
        """Remember that a block, or one and what follows it, was given up."""
        name = tail_digest(digest, tail) if tail else digest
        if name in self._ghosts:
            self._ghosts.move_to_end(name)
            return
        end = self._ghosts[name] = (_beginning(digest, tail), len(tail)) if tail else None
        if end is not None:
            self._ends.setdefault(end[0], Counter())[end[1]] += 1
        if len(self._ghosts) > GHOSTS:
            _, end = self._ghosts.popitem(last=False)
            if end is not None:
                sizes = self._ends[end[0]]
                sizes[end[1]] -= 1
                if not sizes[end[1]]:
                    del sizes[end[1]]
                if not sizes:
                    del self._ends[end[0]]


def _beginning(digest: bytes, tail: bytes) -> bytes:
    """By which tails are told apart at once: the block before them and their first token."""
    return digest + tail[:4]
