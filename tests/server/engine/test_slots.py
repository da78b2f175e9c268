"""Who takes gives back, once, and what was his own."""

from __future__ import annotations

import pytest

from server.engine.slots import Holdings, Pool
from tests.server.engine.bench import capacity


def test_a_pool_adds_up():
    pool = Pool("slot", 3)
    taken = [pool.take("a"), pool.take("b"), pool.take("a")]
    assert sorted(taken) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="no slot is free of 3"):
        pool.take("c")
    pool.give_back("a", [taken[0], taken[2]])
    assert (pool.free, pool.held) == (2, 1)
    pool.check()


def test_giving_back_twice_raises():
    pool = Pool("slot", 2)
    slot = pool.take("a")
    pool.give_back("a", [slot])
    with pytest.raises(RuntimeError, match="is not held"):
        pool.give_back("a", [slot])
    pool.check()


def test_giving_back_what_another_holds_raises():
    pool = Pool("block", 2)
    block = pool.take("a")
    with pytest.raises(RuntimeError, match=r"given back by 'b', is held by 'a'"):
        pool.give_back("b", [block])
    with pytest.raises(RuntimeError, match="is not held"):
        pool.give_back("a", [7])
    pool.check()


def test_a_lost_one_is_noticed():
    pool = Pool("slot", 2)
    pool._free.pop()
    with pytest.raises(AssertionError, match="1 free"):
        pool.check()


def test_pinned_memory_comes_in_powers_of_two():
    sizes = {"blocks": 8, "block_size": 16, "block_bytes": 100, "state_bytes": 1000}
    assert Holdings(capacity(**sizes)).bytes_for(33) == 1300
    assert Holdings(capacity(**sizes, pinned=True)).bytes_for(33) == 1024 + 512
    assert Holdings(capacity(state_bytes=1024, pinned=True)).bytes_for(33) == 1024


@pytest.mark.parametrize("positions, blocks", [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_blocks_cover_positions(positions: int, blocks: int):
    assert Holdings(capacity(blocks=8, block_size=16)).blocks_for(positions) == blocks
    assert Holdings(capacity()).blocks_for(positions) == 0
