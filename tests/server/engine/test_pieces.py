"""A prompt that comes in pieces begins as early as can be, and never where the whole would not."""

from __future__ import annotations

from array import array
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from server.engine.chain import BLOCK, Chain
from server.engine.positions import LEAST, plan
from server.engine.request import Request
from server.protocol import Generate, Read, pack_tokens
from tests.server.engine.bench import Bench, alone, counts, generate
from tests.server.engine.test_checkpoints import ask, cached, caching, words


def read(bench: Bench, id: str, tokens: list[int]) -> None:
    bench.add(Read(id=id, tokens=pack_tokens(tokens)))
    bench.finish()
    assert bench.finish_of(id) == "stop"


def computed(bench: Bench) -> int:
    return sum(len(chunk.tokens) for step in bench.runner.steps for chunk in step)


def held(bench: Bench, id: str) -> Request:
    scheduler = bench.scheduler
    return scheduler.running.get(id) or scheduler.waiting[id]


def settle(bench: Bench) -> None:
    """Step until nothing moves for want of more of a prompt."""
    while bench.step().chunks or bench.expecting:
        pass


def ask_in_pieces(bench: Bench, message: Generate, ends: list[int]) -> tuple[int, int]:
    """Run a prompt whose pieces end there; how many tokens were computed, and of how many it was
    known when it began."""
    before, began = computed(bench), 0
    bench.begin(message, ends[0])
    for start, end in pairwise([*ends, -1]):
        settle(bench)
        if not began and message.id in bench.scheduler.running:
            began = start
        if end >= 0:
            bench.extend(message.id, end - start)
    bench.extend(message.id, 0, more=False)
    bench.finish()
    assert bench.result(message.id) == alone(message)
    return computed(bench) - before, began or len(message.tokens) // 4


def cuts(rng: Random, length: int) -> list[int]:
    size = rng.choice([7, 40, 256, 600])
    ends = list(range(size, length, size))
    return [*(end for end in ends if rng.random() < 0.7), length]


def due(bench: Bench, tokens: list[int], ends: list[int]) -> int:
    """The earliest end of a piece at which nothing that is kept can be what more would lead to."""
    cache = bench.scheduler.checkpoints
    leaves = [cache.chain(c).tokens.tolist() for c in {*cache.tiers.device, *cache.tiers.host}]
    for end in ends:
        if not any(len(leaf) >= max(end, LEAST) and leaf[:end] == tokens[:end] for leaf in leaves):
            return end
    return len(tokens)


@pytest.mark.parametrize("seed", range(40))
def test_pieces_hit_what_the_whole_hits_and_begin_at_the_earliest(seed: int) -> None:
    rng = Random(seed)
    documents = [words(1500, 10 * seed + n) for n in range(3)]
    options: dict[str, Any] = {"max_step_tokens": 512, "slots": 3, "host_bytes": 40_000}
    whole, pieces = caching(**options), caching(**options)
    for number in range(rng.randrange(4, 20)):
        prompt = rng.choice(documents)[: rng.randrange(1, 1500)] + words(rng.randrange(9), number)
        message = generate(f"{number}", prompt, rng.choice([1, 4]))
        for bench in (whole, pieces):
            ask(bench, message)
    prompt = rng.choice(documents)[: rng.randrange(1, 1500)] + words(rng.choice([0, 1, 5, 300]), 1)
    message, ends = generate("probe", prompt, 3), cuts(rng, len(prompt))
    early = due(pieces, prompt, ends)
    cost, began = ask_in_pieces(pieces, message, ends)
    assert (cost, began) == (ask(whole, message), early)
    assert cached(pieces, "probe") == cached(whole, "probe")
    assert pieces.scheduler.checkpoints.misses == whole.scheduler.checkpoints.misses


@pytest.mark.parametrize("seed", range(8))
def test_prompts_in_pieces_leave_as_much_behind_as_whole_ones(seed: int) -> None:
    """What is kept of a prompt whose end was not known saves others as much."""
    rng, costs = Random(seed), [0, 0]
    documents = [words(1500, 10 * seed + n) for n in range(3)]
    options: dict[str, Any] = {"max_step_tokens": 512, "slots": 3, "host_bytes": 60_000}
    whole, pieces = caching(**options), caching(**options)
    for number in range(30):
        prompt = rng.choice(documents)[: rng.randrange(1, 1500)] + words(rng.randrange(9), number)
        message = generate(f"{number}", prompt, 1)
        costs[0] += ask(whole, message)
        costs[1] += ask_in_pieces(pieces, message, cuts(rng, len(prompt)))[0]
    assert costs[1] <= 1.1 * costs[0], costs


