"""The chain and the tree: digests name prefixes, leaves are found by them, nothing is left over."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest

from server.engine.chain import BLOCK, Chain, common, root_of, shared, tail_digest
from server.engine.tree import Block, Tree, Walk

ROOT = root_of("model", "")


@dataclass(eq=False)
class Leaf:
    position: int


def chain(tokens: list[int], root: bytes = ROOT) -> Chain:
    return Chain(root, array("i", tokens))


def numbers(count: int, seed: int = 0) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(1000) for _ in range(count)]


@pytest.mark.parametrize("size", [1, 63, BLOCK - 1, BLOCK, BLOCK + 1, 781])
def test_a_key_names_a_prefix_under_model_and_salt(size: int):
    tokens = numbers(1000)
    key = chain(tokens).key(size)
    assert key == chain(tokens[:size] + [7] * 300).key(size)
    assert key != chain(tokens).key(size - 1)
    assert key != chain([*tokens[: size - 1], tokens[size - 1] + 1, *tokens[size:]]).key(size)
    for other in (
        root_of("model", "salt"),
        root_of("other", ""),
        root_of("", "model"),
    ):
        assert key != chain(tokens, other).key(size)


def test_a_chain_goes_on_as_its_sequence_grows():
    tokens = array("i", numbers(300))
    growing = Chain(ROOT, tokens)
    first = growing.key(300)
    tokens.extend(numbers(500, seed=1))
    assert growing.key(300) == first and growing.key(800) == chain(list(tokens)).key(800)


@pytest.mark.parametrize("at", [0, 1, 255, 256, 257, 511, 512, 700])
def test_where_two_sequences_part(at: int):
    one, other = numbers(700), numbers(700)
    other[at:] = [token + 1 for token in other[at:]]
    assert shared(chain(one), chain(other)) == at
    assert shared(chain(one), chain(one[:at])) == at
    assert common(array("i", one).tobytes(), array("i", other).tobytes()) == at
    assert shared(chain(one), chain(one, root_of("model", "s"))) == 0


def test_leaves_are_found_and_go_with_their_blocks():
    rng, tree, leaves = Random(3), Tree[Leaf](), {}
    trunk = numbers(900)
    for _ in range(60):
        at, tail = rng.randrange(900), numbers(rng.randrange(400), seed=rng.random())
        tokens = trunk[:at] + tail
        position = rng.randrange(1, len(tokens) + 1) if tokens else 0
        key = chain(tokens).key(position)
        if position and key not in leaves:
            leaf = Leaf(position)
            leaves[key] = (tokens, leaf, tree.add(chain(tokens), leaf))
    for tokens, _, _ in leaves.values():
        best = tree.find(chain([*tokens, 5]), Walk(), len(tokens))
        expected = max(
            (leaf for t, leaf, _ in leaves.values()
             if leaf.position <= len(tokens) and t[: leaf.position] == tokens[: leaf.position]),
            key=lambda leaf: leaf.position,
        )  # fmt: skip
        assert best is expected
    for tokens, leaf, block in leaves.values():
        tree.remove(block, leaf)
        assert tree.find(chain(tokens), Walk(), len(tokens)) is not leaf
    assert not tree.blocks


def test_a_digest_alone_is_not_believed():
    """Were SHA-256 to fail, a block with other tokens would not be taken."""
    tree, tokens = Tree[Leaf](), numbers(600)
    tree.add(chain(tokens), Leaf(600))
    digest = chain(tokens).digest(1)
    block = tree.blocks[digest]
    tree.blocks[digest] = Block(digest, bytes(4 * BLOCK), block.parent, block.after)
    assert tree.find(chain(tokens), Walk(), 600) is None
    known = chain(tokens)
    assert known.digest(2) in tree.blocks  # which are computed, not the tree's own
    assert tree.find(known, Walk(), 600) is None


def test_what_was_given_up_is_told_from_what_never_was(monkeypatch):
    monkeypatch.setattr("server.engine.tree.GHOSTS", 40)
    rng, tree, leaves = Random(5), Tree[Leaf](), {}
    trunk = numbers(700)

    def gone(known: Chain, index: int, most: int) -> bool:
        """As tree.gone(), by the digests of all prefixes."""
        rest, digest = known.within(index, most), known.digest(index)
        whole = len(rest) == 4 * BLOCK and known.digest(index + 1) in tree._ghosts
        return whole or any(
            tail_digest(digest, rest[:n]) in tree._ghosts for n in range(4, len(rest) + 1, 4)
        )

    found = Counter()
    for turn in range(400):
        tokens = trunk[: rng.randrange(0, 700, 20)] + numbers(
            rng.randrange(1, 5), seed=rng.randrange(4)
        )
        known = chain(tokens)
        key = known.key(len(tokens))
        if turn % 3 == 0 and leaves:
            tree.remove(*leaves.pop(rng.choice(list(leaves))))
        elif turn % 7 == 0:
            tree.miss(known, len(tokens))
        elif key not in leaves:
            leaf = Leaf(len(tokens))
            leaves[key] = tree.add(known, leaf), leaf
        asked = chain(trunk[: rng.randrange(0, 700, 20)] + numbers(3, seed=rng.randrange(4)))
        for index in range(len(asked.tokens) // BLOCK + 1):
            most = rng.randrange(index * BLOCK, len(asked.tokens) + 1)
            expected = gone(asked, index, most)
            assert tree.gone(asked, index, most) == expected
            found[expected] += 1
    assert len(tree._ghosts) == 40 and min(found.values()) > 50
    ends = Counter(end for end in tree._ghosts.values() if end is not None)
    assert ends == Counter(
        {(name, size): n for name, sizes in tree._ends.items() for size, n in sizes.items()}
    )


def test_what_the_tree_gives_out_is_followed_at_once(monkeypatch):
    tree, tokens = Tree[Leaf](), numbers(20 * BLOCK + 9)
    leaf = Leaf(len(tokens))
    block = tree.add(chain(tokens), leaf)
    base = tree.way(block, leaf).chain()
    assert base.tokens.tolist() == tokens and base.known == 20
    longer = Chain(base.digest(0), base.tokens + array("i", [1, 2]), base.digests(20))
    shorter = Chain(base.digest(0), base.tokens[: 9 * BLOCK] + array("i", [1]), base.digests(9))
    chunks = []
    chunk = Chain.chunk
    monkeypatch.setattr(Chain, "chunk", lambda *at: chunks.append(at) or chunk(*at))
    for known, count, found in ((longer, 21, leaf), (shorter, 10, None)):
        walk = Walk[Leaf]()
        assert tree.find(known, walk, len(known.tokens)) is found
        assert walk.count == count and walk.block is tree.blocks[known.digest(count - 1)]
    assert len(chunks) < 5  # no block's tokens were looked at
    again = Tree[Leaf]()  # of blocks that came anew, by digests of their own
    again.add(chain(tokens), leaf)
    assert again.find(longer, Walk(), len(longer.tokens)) is leaf
    assert len(chunks) > 20
    again.remove(again.blocks[base.digest(20)], leaf)
    assert again.find(longer, Walk(), len(longer.tokens)) is None


def test_a_way_stands_when_what_it_led_to_is_gone():
    tree, tokens = Tree[Leaf](), numbers(600)
    leaf, other = Leaf(600), Leaf(300)
    block = tree.add(chain(tokens), leaf)
    tree.add(chain(tokens), other)
    walk, asked = Walk[Leaf](), chain([*tokens, 7])
    assert tree.find(asked, walk, 601) is leaf and walk.count == 3
    way = tree.way(block, leaf)
    tree.remove(block, leaf)
    assert way.chain().tokens.tolist() == tokens
    assert tree.find(asked, walk, 601) is other and walk.count == 2
    tree.add(chain(tokens), leaf)
    assert tree.find(asked, walk, 601) is leaf and walk.count == 3


def test_a_key_and_a_head_are_those_of_the_tokens_however_they_grow():
    tokens = array("i", numbers(20))
    growing = Chain(ROOT, tokens)
    assert growing.head == ROOT + tokens.tobytes()
    for more in (numbers(20, seed=1), numbers(600, seed=2)):
        tokens.extend(more)
        whole = chain(tokens.tolist())
        for _ in range(2):
            assert growing.key(len(tokens)) == whole.key(len(tokens))
        assert growing.head == whole.head == ROOT + tokens[:32].tobytes()
