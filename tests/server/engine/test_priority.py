"""Who is more urgent is served first, takes the place of who is less, and costs it nothing but
time."""

from __future__ import annotations

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from model.chunk import Sampling
from server.engine.queue import Queue
from server.engine.request import Request, accept
from server.engine.scheduler import Scheduler
from server.engine.work import Work
from server.protocol import Generate, Read, pack_tokens, unpack_tokens
from tests.server.engine.bench import Bench, alone, capacity, counts, generate
from tests.server.engine.test_cached import load


def start(bench: Bench, *messages: Generate) -> Work:
    bench.add(*messages)
    return bench.step()


def computed(bench: Bench) -> int:
    return sum(len(chunk.tokens) for step in bench.runner.steps for chunk in step)


def check(bench: Bench, *messages: Generate) -> None:
    """Each has what it would have alone, and no position was computed twice."""
    bench.finish()
    for message in messages:
        assert bench.result(message.id) == alone(message)
    positions = [len(m.tokens) // 4 + len(bench.tokens(m.id)) - 1 for m in messages]
    assert computed(bench) == sum(positions)


def test_a_queue_is_in_order_whatever_comes_and_goes():
    queue = Queue()
    requests: list[Request] = []
    for number, priority in enumerate([5, -3, 0, 5, 0, -3, 7]):
        message = generate(str(number), 3, priority=priority)
        requests.append(accept(message, max_length=None, vocab_size=97))
        requests[-1].rank = (priority, number)
        queue[str(number)] = requests[-1]
    assert list(queue) == ["1", "5", "2", "4", "0", "3", "6"]
    queue.rerank(requests[6], -3)
    queue.rerank(requests[5], 0)
    assert list(queue) == ["1", "6", "2", "4", "5", "0", "3"]
    del queue["2"]
    assert queue.pop("0").id == "0" and queue.pop("0", None) is None and "0" not in queue
    assert [request.id for request in queue.order] == list(queue) == ["1", "6", "4", "5", "3"]
    assert len(queue) == 5 and queue.get("3") is requests[3]


def test_those_who_wait_come_in_by_priority_then_by_arrival():
    bench = Bench(slots=1)
    priorities = [3, 0, 1000, 0, -1000, 3]
    bench.add(*(generate(str(n), 4, 2, priority=p) for n, p in enumerate(priorities)))
    order: list[str] = []
    while not bench.scheduler.idle:
        order += [request.id for request in bench.step().admitted]
    assert order == ["4", "1", "3", "0", "5", "2"]
    assert not bench.scheduler.preemptions.total()


def test_the_least_urgent_leaves_and_of_these_the_youngest():
    bench = Bench(slots=4)
    running = [
        generate(id, 5, 20, priority=p) for id, p in [("a", 1), ("b", 9), ("c", 9), ("d", 1)]
    ]
    start(bench, *running)
    gone: list[list[str]] = []
    urgent = [generate(f"urgent {n}", 6, 20) for n in range(5)]
    for message in urgent:
        start(bench, message)
        gone.append(list(bench.scheduler.swapped))
    assert gone == [["c"], ["b", "c"], ["d", "b", "c"], ["a", "d", "b", "c"], ["a", "d", "b", "c"]]
    assert "urgent 4" in bench.scheduler.waiting  # equals do not drive one another out
    assert bench.scheduler.preemptions == {"priority": 4, "blocks": 0}
    assert bench.scheduler.stats().preemptions == {"priority": 4, "blocks": 0}
    check(bench, *running, *urgent)
    assert bench.scheduler.preemptions["priority"] == 4


def test_a_slot_that_is_free_is_taken_from_nobody():
    bench = Bench(slots=2)
    low, high = generate("low", 5, 9, priority=5), generate("high", 5, 9)
    start(bench, low)
    assert counts(start(bench, high)) == {"low": 1, "high": 5}
    check(bench, low, high)
    assert not bench.scheduler.preemptions.total()


def test_the_preempted_return_before_those_of_their_priority_that_wait():
    bench = Bench(slots=2)
    low = [generate(f"low {n}", 5, 12, priority=5) for n in range(4)]
    start(bench, *low)
    high = generate("high", 5, 3)
    start(bench, high)
    assert list(bench.scheduler.swapped) == ["low 1"]
    assert list(bench.scheduler.waiting) == ["low 2", "low 3"]
    while bench.finish_of("high") is None:
        bench.step()
    assert counts(bench.step()) == {"low 0": 1, "low 1": 1}
    check(bench, *low, high)


def test_more_urgent_ones_come_in_before_the_preempted():
    bench = Bench(slots=1)
    low, high = generate("low", 5, 9, priority=5), [generate(f"high {n}", 5, 4) for n in range(3)]
    start(bench, low)
    start(bench, high[0])
    bench.add(*high[1:])
    order: list[str] = []
    while not bench.scheduler.idle:
        order += [request.id for request in bench.step().requests]
    assert order == ["high 0"] * 3 + ["high 1"] * 4 + ["high 2"] * 4 + ["low"] * 8
    check(bench, low, *high)
    assert bench.scheduler.preemptions["priority"] == 1


@pytest.mark.parametrize("overlap", [False, True])
def test_whenever_it_is_driven_out_it_goes_on_as_if_it_were_not(overlap: bool):
    for steps in range(1, 14):
        bench = Bench(slots=1, max_step_tokens=10, overlap=overlap)
        low, high = generate("low", 35, 9, priority=1), generate("high", 12, 4)
        bench.add(low)
        for _ in range(steps):
            bench.step()
        bench.add(high)
        check(bench, low, high)
        assert bench.scheduler.preemptions["priority"] == (steps < 12)  # then it ends by itself


def test_one_that_reads_its_prompt_goes_on_where_it_was():
    bench = Bench(slots=1, max_step_tokens=10)
    low, high = generate("low", 35, 4, priority=1), generate("high", 12, 2)
    start(bench, low)
    bench.step()
    assert counts(start(bench, high)) == {"high": 10}
    [request] = bench.scheduler.swapped.order
    assert request.computed == 20
    check(bench, low, high)


def test_one_that_has_computed_nothing_leaves_nothing_on_the_host():
    bench = Bench(slots=1, swap_bytes=0)
    bench.begin(generate("low", 9, 4, priority=1), 1)
    bench.step()
    high = generate("high", 5, 3)
    assert counts(start(bench, high)) == {"high": 5}
    assert not bench.runner.saved and list(bench.scheduler.swapped) == ["low"]
    bench.extend("low", 8, more=False)
    check(bench, generate("low", 9, 4), high)


def test_blocks_are_made_free_by_as_few_as_can_be():
    bench = Bench(slots=8, blocks=20, block_size=4)
    low = [generate(f"low {n}", 12, 8, priority=n) for n in range(1, 6)]  # 4 blocks each
    start(bench, *low)
    assert bench.scheduler.holdings.blocks.free == 5 and len(bench.scheduler.running) == 5
    high = generate("high", 30, 3)  # 8 blocks, beside one more for each that goes on
    assert counts(start(bench, high))["high"] == 30
    assert list(bench.scheduler.swapped) == ["low 4", "low 5"]
    check(bench, *low, high)


def test_nobody_leaves_for_one_who_does_not_fit_even_so():
    bench = Bench(slots=4, blocks=16, block_size=4)
    old, low = generate("old", 38, 4), generate("low", 6, 9, priority=5)
    start(bench, old, low)
    high = generate("high", 24, 3)  # 7 blocks, and `old` holds 10 of 16
    start(bench, high)
    assert not bench.scheduler.swapped and "high" in bench.scheduler.waiting
    check(bench, old, low, high)
    assert not bench.scheduler.preemptions["priority"]


def test_the_room_of_one_who_left_is_not_for_those_behind_it():
    bench = Bench(slots=4, blocks=10, block_size=4)
    low = generate("low", 24, 4, priority=1)  # 7 blocks
    start(bench, low)
    behind, high = generate("behind", 14, 3, priority=1), generate("high", 14, 3)
    assert counts(start(bench, behind, high)) == {"high": 14}
    assert list(bench.scheduler.swapped) == ["low"]
    check(bench, low, behind, high)


def test_when_blocks_run_out_the_least_urgent_leaves_however_old():
    bench = Bench(slots=4, blocks=16, block_size=4)
    messages = [generate(id, 10, 30, priority=p) for id, p in [("a", 2), ("bb", 1), ("ccc", 1)]]
    bench.add(*messages)
    while not bench.scheduler.swapped:
        bench.step()
    assert list(bench.scheduler.swapped) == ["a"]
    check(bench, *messages)
    assert bench.scheduler.preemptions["blocks"] and not bench.scheduler.preemptions["priority"]


@pytest.mark.parametrize(("room", "gone"), [(0, []), (7, []), (8, ["d"]), (17, ["c", "d"])])
def test_the_host_has_room_for_so_many(room: int, gone: list[str]):
    bench = Bench(slots=4, swap_bytes=room)  # a state has 8 bytes
    low = [generate(id, 5, 9, priority=5) for id in "abcd"]
    high = [generate(f"high {n}", 5, 4) for n in range(3)]
    start(bench, *low)
    start(bench, *high)
    assert list(bench.scheduler.swapped) == gone
    assert bench.scheduler.stats().swapped_bytes == 8 * len(gone) <= room
    check(bench, *low, *high)
    assert bench.scheduler.stats().swapped_bytes == 0


def test_one_too_large_for_the_host_is_passed_by():
    bench = Bench(slots=2, blocks=32, block_size=4, block_bytes=10, swap_bytes=8 + 3 * 10)
    small, large = generate("small", 9, 9, priority=4), generate("large", 40, 9, priority=5)
    high = generate("high", 5, 3)
    start(bench, small, large)
    start(bench, high)
    assert list(bench.scheduler.swapped) == ["small"]
    check(bench, small, large, high)


def test_urgent_prompts_are_packed_first_behind_those_who_generate():
    bench = Bench(max_step_tokens=10)
    start(bench, generate("low", 3, 30, priority=9))
    bench.add(generate("late", 30, 3, priority=2), generate("soon", 14, 3, priority=1))
    assert counts(bench.step()) == {"low": 1, "soon": 9}
    assert counts(bench.step()) == {"low": 1, "soon": 5, "late": 4}
    assert counts(bench.step()) == {"low": 1, "soon": 1, "late": 8}
    bench.finish()


def test_a_short_budget_goes_to_the_urgent_and_among_equals_in_turns():
    bench = Bench(slots=8, max_step_tokens=3)
    urgent, others = ["a", "b"], ["c", "d", "e", "f"]
    bench.add(*(generate(id, 1, 200, priority=-1) for id in urgent))
    bench.add(*(generate(id, 1, 200) for id in others))
    for _ in range(80):
        assert bench.step().tokens == 3
    assert [len(bench.tokens(id)) for id in urgent] == [80, 80]
    told = [len(bench.tokens(id)) for id in others]
    assert sum(told) == 80 and max(told) - min(told) <= 1


def words(count: int, seed: int) -> list[int]:
    return [(31 * i + 17 * seed + i * i // 7) % 97 for i in range(count)]


def test_who_reads_what_an_urgent_one_waits_for_is_as_urgent_meanwhile():
    bench = Bench(slots=1, caching=True, host_bytes=10_000, max_step_tokens=50)
    document = words(300, 1)
    reader = generate("reader", document + words(20, 2), 30, priority=9)
    start(bench, reader)
    waiter = generate("waiter", document + words(20, 3), 3, priority=-5)
    between = generate("between", words(40, 4), 3, priority=1)
    start(bench, waiter, between)
    assert list(bench.scheduler.running) == ["reader"]  # neither drives it out
    assert bench.scheduler.running["reader"].rank[0] == -5
    while "reader" in bench.scheduler.running:
        bench.step()
    [request] = bench.scheduler.swapped.order
    assert request.computed == 300 and request.rank[0] == 9  # as soon as it has read that
    assert list(bench.scheduler.running) == ["waiter"]
    bench.finish()
    assert bench.outputs["waiter"][-1].cached == 300
    for message in (reader, waiter, between):
        assert bench.result(message.id) == alone(message)


def test_a_preempted_reader_returns_for_the_urgent_one_that_waits_for_it():
    bench = Bench(slots=1, caching=True, host_bytes=10_000, max_step_tokens=50)
    document = words(300, 1)
    reader = generate("reader", [*document, 1], 30, priority=9)
    first, waiter = generate("first", words(40, 2), 6, priority=-9), [*document, 2]
    start(bench, reader)
    start(bench, first)
    waiting = generate("waiter", waiter, 3, priority=-5)
    start(bench, waiting, generate("between", words(40, 4), 3, priority=1))
    order: list[str] = []
    while not bench.scheduler.idle:
        running = list(bench.scheduler.running)
        order += [id for id in running if id not in order[-1:]]
        bench.step()
    assert order == ["first", "reader", "waiter", "between", "reader"]
    assert bench.scheduler.preemptions["priority"] == 2
    for message in (reader, first, waiting):
        assert bench.result(message.id) == alone(message)


def test_the_urgency_of_one_that_leaves_is_taken_back():
    bench = Bench(slots=1, caching=True, host_bytes=10_000, max_step_tokens=50)
    document = words(300, 1)
    start(bench, generate("reader", [*document, 1], 30, priority=9))
    start(bench, generate("waiter", [*document, 2], 3, priority=-5))
    bench.add(generate("between", words(40, 4), 3, priority=1))
    bench.abort("waiter")
    bench.step()
    assert list(bench.scheduler.running) == ["between"]
    bench.finish()


def test_those_who_wait_for_one_are_not_asked_until_it_is_there(monkeypatch: pytest.MonkeyPatch):
    bench = Bench(slots=2, caching=True, host_bytes=10_000, max_step_tokens=50)
    patience, asked = bench.scheduler.admission.patience, []
    worth = patience.worth
    monkeypatch.setattr(
        patience, "worth", lambda request, *of: asked.append(request.id) or worth(request, *of)
    )
    document = words(300, 1)
    start(bench, generate("reader", [*document, 1], 3, priority=9))
    copies = [generate(f"copy {n}", [*document, 2, n], 3, priority=n) for n in range(30)]
    start(bench, *copies)
    bench.abort("copy 0", "copy 7")
    assert asked == ["reader", *(copy.id for copy in copies)]
    ranks = []
    while "reader" in bench.scheduler.running and bench.scheduler.running["reader"].computed < 300:
        ranks.append(bench.scheduler.running["reader"].rank[0])
        bench.step()
    assert ranks[0] == 0 and set(ranks[1:]) == {1}  # as urgent as the first who is still there
    assert len(asked) == 31
    bench.finish()
    for copy in copies:
        if copy.id not in ("copy 0", "copy 7"):
            assert bench.result(copy.id) == alone(copy)
            assert bench.outputs[copy.id][-1].cached >= 300


@pytest.mark.parametrize("order", [1, -1])
def test_one_does_not_pause_for_each_of_many_that_part_from_it(order: int):
    bench = Bench(slots=4, caching=True, host_bytes=10_000_000, max_step_tokens=512)
    document = words(1500, 1)
    start(bench, generate("reader", document, 3))
    others = [generate(f"{n}", [*document[: 700 + n], 96, 96], 2) for n in range(300)][::order]
    bench.add(*others)
    steps = 0
    while bench.finish_of("reader") is None:
        bench.step()
        steps += 1
    assert steps < 50
    bench.finish()
    for other in others:
        assert bench.result(other.id) == alone(other)
        assert bench.outputs[other.id][-1].cached > len(other.tokens) // 4 - 40


def test_copies_of_an_urgent_prompt_drive_out_as_many_as_they_are():
    bench = Bench(slots=4, caching=True, host_bytes=10_000)
    low = [generate(f"low {n}", words(40, n), 40, priority=5) for n in range(4)]
    start(bench, *low)
    copies = [generate(f"copy {n}", words(200, 9), 5) for n in range(3)]
    bench.add(*copies)
    seen = 0
    while not bench.scheduler.idle:
        bench.step()
        seen = max(seen, sum(id.startswith("copy") for id in bench.scheduler.running))
    assert seen == 3 and bench.scheduler.preemptions["priority"] == 3
    for message in [*low, *copies]:
        assert bench.result(message.id) == alone(message)
    assert [bench.outputs[m.id][-1].cached for m in copies] == [0, 199, 199]


def test_a_reading_gives_way_and_is_kept_all_the_same():
    bench = Bench(slots=1, caching=True, host_bytes=10_000, max_step_tokens=50)
    tokens = words(200, 1)
    bench.add(Read(id="reading", tokens=pack_tokens(tokens), priority=5))
    bench.step()
    high = generate("high", words(60, 2), 3)
    start(bench, high)
    assert list(bench.scheduler.swapped) == ["reading"]
    bench.finish()
    state = bench.outputs["reading"][-1].state
    assert state is not None and state.count == 200
    assert bench.result("high") == alone(high)
    message = generate("on", [5, 6], 4)
    message.base = state.key
    bench.add(message)
    bench.finish()
    assert bench.result("on") == alone(generate("on", [*tokens, 5, 6], 4))


def test_a_reading_whose_last_step_is_under_way_is_let_end():
    bench = Bench(slots=1, caching=True, host_bytes=10_000, overlap=True)
    bench.add(Read(id="reading", tokens=pack_tokens(words(64, 1)), priority=5))
    assert counts(bench.step()) == {"reading": 64}
    high = generate("high", words(60, 2), 3)
    assert counts(start(bench, high)) == {}
    state = bench.outputs["reading"][-1].state
    assert state is not None and state.count == 64
    assert counts(bench.step()) == {"high": 59}
    bench.finish()
    assert bench.result("high") == alone(high)
    assert not bench.scheduler.preemptions.total()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_reading_is_kept_whenever_blocks_run_out(overlap: bool):
    preempted = 0
    for known in range(20, 60, 3):
        bench = Bench(
            slots=5, blocks=60, block_size=4, caching=True, overlap=overlap, host_bytes=100_000,
            max_step_tokens=20,
        )  # fmt: skip
        others = [generate(f"other {n}", words(known, n), 90) for n in range(4)]
        bench.add(*others)
        for _ in range(10):
            bench.step()
        bench.add(Read(id="reading", tokens=pack_tokens(words(64, 9))))
        bench.finish()
        state = bench.outputs["reading"][-1].state
        assert state is not None and state.count == 64
        assert all(bench.result(other.id) == alone(other) for other in others)
        preempted += bench.scheduler.preemptions["blocks"]
    assert preempted


def test_an_abort_of_a_preempted_one_leaves_nothing():
    bench = Bench(slots=1)
    start(bench, generate("low", 5, 9, priority=5))
    start(bench, generate("high", 5, 9))
    assert "low" in bench.runner.saved
    bench.abort("low", "high")
    bench.step()
    assert bench.runner.saved == {} and bench.scheduler.idle


@pytest.mark.parametrize(("kind", "ring"), [("pure", 0), ("window", 8), ("hybrid", 0)])
def test_states_of_real_models_return_as_they_were(
    kind: str, ring: int, tmp_path_factory: pytest.TempPathFactory
):
    """Penalties remember what was seen, rings what is not folded yet; on a GPU steps overlap."""
    runner = load(tmp_path_factory.mktemp("models"), kind, ring=ring, device="auto")
    low = [
        msgspec.structs.replace(
            generate(f"low {n}", words(30 + 7 * n, n), 24, priority=1),
            sampling=Sampling(seed=n, top_k=20, repetition_penalty=1.2, logprobs=0),
        )
        for n in range(runner.capacity.slots)
    ]
    high = [generate(f"high {n}", words(50, 90 + n), 3 + n) for n in range(6)]
    told: list[dict[str, list[tuple[int, float]]]] = []
    for disturbed in (False, True):
        bench = Bench(runner=runner, max_step_tokens=512)
        bench.add(*low)
        for turn in range(12):
            bench.step()
            if disturbed and turn % 2:
                bench.add(high[turn // 2])
        bench.finish()
        assert (bench.scheduler.preemptions["priority"] >= 4) == disturbed
        told.append(
            {
                message.id: [
                    (token, entry.logprob)
                    for output in bench.outputs[message.id]
                    for token, entry in zip(
                        unpack_tokens(output.tokens), output.logprobs or (), strict=True
                    )
                ]
                for message in low
            }
        )
    for message in low:
        for (token, logprob), (other, expected) in zip(*(t[message.id] for t in told), strict=True):
            assert token == other and logprob == pytest.approx(expected, abs=1e-4)
        assert len(told[0][message.id]) == 24


class Ranks(RuleBasedStateMachine):
    """Random traffic; after every step the order is what its rules say, and at the end each has
    what it would have alone, with nothing computed twice."""

    @initialize(
        slots=st.integers(1, 4),
        blocks=st.sampled_from([0, 0, 9, 14]),
        budget=st.sampled_from([1, 3, 16, 64]),
        room=st.sampled_from([0, 16, 1 << 30]),
        overlap=st.booleans(),
    )
    def start(self, slots: int, blocks: int, budget: int, room: int, overlap: bool) -> None:
        sizes = {"blocks": blocks, "block_size": 4, "block_bytes": 4} if blocks else {}
        self.bench = Bench(
            slots=slots, max_step_tokens=budget, swap_bytes=room, overlap=overlap, **sizes
        )
        self.bench.scheduler.schedule = self.schedule
        self.max_length = self.bench.scheduler.max_length
        self.room = room
        self.sent: dict[str, Generate] = {}
        self.aborted: set[str] = set()

    @rule(
        size=st.integers(1, 12), max_tokens=st.integers(1, 20), priority=st.integers(-2, 2),
        copies=st.sampled_from([1, 1, 1, 3]),
    )  # fmt: skip
    def arrive(self, size: int, max_tokens: int, priority: int, copies: int) -> None:
        for _ in range(copies):
            message = generate(str(len(self.sent)), size, max_tokens, priority=priority)
            self.sent[message.id] = message
            self.bench.add(message)

    @rule(pick=st.integers(0, 1000))
    def abort(self, pick: int) -> None:
        if self.sent:
            id = str(pick % len(self.sent))
            if self.bench.finish_of(id) is None:
                self.aborted.add(id)
            self.bench.abort(id)

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.bench.step()

    def schedule(self, now: float) -> Work:
        """What the scheduler does, watched."""
        scheduler = self.bench.scheduler
        ran, swapped = dict(scheduler.running), dict(scheduler.swapped)
        preempted, bytes_before = scheduler.preemptions.copy(), scheduler.stats().swapped_bytes
        work = Scheduler.schedule(scheduler, now)
        self.in_order()
        left = [request for id, request in scheduler.swapped.items() if id not in swapped]
        entered = [request for id, request in scheduler.running.items() if id not in ran]
        stayed = [*scheduler.waiting.order, *scheduler.swapped.order]
        for_blocks = scheduler.preemptions["blocks"] - preempted["blocks"]
        for_others = scheduler.preemptions["priority"] - preempted["priority"]
        # who left was running; nobody came in and left at once
        assert all(request.id in ran for request in left)
        assert len(left) == for_blocks + for_others
        # nobody leaves but for more urgent ones, as many as it takes, while the host has room
        if for_others and not for_blocks:
            assert all(request.priority > entered[0].priority for request in left)
            assert scheduler.stats().swapped_bytes <= max(self.room, bytes_before)
            if not scheduler.holdings.block_size:
                assert scheduler.holdings.slots.free == 0
        # nobody comes in before one that is served before
        for request in entered:
            for other in stayed:
                if other in left:
                    assert request.rank < other.rank
                else:
                    assert self.place(request, swapped) < self.place(other, swapped)
        # a slot is idle only where blocks are scarce, and the most urgent have the slots
        if stayed and not scheduler.holdings.block_size:
            assert scheduler.holdings.slots.free == 0
            if self.room > 16:
                first = min(request.priority for request in stayed)
                running = scheduler.running.order
                assert all(r.priority <= first for r in running if not r.ending)
        return work

    def place(self, request: Request, swapped: dict[str, Request]) -> tuple[int, bool, int]:
        return request.priority, request.id not in swapped, request.rank[1]

    def in_order(self) -> None:
        scheduler = self.bench.scheduler
        queues = (scheduler.waiting, scheduler.running, scheduler.swapped)
        ids = [id for queue in queues for id in queue]
        assert len(ids) == len(set(ids))
        for queue in queues:
            ranks = [request.rank for request in queue.order]
            assert ranks == sorted(ranks)
            assert all(request.rank[0] == request.priority for request in queue.order)
        assert all(request.slot is not None for request in scheduler.running.order)
        for queue in (scheduler.waiting, scheduler.swapped):
            assert all(r.slot is None and not r.blocks for r in queue.order)

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.bench.finish()
        total = 0
        for id, message in self.sent.items():
            tokens, finish = alone(message, self.max_length)
            told = self.bench.tokens(id)
            if id in self.aborted:
                assert told == tokens[: len(told)]
            else:
                assert self.bench.result(id) == (tokens, finish)
                total += len(message.tokens) // 4 + len(tokens) - 1
        if not self.aborted:
            assert computed(self.bench) == total
        assert self.bench.runner.saved == {}
        assert self.bench.scheduler.stats().swapped_bytes == 0


Ranks.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestRanks = Ranks.TestCase


def test_a_state_of_blocks_counts_with_them():
    holdings = Bench(blocks=9, block_size=4, block_bytes=10).scheduler.holdings
    assert capacity().state_bytes == 8
    assert [holdings.bytes_for(n) for n in (0, 1, 4, 5)] == [8, 18, 18, 28]