@pytest.mark.parametrize("seed", range(6))
def test_pieces_hit_what_the_whole_hits_on_the_disk(tmp_path: Path, seed: int) -> None:
    """Where the states lie is known to a block."""
    rng = Random(seed)
    documents = [words(1500, 20 * seed + n) for n in range(2)]
    first = caching(directory=tmp_path)
    kept = [document[: rng.randrange(40, 1500)] for document in documents for _ in range(3)]
    for number, tokens in enumerate(kept):
        read(first, f"r{number}", tokens)
    for number in range(8):
        prompt = rng.choice(documents)[: rng.randrange(1, 1500)] + words(rng.choice([0, 1, 300]), 5)
        ends = cuts(rng, len(prompt))
        message = generate(f"{number}", prompt, 3)
        whole, pieces = (caching(directory=tmp_path) for _ in range(2))
        cost, began = ask_in_pieces(pieces, message, ends)
        assert cost == ask(whole, message) and cached(pieces, f"{number}") == cached(
            whole, f"{number}"
        )
        for end in ends:
            known = end // BLOCK * BLOCK
            if not any(len(k) >= max(end, LEAST) and k[:known] == prompt[:known] for k in kept):
                assert began <= end
                break


def test_one_token_more_is_enough_where_a_state_ends_with_a_piece() -> None:
    bench = caching()
    read(bench, "r", words(300, 1))
    bench.begin(generate("a", words(300, 1) + words(50, 2), 2), 300)
    assert counts(bench.step()) == {} and "a" in bench.scheduler.waiting
    bench.extend("a", 1)
    bench.step()
    assert held(bench, "a").computed == 300 and "a" in bench.scheduler.running
    bench.extend("a", 0, more=False)
    bench.finish()
    assert cached(bench, "a") == 300


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_state_at_the_very_end_of_whole_blocks_is_not_begun_with(blocks: int) -> None:
    """There would be no token left to draw the first one from."""
    bench = caching()
    read(bench, "r", words(BLOCK * blocks, 1))
    assert ask(bench, generate("a", words(BLOCK * blocks, 1), 3)) == BLOCK * blocks + 2
    assert cached(bench, "a") == 0
    assert ask(bench, generate("b", [*words(BLOCK * blocks, 1), 5], 1)) == 1


