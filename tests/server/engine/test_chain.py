"""The chain and the tree: digests name prefixes, leaves are found by them, nothing is left over."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from random import Random

import pytest

from server.engine.chain import BLOCK, Chain, common, root_of, shared
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
