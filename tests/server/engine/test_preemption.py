"""When KV blocks run out the youngest leaves for host memory and returns as it was."""

from __future__ import annotations

import pytest

from tests.server.engine.bench import Bench, alone, counts, generate


def crowded() -> Bench:
    """Three requests of up to 40 tokens where 64 positions are to be had."""
    bench = Bench(slots=4, blocks=16, block_size=4)
    bench.add(*(generate(id, 10, 30) for id in ("a", "bb", "ccc")))
    return bench


def test_the_youngest_goes_first_and_nothing_is_recomputed():
    bench = crowded()
    gone: list[str] = []
    computed = 0
    while not bench.scheduler.idle:
        before = set(bench.scheduler.swapped)
        computed += bench.step().tokens
        gone += sorted(set(bench.scheduler.swapped) - before)
    assert gone[0] == "ccc" and "a" not in gone
    assert bench.scheduler.preemptions["blocks"] >= 1
    for id in ("a", "bb", "ccc"):
        assert bench.result(id) == alone(generate(id, 10, 30))
    assert computed == 3 * (10 + 30 - 1)  # each position once
    assert bench.runner.saved == {}


def test_copies_go_out_come_back_and_are_forgotten():
    bench = crowded()
    bench.finish()
    out = [c for c in bench.runner.copies if c.target is not None and c.target.key is not None]
    back = [c for c in bench.runner.copies if c.target is not None and c.target.slot is not None]
    forgotten = [c for c in bench.runner.copies if c.target is None]
    assert len(out) == len(back) == len(forgotten) == bench.scheduler.preemptions["blocks"]
    out.sort(key=lambda copy: (copy.target.key, copy.target.position))
    for copies in (back, forgotten):
        copies.sort(key=lambda copy: (copy.source.key, copy.source.position))
    for leaving, returning, forgetting in zip(out, back, forgotten, strict=True):
        assert leaving.target == returning.source == forgetting.source
        assert len(leaving.source.blocks) == len(returning.target.blocks)
        assert leaving.source.position == returning.target.position


def test_older_ones_return_first_and_before_the_waiting():
    bench = Bench(slots=8, blocks=12, block_size=4, max_step_tokens=64)
    ids = ["a", "bb", "ccc", "dddd"]
    bench.add(*(generate(id, 9, 30) for id in ids))
    returned: list[str] = []
    late = False
    while not bench.scheduler.idle:
        swapped = list(bench.scheduler.swapped)  # the oldest first
        bench.step()
        if len(swapped) >= 2 and not late:
            late = True
            bench.add(generate("late", 1, 2))  # would fit at once
        if bench.scheduler.swapped:
            assert "late" not in bench.scheduler.running
        returned += [id for id in swapped if id not in bench.scheduler.swapped]
        arrivals = [ids.index(id) for id in bench.scheduler.running if id != "late"]
        assert arrivals == sorted(arrivals)
    assert late and returned
    for id in ids:
        assert bench.result(id) == alone(generate(id, 9, 30))


def test_abort_of_a_preempted_one_forgets_its_state():
    bench = crowded()
    while not bench.scheduler.swapped:
        bench.step()
    [id] = bench.scheduler.swapped
    assert id in bench.runner.saved
    bench.abort(id)
    bench.step()
    assert bench.runner.saved == {}
    bench.finish()
    assert bench.finish_of(id) == "abort"


def test_the_last_abort_leaves_nothing_on_the_host():
    bench = crowded()
    while not bench.scheduler.swapped:
        bench.step()
    bench.abort("a", "bb", "ccc")
    assert bench.scheduler.idle
    work = bench.step()
    assert not work.chunks and bench.runner.saved == {}


def test_a_prompt_that_does_not_fit_beside_the_others_waits_for_its_slot():
    bench = Bench(slots=4, blocks=8, block_size=4)
    bench.add(generate("a", 12, 8), generate("bb", 20, 5))
    assert counts(bench.step()) == {"a": 12}
    while "bb" not in bench.scheduler.running:
        bench.step()
    bench.finish()
    assert bench.scheduler.preemptions["blocks"] == 0
    assert bench.result("bb") == alone(generate("bb", 20, 5))


def test_one_sequence_may_have_all_the_blocks():
    bench = Bench(slots=4, blocks=8, block_size=4)
    bench.add(generate("a", 31, 99), generate("bb", 5, 99))
    bench.finish()
    assert len(bench.tokens("a")) == 1 and bench.finish_of("a") == "length"
    assert bench.result("bb") == alone(generate("bb", 5, 99), 32)


def test_preempted_while_its_prompt_is_read():
    bench = Bench(slots=4, blocks=20, block_size=4, max_step_tokens=3)
    messages = [generate("a", 4, 60), generate("bb", 4, 60), generate("reader", 36, 4)]
    bench.add(*messages[:2])
    bench.step()
    bench.add(messages[2])
    seen = False
    while not bench.scheduler.idle:
        bench.step()
        for request in bench.scheduler.swapped.values():
            seen |= 0 < request.computed < request.prompt_length
    assert seen
    for message in messages:
        assert bench.result(message.id) == alone(message)


@pytest.mark.parametrize("budget", [1, 3, 64])
@pytest.mark.parametrize("blocks", [10, 13, 40])
def test_crowds_come_through_whole(budget: int, blocks: int):
    bench = Bench(slots=5, blocks=blocks, block_size=4, max_step_tokens=budget)
    messages = [generate(f"{n}", 1 + 3 * n, 20 - n) for n in range(10)]
    bench.add(*messages)
    bench.finish()
    for message in messages:
        assert bench.result(message.id) == alone(message, blocks * 4)


def test_preempted_in_the_step_that_gave_it_a_block():
    bench = Bench(slots=4, blocks=7, block_size=4, max_step_tokens=3)
    messages = [generate("reader", 20, 4), generate("b", 1, 20)]
    bench.add(*messages)
    while not bench.scheduler.swapped:
        assert counts(bench.step())["reader"] >= 2
    [copy] = bench.runner.copies
    assert copy.source.position == 8 and len(copy.source.blocks) == 2  # the third is left out
    assert counts(bench.step()) == {"reader": 1}  # the last of its prompt
    bench.finish()
    for message in messages:
        assert bench.result(message.id) == alone(message)