def test_every_neighbour_is_known() -> None:
    """Hundreds of prompts part in one block; the oldest is found as well as the last."""
    bench = caching(slots=1, host_bytes=1 << 22)
    head = words(300, 1)
    for number in range(150):
        ask(bench, generate(str(number), [*head, number % 97, number // 97, *words(40, number)], 1))
    for number in (0, 149):
        prompt = [*head, number % 97, number // 97, *words(40, number), 3]
        cost, _ = ask_in_pieces(bench, generate(f"again {number}", prompt, 1), [301, 310, 343])
        assert cost <= 2


def test_the_cost_of_a_piece_is_that_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = caching(max_step_tokens=4096, host_bytes=1 << 24)
    document = words(60_000, 1)
    ask(bench, generate("a", document, 1))
    looked: list[int] = []
    chunk = Chain.chunk

    def counted(self: Chain, index: int, length: int = BLOCK) -> bytes:
        looked.append(index)
        return chunk(self, index, length)

    monkeypatch.setattr(Chain, "chunk", counted)
    message = generate("b", [*document, 1], 1)
    bench.begin(message, 500)
    bench.step()
    for known in range(1000, 60_000, 500):
        looked.clear()
        bench.extend("b", 500)
        bench.step()
        bench.step()
        assert len(looked) < 40 and min(looked, default=known) >= known // BLOCK - 4
    bench.extend("b", 0, more=False)
    bench.finish()
    assert cached(bench, "b") == 59_999


def test_copies_that_come_in_pieces_are_read_once() -> None:
    """As the choices of one request do; pieces come later than they are read."""
    bench = caching(max_step_tokens=512)
    document = words(2000, 1)
    messages = [generate(str(n), document, 3) for n in range(4)]
    for message in messages:
        bench.begin(message, 500)
    for _ in range(2):
        settle(bench)
        for message in messages:
            bench.extend(message.id, 600)
    for message in messages:
        bench.extend(message.id, 0, more=False)
    bench.finish()
    for message in messages:
        assert bench.result(message.id) == alone(message)
    assert computed(bench) == 2000 + 3 + 4 * 2


@pytest.mark.parametrize("whole", [False, True])
def test_one_waits_for_the_next_piece_of_another(whole: bool) -> None:
    """All that is known of the first is the beginning of both; then they part."""
    bench = caching(max_step_tokens=512)
    first, second = words(2000, 1), words(1300, 1) + words(500, 2)
    a, b = generate("a", first, 2), generate("b", second, 2)
    bench.begin(a, 600)
    settle(bench)
    bench.begin(b, 1800) if not whole else bench.add(b)
    settle(bench)
    assert "b" in bench.scheduler.waiting
    bench.extend("a", 0, more=False)
    if not whole:
        settle(bench)  # it has more to come, and has begun all the same
        assert held(bench, "b").computed == 1799
        bench.extend("b", 0, more=False)
    bench.finish()
    for message in (a, b):
        assert bench.result(message.id) == alone(message)
    assert cached(bench, "b") == 1300


def test_it_goes_on_alone_when_the_one_it_follows_leaves() -> None:
    bench = caching(max_step_tokens=512)
    a, b = generate("a", words(2000, 1), 2), generate("b", words(2000, 1), 2)
    for message in (a, b):
        bench.begin(message, 600)
    settle(bench)
    assert "b" in bench.scheduler.waiting
    bench.abort("a")
    del bench.rest["a"]
    settle(bench)
    assert held(bench, "b").computed == 599
    bench.extend("b", 0, more=False)
    bench.finish()
    assert bench.result("b") == alone(b)


def test_ends_of_messages_are_kept_as_they_come() -> None:
    bench = caching(max_step_tokens=512)
    head, rest = words(150, 1), words(3000, 2)
    bench.begin(generate("a", head + rest, 2, boundaries=[150, 400]), 600)
    settle(bench)
    assert held(bench, "a").computed == 599
    bench.extend("a", 0, more=False)
    bench.finish()
    assert ask(bench, generate("b", head + words(30, 3), 1)) == 30


def test_plans_of_what_is_not_known_whole() -> None:
    marks = plan(50_000, boundaries=range(50, 20_000, 50), every=1024, more=True)
    assert marks[0] == 50 and 49_999 not in marks and len(marks) < 80
    piecewise = {
        at
        for end in range(50, 20_000, 400)
        for at in plan(50_000, boundaries=range(50, end, 50), every=1 << 20, more=True)
    }
    assert piecewise == {*plan(50_000, boundaries=range(50, 20_000 - 350, 50), every=1 << 20,
                               more=True)}  # fmt: skip


# On the disk.


def on_disk(directory: Path, count: int = 2000) -> list[int]:
    read(caching(directory=directory), "r", words(count, 1))
    return words(count, 1)


def loads(bench: Bench) -> int:
    return len(bench.scheduler.checkpoints.disk.shelf.load_seconds)


def test_a_state_is_loaded_while_the_rest_is_text(tmp_path: Path) -> None:
    document = on_disk(tmp_path)
    bench = caching(directory=tmp_path)
    message = generate("a", document + words(900, 2), 2)
    bench.begin(message, 600)
    settle(bench)
    assert loads(bench) == 0  # too early to believe in it
    bench.extend("a", 600)
    settle(bench)
    assert loads(bench) == 1 and "a" in bench.scheduler.waiting
    bench.extend("a", 1000)
    bench.step()
    assert held(bench, "a").cached == 2000
    bench.extend("a", 0, more=False)
    bench.finish()
    assert bench.result("a") == alone(message) and loads(bench) == 1


def test_it_begins_without_a_state_that_it_does_not_come_to(tmp_path: Path) -> None:
    document = on_disk(tmp_path)
    bench = caching(directory=tmp_path)
    message = generate("a", document[:1400] + words(900, 2), 2)
    bench.begin(message, 1300)
    settle(bench)
    assert "a" in bench.scheduler.waiting and loads(bench) == 1
    bench.extend("a", 300)
    bench.step()
    assert "a" in bench.scheduler.running
    bench.extend("a", 0, more=False)
    bench.finish()
    assert bench.result("a") == alone(message) and cached(bench, "a") == 0
    assert not any(c.pins for c in bench.scheduler.checkpoints.tiers.host)


def test_other_states_on_the_disk_make_nobody_wait(tmp_path: Path) -> None:
    on_disk(tmp_path)
    bench = caching(directory=tmp_path)
    bench.begin(generate("a", words(3000, 5), 2), 600)
    assert counts(bench.step()) == {"a": 64}
    bench.extend("a", 0, more=False)
    bench.finish()


def test_where_the_host_has_no_room_a_state_is_loaded_when_it_is_certain(tmp_path: Path) -> None:
    document = on_disk(tmp_path)
    bench = caching(directory=tmp_path, host_bytes=0)
    message = generate("a", document + words(900, 2), 2)
    bench.begin(message, 1500)
    settle(bench)
    assert loads(bench) == 0
    bench.extend("a", 600)
    settle(bench)
    assert held(bench, "a").cached == 2000
    bench.extend("a", 0, more=False)
    bench.finish()
    assert bench.result("a") == alone(message)


def test_a_damaged_state_is_read_anew_and_told(tmp_path: Path) -> None:
    document = on_disk(tmp_path)
    [path] = (tmp_path / "states").iterdir()
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    bench = caching(directory=tmp_path)
    message = generate("a", document + words(50, 2), 2)
    cost, _ = ask_in_pieces(bench, message, [600, 1200, 1999])
    assert cost == 2051 and +bench.scheduler.checkpoints.misses == {"damaged": 1}
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


@pytest.mark.parametrize("known", [10, 600, 1200, 1999, 2001, 2300])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_who_leaves_on_the_way_leaves_nothing(tmp_path: Path, known: int, steps: int) -> None:
    document = on_disk(tmp_path)
    bench = caching(directory=tmp_path, slots=2)
    bench.begin(generate("a", document + words(900, 2), 2), known)
    for _ in range(steps):
        bench.step()
    if steps == 0:  # the answer of the disk comes after the end
        bench.scheduler.schedule(1.0)
    bench.abort("a")
    del bench.rest["a"]
    bench.finish()
    cache = bench.scheduler.checkpoints
    assert not any(c.pins for c in cache.tiers.host) and not bench.expecting
    for checkpoint in {*cache.tiers.device, *cache.tiers.host}:
        cache.tiers.drop(checkpoint)
    cache.sweep()
    bench.finish()
    holdings = bench.scheduler.holdings
    assert holdings.slots.held == 0 == cache.tiers.host_bytes and not bench.runner.saved


def test_milestones_tell_where_a_long_sequence_leads(tmp_path: Path) -> None:
    """Beyond 128 blocks not every block is one: who parts between two waits up to the next."""
    bench = caching(directory=tmp_path, max_step_tokens=4096, host_bytes=1 << 22)
    shelf = bench.scheduler.checkpoints.disk.shelf
    tokens = array("i", words(4000, 1) * 12)
    read(bench, "r", tokens.tolist())
    [entry] = [e for e in shelf.entries.values() if e.position == 48_000]
    root = bench.scheduler.checkpoints.chain(bench.scheduler.checkpoints.get(entry.key)).digest(0)
    for known in (1, 255, 256, 300, 32_000, 40_000, 47_999, 48_000):
        assert entry in shelf.look(Chain(root, tokens[:known])).entries, known
    assert not shelf.look(Chain(root, tokens + tokens[:1])).entries
    seen = None
    for known in range(100, 48_000, 700):  # what is seen at a glance is what was seen before
        seen = shelf.look(Chain(root, tokens[:known]), seen)
        assert seen.entries == shelf.look(Chain(root, tokens[:known])).entries
    for part in (0, 300, 20_000, 33_000, 40_100, 47_000):
        other = tokens[:part] + array("i", [96 - t for t in tokens[part:]])
        step = BLOCK if part < 128 * BLOCK else 2 * BLOCK
        sure = (part // step + 1) * step
        assert not shelf.look(Chain(root, other[:sure])).entries, part
        if part // step * step:
            assert entry in shelf.look(Chain(root, other[: sure - 1])).entries, part


def test_the_disk_is_searched_once_for_a_prompt_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = caching(slots=4, blocks=60, block_size=4, directory=tmp_path)
    shelf, searches = bench.scheduler.checkpoints.disk.shelf, []
    find = shelf.find
    monkeypatch.setattr(shelf, "find", lambda *of: searches.append(of) or find(*of))
    runs = generate("runs", words(100, 1), 60)
    bench.add(runs)
    bench.step()
    waits = generate("waits", words(150, 2), 3)
    bench.add(waits)
    searches.clear()
    for _ in range(20):
        bench.step()
    assert "waits" in bench.scheduler.waiting and len(searches) == 1
    bench.finish()
    assert bench.result("runs") == alone(runs) and bench.result("waits") == alone(waits)
