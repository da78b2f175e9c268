"""Continuous batching: who joins, who leaves, who gets how many tokens of a step."""

from __future__ import annotations

import pytest

from server.protocol import unpack_tokens
from tests.server.engine.bench import Bench, alone, counts, generate


def test_one_request_from_prompt_to_end():
    bench = Bench()
    message = generate("a", 10, 5)
    bench.add(message)
    assert bench.finish() == 5  # the prompt's step draws the first token
    assert bench.result("a") == alone(message)


def test_requests_join_and_leave_between_steps():
    bench = Bench(slots=2)
    messages = {id: generate(id, 5, n) for id, n in [("a", 2), ("bb", 6), ("ccc", 3)]}
    bench.add(messages["a"])
    assert counts(bench.step()) == {"a": 5}
    bench.add(messages["bb"], messages["ccc"])
    assert counts(bench.step()) == {"a": 1, "bb": 5}  # a ends here
    assert counts(bench.step()) == {"bb": 1, "ccc": 5}
    bench.finish()
    for id, message in messages.items():
        assert bench.result(id) == alone(message)


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 16, 1000])
def test_the_budget_cuts_prompts_anywhere_and_changes_nothing(budget: int):
    bench = Bench(max_step_tokens=budget)
    messages = [generate("a" * n, 11 * n, 7) for n in range(1, 9)]
    bench.add(*messages)
    bench.finish()
    for message in messages:
        assert bench.result(message.id) == alone(message)


def test_steps_mix_tokens_and_prompts_up_to_the_budget():
    bench = Bench(max_step_tokens=10)
    bench.add(generate("a", 3, 9), generate("bb", 4, 9))
    assert counts(bench.step()) == {"a": 3, "bb": 4}
    bench.add(generate("ccc", 20, 9), generate("dddd", 5, 9))
    assert counts(bench.step()) == {"a": 1, "bb": 1, "ccc": 8}
    assert counts(bench.step()) == {"a": 1, "bb": 1, "ccc": 8}
    assert counts(bench.step()) == {"a": 1, "bb": 1, "ccc": 4, "dddd": 4}
    assert counts(bench.step()) == {"a": 1, "bb": 1, "ccc": 1, "dddd": 1}
    bench.finish()


def test_a_huge_prompt_never_stops_those_who_generate():
    bench = Bench(slots=8, max_step_tokens=32)
    ids = ["a" * n for n in range(1, 8)]
    bench.add(*(generate(id, 3, 10_000) for id in ids))
    bench.step()
    bench.add(generate("huge", 20_000, 2))
    steps = 0
    while bench.finish_of("huge") is None:
        work = bench.step()
        steps += 1
        assert work.tokens <= 32
        assert all(counts(work)[id] == 1 for id in ids)  # each has its token in every step
    assert steps == 20_000 // (32 - len(ids)) + 1  # and no slower than what they leave of it
    assert all(len(bench.tokens(id)) == steps + 1 for id in ids)


def test_first_come_first_served():
    bench = Bench(slots=2, max_step_tokens=100)
    ids = ["a" * n for n in range(1, 7)]
    bench.add(*(generate(id, 5, 3) for id in ids))
    bench.finish()
    starts = [bench.outputs[id][0].started for id in ids]
    assert starts == sorted(starts) == [1, 1, 4, 4, 7, 7]


def test_started_is_told_once_and_even_without_a_part_in_the_step():
    bench = Bench(max_step_tokens=8)
    bench.add(generate("a", 30, 2), generate("bb", 5, 2))
    assert counts(bench.step()) == {"a": 8}
    assert bench.outputs["bb"][0].started == 1.0
    bench.finish()
    for id in ("a", "bb"):
        assert [output.started for output in bench.outputs[id]][1:] == [None] * (
            len(bench.outputs[id]) - 1
        )


def test_progress_of_a_long_prompt_is_told_each_step():
    bench = Bench(max_step_tokens=10)
    bench.add(generate("a", 25, 3))
    bench.finish()
    assert [output.computed for output in bench.outputs["a"]] == [10, 20, 25, 25, 25]
    lengths = [len(unpack_tokens(output.tokens)) for output in bench.outputs["a"]]
    assert lengths == [0, 0, 1, 1, 1]


def test_a_budget_below_the_running_is_shared_in_turns():
    bench = Bench(slots=7, max_step_tokens=3)
    ids = ["a" * n for n in range(1, 8)]
    bench.add(*(generate(id, 1, 100) for id in ids))
    for _ in range(70):
        assert bench.step().tokens == 3
    told = [len(bench.tokens(id)) for id in ids]
    assert max(told) - min(told) <= 1 and sum(told) == 210


