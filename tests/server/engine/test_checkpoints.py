"""Prefixes are read once: what is kept, what is found, who waits for whom, what it costs nobody."""

from __future__ import annotations

from array import array
from itertools import pairwise
from random import Random
from typing import Any

import pytest

from server.engine.positions import LEAST, grid, plan, spacing
from server.protocol import Generate, Read, pack_tokens
from tests.server.engine.bench import VOCAB, Bench, alone, counts, generate


def words(count: int, seed: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


def caching(**fields: Any) -> Bench:
    return Bench(**({"caching": True, "slots": 8, "host_bytes": 1 << 20} | fields))


def ask(bench: Bench, message: Generate) -> int:
    """Run one request to its end; how many tokens were computed."""
    before = len(bench.runner.steps)
    bench.add(message)
    bench.finish()
    assert bench.result(message.id) == alone(message, bench.scheduler.max_length)
    return sum(len(chunk.tokens) for step in bench.runner.steps[before:] for chunk in step)


def cached(bench: Bench, id: str) -> int:
    return bench.outputs[id][-1].cached


def test_the_same_prompt_again_costs_one_token():
    bench = caching()
    assert ask(bench, generate("a", 200, 1)) == 200
    assert ask(bench, generate("b", 200, 1)) == 1
    assert cached(bench, "a") == 0 and cached(bench, "b") == 199


@pytest.mark.parametrize(("overlap", "most"), [(False, 5), (True, 5), (False, 1), (True, 1)])
def test_a_prompt_does_not_pause_in_front_of_its_last_token(overlap, most):
    """Where that can be taken back the state in front of it is kept a step later, or handed over
    by a request that has ended by then."""
    bench = caching(max_step_tokens=128, overlap=overlap, rollback=1)
    prompt = words(200, 1)
    assert ask(bench, generate("a", prompt, most)) == 199 + most
    lengths = [[len(chunk.tokens) for chunk in step] for step in bench.runner.steps]
    assert lengths == [[128], [72], *[[1]] * (most - 1)]
    assert [chunk.apart for [chunk] in bench.runner.steps] == [False, True, *[False] * (most - 1)]
    assert ask(bench, generate("b", prompt, most)) == most
    assert ask(bench, generate("c", [*prompt[:199], 1, 2, 3], most)) == 2 + most
    assert [cached(bench, id) for id in "abc"] == [0, 199, 199]


@pytest.mark.parametrize(
    ("length", "lengths"),
    [(128, [128]), (129, [128, 1]), (130, [128, 1, 1]), (131, [128, 3])],
)
def test_a_prompt_pauses_where_its_last_token_cannot_be_apart(length, lengths):
    """One that a step has no room for comes later; of two none is apart: both are one by one."""
    bench = caching(max_step_tokens=128, rollback=1, block_size=16, blocks=64)
    ask(bench, generate("a", words(length, 1), 1))
    assert [len(chunk.tokens) for [chunk] in bench.runner.steps] == lengths
    assert bench.runner.steps[-1][0].apart == (lengths[-1] > 2)
    assert ask(bench, generate("b", words(length, 1), 1)) == 1


@pytest.mark.parametrize("host_bytes", [1 << 20, 0])
def test_a_slot_is_free_for_who_comes_next_where_most_are_in_use(host_bytes):
    """While the others run what one has left goes to the host, if that has room for it."""
    bench = caching(slots=4, host_bytes=host_bytes, max_step_tokens=500)
    bench.add(*(generate(f"{n}", words(100, n), 90) for n in range(3)))
    for _ in range(4):
        bench.step()  # the prompt's end of one of them takes the fourth slot
    tiers, slots = bench.scheduler.checkpoints.tiers, bench.scheduler.holdings.slots
    assert (slots.free, len(tiers.device)) == ((1, 0) if host_bytes else (0, 1))
    bench.add(generate("late", words(100, 9), 5))
    bench.step()
    assert len(bench.scheduler.running) == 4 and not tiers.device
    while "late" in bench.scheduler.running:
        bench.step()
    bench.step()  # what it leaves lies in its slot
    assert (slots.free, len(tiers.device)) == ((1, 0) if host_bytes else (0, 1))
    assert len(tiers.host) == (5 if host_bytes else 0)
    bench.finish()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_context_keeps_its_last_token(overlap):
    """Also where somebody waits for the state in front of it."""
    bench = caching(overlap=overlap, rollback=1)
    prompt = words(300, 1)
    bench.add(Read(id="r", tokens=pack_tokens(prompt)))
    bench.step()
    bench.add(generate("a", prompt, 3))
    bench.finish()
    assert bench.outputs["r"][-1].state.count == 300 and cached(bench, "a") == 299


def test_a_second_turn_reads_only_what_is_new():
    bench = caching()
    prompt = words(150, 1)
    ask(bench, generate("a", prompt, 20))
    turn = [*prompt, *bench.tokens("a"), *words(30, 2)]
    # all but the last token that was drawn has been folded
    assert ask(bench, generate("b", turn, 1)) == 31
    assert cached(bench, "b") == 150 + 19


def test_the_end_of_a_turn_takes_no_copy():
    bench = caching()
    ask(bench, generate("a", 20, 40))
    assert bench.runner.copies == [] and len(bench.scheduler.checkpoints.tiers.device) == 1


def test_message_boundaries_are_kept():
    bench = caching()
    head, tail = words(300, 1), words(80, 2)
    ask(bench, generate("a", head + tail, 1, boundaries=[100, 300, 380]))
    assert ask(bench, generate("b", head + words(50, 3), 1, boundaries=[300])) == 50
    assert ask(bench, generate("c", head[:100] + words(50, 4), 1)) == 50


def test_where_two_prompts_part_a_third_begins():
    bench = caching()
    document = words(500, 1)
    ask(bench, generate("a", document + words(40, 2), 1))
    assert ask(bench, generate("b", document + words(40, 3), 1)) == 540  # nothing is kept there yet
    assert ask(bench, generate("c", document + words(40, 4), 1)) == 40
    assert +bench.scheduler.checkpoints.misses == {"new": 1, "parted": 1}


def test_prompts_that_arrive_together_read_what_they_share_once():
    bench = caching(max_step_tokens=100)
    document = words(700, 1)
    messages = [generate(id, document + words(60, n), 3) for n, id in enumerate("abcd", 2)]
    bench.add(*messages, generate("other", 50, 3))
    assert counts(bench.step()) == {"a": 100}
    assert bench.finish() < 20
    computed = sum(len(c.tokens) for step in bench.runner.steps for c in step)
    assert computed == 700 + 4 * 60 + 50 + 5 * 2
    for message in messages:
        assert bench.result(message.id) == alone(message)
    assert [cached(bench, id) for id in "abcd"] == [0, 700, 700, 700]


def test_copies_of_one_prompt_read_it_once():
    bench = caching()
    bench.add(*(generate(str(n), words(300, 1), 4) for n in range(5)))
    bench.finish()
    computed = sum(len(c.tokens) for step in bench.runner.steps for c in step)
    assert computed == 300 + 4 * 1 + 5 * 3


def test_who_waits_goes_on_when_the_reader_ends():
    bench = caching(max_step_tokens=50)
    document = words(500, 1)
    bench.add(generate("a", document, 1), generate("b", [*document, 5], 1))
    bench.step()
    assert "b" in bench.scheduler.waiting and bench.scheduler.holdings.slots.free == 7
    bench.abort("a")
    bench.finish()
    assert bench.result("b") == alone(generate("b", [*document, 5], 1))


def test_salts_keep_apart():
    bench = caching()
    assert ask(bench, generate("a", 200, 1, salt="one")) == 200
    assert ask(bench, generate("b", 200, 1, salt="two")) == 200
    assert ask(bench, generate("c", 200, 1)) == 200
    assert ask(bench, generate("d", 200, 1, salt="two")) == 1


def test_running_sequences_come_first():
    """Checkpoints hold every slot; whoever arrives has one at once, and what leaves is kept."""
    bench = caching(slots=4, max_step_tokens=1000)
    for n in range(4):
        ask(bench, generate(f"seed {n}", words(100, n), 8))
    tiers = bench.scheduler.checkpoints.tiers
    assert bench.scheduler.holdings.slots.free == 0 and bench.scheduler.stats().slots_used == 0
    late = [generate(f"late {n}", words(60, 50 + n), 8) for n in range(4)]
    bench.add(*late)
    assert len(counts(bench.step())) == 4
    assert len(tiers.device) == 0 and len(tiers.host) >= 4
    bench.finish()
    assert all(bench.result(message.id) == alone(message) for message in late)
    assert ask(bench, generate("again", words(100, 0), 1)) == 1
    assert +bench.scheduler.checkpoints.found == {"host": 1}


def test_one_slot_and_no_host_memory_serve_as_before():
    bench = caching(slots=1, host_bytes=0)
    messages = [generate(str(n), words(100, n % 2), 5) for n in range(6)]
    bench.add(*messages)
    bench.finish()
    assert all(bench.result(message.id) == alone(message) for message in messages)
    assert not bench.runner.saved


def test_one_slot_is_no_obstacle_to_a_hit():
    bench = caching(slots=1)
    ask(bench, generate("a", words(100, 1), 1))
    ask(bench, generate("b", words(100, 1), 1))
    assert cached(bench, "b") == 99


def test_the_host_keeps_within_its_budget_and_gives_up_the_oldest():
    size = 8 + 4 * 100
    bench = caching(slots=1, host_bytes=3 * size)
    for n in range(6):
        ask(bench, generate(f"{n}", words(101, n), 1))
    cache = bench.scheduler.checkpoints
    assert len(cache.tiers.host) <= 3 and cache.tiers.host_bytes <= 3 * size
    assert ask(bench, generate("old", words(101, 0), 1)) == 101
    assert ask(bench, generate("new", words(101, 5), 1)) == 1
    assert +cache.misses == {"new": 6, "evicted": 1}


def test_short_prompts_are_left_alone():
    bench = caching()
    assert ask(bench, generate("a", LEAST, 1)) == LEAST
    assert ask(bench, generate("b", LEAST, 1)) == LEAST
    assert +bench.scheduler.checkpoints.misses == {"short": 2}


@pytest.mark.parametrize("length", [100, 256, 700])
def test_what_there_was_no_room_for_is_not_taken_for_new(length: int):
    bench = caching(slots=1, host_bytes=0)
    for n in range(2):
        ask(bench, generate(f"a{n}", words(length, 1), 1))
        ask(bench, generate(f"other {n}", words(length, 2 + n), 1))
    assert +bench.scheduler.checkpoints.misses == {"new": 3, "evicted": 1}


def test_every_query_is_a_hit_or_has_a_reason():
    bench = caching(slots=2, host_bytes=2000)
    rng = Random(5)
    for n in range(60):
        prompt = words(200, rng.randrange(4))[: rng.randrange(1, 200)] + words(rng.randrange(50), n)
        ask(bench, generate(str(n), prompt or [1], 3))
    cache = bench.scheduler.checkpoints
    assert cache.queries == 60 == cache.hits + sum(cache.misses.values())
    assert set(+cache.misses) == {"short", "new", "parted", "evicted"}
    assert 0 < cache.saved_tokens < cache.queried_tokens


def test_a_lost_step_leaves_no_checkpoint():
    """The next one was scheduled already, and has copied what the lost one left."""
    bench = caching(max_step_tokens=64)
    bench.add(generate("a", words(200, 1), 5, boundaries=[64, 128]))
    bench.step()
    work, after = bench.scheduler.schedule(8.0), bench.scheduler.schedule(9.0)
    cache = bench.scheduler.checkpoints
    assert {c.position for c in cache.tiers.device} == {64, 128}
    bench.runner.copy(work.copies)
    bench.runner.step(work.chunks)
    bench.runner.copy(after.copies)
    bench.gather(bench.scheduler.fail(work, "lost"))
    assert {c.position for c in cache.tiers.device} == {64}
    bench.finish()


def test_what_was_kept_before_a_lost_step_of_another_stays():
    bench = caching()
    ask(bench, generate("a", words(200, 1), 5))
    kept = len(bench.scheduler.checkpoints.tiers.device)
    bench.add(generate("b", words(200, 2), 5))
    work = bench.scheduler.schedule(9.0)
    bench.gather(bench.scheduler.fail(work, "lost"))
    assert len(bench.scheduler.checkpoints.tiers.device) == kept


@pytest.mark.parametrize("rollback", [0, 1])
def test_a_stop_found_late_leaves_no_extra_token(rollback):
    """The next step has read the stop itself by then: it is taken back, or is known at least."""
    bench = caching(overlap=True, rollback=rollback)
    prompt = words(100, 1)
    third = alone(generate("a", prompt, 9))[0][2]
    message = generate("a", prompt, 9, stop=[third])
    bench.add(message)
    bench.finish()
    assert bench.result("a") == alone(message) and len(bench.tokens("a")) == 3
    [end] = [c for c in bench.scheduler.checkpoints.tiers.device if c.position > 100]
    assert len(bench.runner.slots[end.slot]) == 103 and end.position == 103 - rollback
    for id, rest in (("b", [third, 5, 6]), ("c", [(third + 1) % 97, 5, 6])):
        again = generate(id, [*prompt, *bench.tokens("a")[:2], *rest], 4)
        bench.add(again)
        bench.finish()
        assert bench.result(id) == alone(again)
    assert [bench.outputs[id][-1].cached for id in ("b", "c")] == [
        103 - rollback,
        102 * rollback or 99,
    ]


def test_a_step_that_is_lost_under_way_leaves_nothing():
    """One that ended with the step before it had garbage in its slot by then."""
    bench = caching(overlap=True, rollback=1)
    prompt = words(100, 1)
    message = generate("a", prompt, 9, stop=[alone(generate("a", prompt, 9))[0][2]])
    bench.add(message)
    while len(bench.tokens("a")) < 2:
        bench.step()
    work = bench.scheduler.schedule(9.0)
    bench.runner.copy(work.copies)
    bench.runner.slots[work.chunks[0].slot] = array("i", [-7])
    work.lose()
    bench.settle()
    bench.gather(bench.scheduler.fail(work, "lost"))
    assert bench.result("a") == alone(message)
    assert all(c.position < 100 for c in bench.scheduler.checkpoints.tiers.device)
    bench.finish()


def test_penalised_requests_are_told_what_came_before():
    from dataclasses import replace

    bench = caching()
    ask(bench, generate("a", words(100, 1), 1))
    message = generate("b", words(100, 1), 3)
    message.sampling = replace(message.sampling, repetition_penalty=1.3)
    ask(bench, message)
    chunks = [step[0] for step in bench.runner.steps[-3:]]
    assert list(chunks[0].before) == words(100, 1)[:99]
    assert [len(chunk.before) for chunk in chunks[1:]] == [0, 0]


@pytest.mark.parametrize("blocks", [24, 40, 100])
def test_hybrids_share_whole_blocks(blocks: int):
    bench = caching(blocks=blocks, block_size=4, host_bytes=0)
    document = words(50, 1)
    ask(bench, generate("a", document + words(9, 2), 4, boundaries=[50]))
    held = bench.scheduler.stats().blocks_used
    message = generate("b", document + words(11, 3), 20, boundaries=[50])
    bench.add(message)
    bench.step()
    if blocks == 100:
        assert bench.scheduler.stats().blocks_used == held + 16 - 12  # 12 whole ones are shared
    bench.finish()
    assert bench.result("b") == alone(message)
    assert cached(bench, "b") == 50


def test_hybrids_make_room_for_who_runs():
    bench = caching(blocks=30, block_size=4, slots=8)
    for n in range(8):
        ask(bench, generate(str(n), words(60, n), 12))
    messages = [generate(f"late {n}", words(50, n), 6) for n in range(4)]
    bench.add(*messages)
    bench.finish()
    for message in messages:
        assert bench.result(message.id) == alone(message)
    assert bench.scheduler.preemptions["blocks"] == 0


def test_nothing_is_given_up_for_one_who_does_not_fit_even_so():
    bench = caching(blocks=30, block_size=4, slots=8, host_bytes=0)
    ask(bench, generate("seed", words(40, 1), 1))
    bench.add(generate("runs", words(40, 2), 9))
    bench.step()
    kept = set(bench.scheduler.checkpoints.tiers.device)
    late = generate("late", words(90, 3), 2)
    bench.add(late)
    bench.step()
    assert "late" in bench.scheduler.waiting and len(kept) > 0
    assert kept <= set(bench.scheduler.checkpoints.tiers.device)
    bench.finish()
    assert bench.result("late") == alone(late)


def test_a_prompt_that_needs_every_block_gets_them():
    bench = caching(blocks=16, block_size=4, host_bytes=0)
    ask(bench, generate("a", words(50, 1), 2))
    ask(bench, generate("b", words(50, 1) + words(10, 2), 3))  # its own checkpoint is in the way


def test_the_grid_is_bounded_and_sparser_with_length():
    positions = grid(0, 4_000_000, 16_384)
    assert positions[:4] == [16_384, 32_768, 49_152, 65_536]
    assert len(positions) == 4 + 4 * 6 - 1 and positions == sorted(set(positions))
    gaps = [b - a for a, b in pairwise(positions)]
    assert gaps == sorted(gaps)
    assert all(b - a <= a / 4 for a, b in pairwise(positions[4:]))
    assert grid(100_000, 120_000, 16_384) == [114_688]
    assert grid(5, 10, 16) == []


def test_the_spacing_follows_the_size_of_a_state():
    assert spacing(8) == 1024 and spacing(17_800_000) == 16_384
    assert spacing(293_600_000) == 262_144


def test_plans():
    def planned(length: int, **more: Any) -> list[int]:
        return plan(length, every=1024, **more)

    assert planned(1) == planned(LEAST) == []
    assert planned(100) == [99] and planned(100, whole=True) == [100]
    assert planned(100, start=80) == []
    assert planned(100, boundaries=[40, 95, 100]) == [40, 95]
    assert planned(3000) == [1024, 2048, 2999]
    assert planned(3000, start=1500, boundaries=[1600, 2990]) == [1600, 2048, 2990]
    many = planned(50_000, boundaries=range(50, 50_000, 50))
    assert len(many) < 120 and many[0] == 50
    assert many[-3:] == [49_900, 49_950, 49_999]


@pytest.mark.parametrize("slots", [64, 12])
def test_many_users_over_few_documents_read_each_token_once(slots: int):
    """64 users of 8 turns over 16 documents, four of each at a time: at most 5 % is read twice."""
    rng = Random(1)
    bench = caching(slots=slots, max_step_tokens=512, host_bytes=1 << 26)
    documents = [words(2000, 100 + n) for n in range(16)]
    talks = [[*documents[n % 16], 96] for n in range(64)]  # 96 ends a message
    turns = [0] * 64
    asked: dict[str, int] = {}
    generated: set[int] = set()  # prefixes whose last token was drawn, not read
    unique: set[int] = set()

    def ask_next(user: int) -> None:
        talk = talks[user]
        talk += [*words(rng.randrange(20, 80), 1000 * user + turns[user]), 96]
        ends = [at + 1 for at, token in enumerate(talk) if token == 96]
        id = f"{user}-{turns[user]}"
        asked[id] = user
        prefix = 0
        for token in [*talk, 5]:
            prefix = hash((prefix, token))
            unique.add(prefix)
        bench.add(generate(id, [*talk, 5], rng.randrange(5, 40), boundaries=ends))

    for user in range(64):
        ask_next(user)
    while asked:
        bench.step()
        for id in [id for id in asked if bench.finish_of(id)]:
            user = asked.pop(id)
            said = bench.tokens(id)
            talks[user] += [5, *said[:-1]]
            prefix = 0
            for at, token in enumerate(talks[user]):
                prefix = hash((prefix, token))
                if at >= len(talks[user]) - len(said) + 1:
                    generated.add(prefix)
            talks[user].append(96)
            turns[user] += 1
            if turns[user] < 8:
                ask_next(user)
    read = sum(len(chunk.tokens) for step in bench.runner.steps for chunk in step if chunk.prompt)
    needed = len(unique - generated)
    assert 16 * 2000 < needed <= read <= 1.05 * needed, read / needed