def test_a_prompt_has_its_turn_when_tokens_fill_the_budget():
    bench = Bench(slots=4, max_step_tokens=2)
    ids = ["a", "bb", "ccc"]
    bench.add(*(generate(id, 1, 1000) for id in ids))
    bench.step()
    bench.add(generate("late", 40, 2))
    for _ in range(100):
        bench.step()
    assert bench.finish_of("late") == "length"


def test_slots_are_used_again_and_start_empty():
    bench = Bench(slots=1)
    messages = [generate("a" * n, 3 + n, 4) for n in range(1, 6)]
    bench.add(*messages)
    bench.finish()
    assert {chunk.slot for step in bench.runner.steps for chunk in step} == {0}
    for message in messages:
        assert bench.result(message.id) == alone(message)


def test_stop_ids_min_tokens_and_the_maximum_length():
    bench = Bench(slots=8, max_model_len=30)
    plain = generate("plain", 10, 12)
    first, later = alone(plain)[0][0], alone(plain)[0][4]
    messages = [
        plain,
        generate("stop", list(unpack_tokens(plain.tokens)), 12, stop=[later]),
        generate("once", list(unpack_tokens(plain.tokens)), 12, stop=[first]),
        generate("min", list(unpack_tokens(plain.tokens)), 12, stop=[first], min_tokens=3),
        generate("long", 10, 1000),
    ]
    bench.add(*messages)
    bench.finish()
    for message in messages:
        assert bench.result(message.id) == alone(message, 30)
    assert bench.result("once") == ([first], "stop")
    assert first not in bench.tokens("min")[:3]
    assert len(bench.tokens("long")) == 20 and bench.finish_of("long") == "length"


def test_logprobs_travel_with_their_tokens():
    bench = Bench()
    bench.add(generate("a", 5, 3, logprobs=2), generate("bb", 5, 3, logprobs=0), generate("c", 5))
    bench.finish()
    for output in bench.outputs["a"]:
        [entry] = output.logprobs
        assert entry.logprob == -0.5 and len(entry.top) == 2
        assert entry.top[0][0] == unpack_tokens(output.tokens)[0]
    assert all(output.logprobs[0].top == [] for output in bench.outputs["bb"])
    assert all(output.logprobs is None for output in bench.outputs["c"])


def test_what_a_chunk_says():
    bench = Bench(max_step_tokens=4)
    bench.add(generate("a", 6, 3, stop=[96], min_tokens=1))
    bench.finish()
    chunks = [step[0] for step in bench.runner.steps]
    assert [(c.start, len(c.tokens), c.generated) for c in chunks] == [
        (0, 4, 0), (4, 2, 0), (6, 1, 1), (7, 1, 2),
    ]  # fmt: skip
    assert [c.prompt for c in chunks] == [True, True, False, False]
    assert [c.sampling is None for c in chunks] == [True, False, False, False]
    assert [tuple(c.suppress) for c in chunks] == [(), (96,), (), ()]


def test_abort_while_waiting_reading_and_generating():
    bench = Bench(slots=2, max_step_tokens=8)
    bench.add(generate("a", 2, 50), generate("bb", 40, 50), generate("ccc", 5, 50))
    bench.step()
    assert bench.scheduler.stats().slots_used == 2
    for id, left in [("ccc", 2), ("bb", 1), ("a", 0)]:
        bench.abort(id)
        assert bench.finish_of(id) == "abort"
        assert bench.scheduler.stats().slots_used == left  # free before any further step
        bench.scheduler.check_integrity()
    bench.abort("a", "unknown")
    assert bench.finish() == 0
    message = generate("again", 9, 4)
    bench.add(message)
    bench.finish()
    assert bench.result("again") == alone(message)


def test_an_abort_between_schedule_and_complete_is_no_news():
    bench = Bench()
    bench.add(generate("a", 5, 9), generate("bb", 5, 9))
    bench.step()
    work = bench.scheduler.schedule(2.0)
    bench.abort("a")
    bench.gather(bench.scheduler.complete(work, bench.runner.step(work.chunks)))
    assert bench.finish_of("a") == "abort" and len(bench.tokens("a")) == 1
    bench.finish()
    assert bench.result("bb") == alone(generate("bb", 5, 9))


def test_a_thousand_requests_over_few_slots():
    bench = Bench(slots=16, max_step_tokens=64)
    messages = [generate(f"{n:04}", 1 + n % 23, 1 + n % 7) for n in range(1000)]
    bench.add(*messages)
    bench.finish()
    assert all(bench.result(message.id) == alone(message) for message in messages)
