"""The loop between its inbox and its runner: what it publishes, what it survives."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from model.chunk import PENDING
from server.engine import loop as loop_module
from server.engine.loop import Loop
from server.protocol import Abort, FromEngine, Output, Ready, Step, unpack_tokens
from tests.server.engine.bench import alone, capacity, generate
from tests.server.fake_engine import BUG, NAN, OOM, FakeRunner

TRAP = 13


class Post:
    """A mailbox in memory."""

    def __init__(self) -> None:
        self.inbox: list[bytes] = []
        self.sent: list[FromEngine] = []
        self.waits: list[float] = []

    def receive(self, timeout: float) -> list[bytes]:
        self.waits.append(timeout)
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, message: FromEngine) -> None:
        self.sent.append(msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=FromEngine))

    def put(self, *messages: Any) -> None:
        self.inbox += [msgspec.msgpack.encode(message) for message in messages]

    def outputs(self, id: str) -> list[Output]:
        steps = [message for message in self.sent if isinstance(message, Step)]
        return [output for step in steps for output in step.outputs if output.id == id]

    def result(self, id: str) -> tuple[list[int], str | None]:
        outputs = self.outputs(id)
        assert all(output.finish is None for output in outputs[:-1])
        return list(unpack_tokens(b"".join(o.tokens for o in outputs))), outputs[-1].finish


def machine(
    *, max_step_tokens: int = 64, trap: str = OOM, overlap: bool = False, **fields: Any
) -> tuple[Loop, Post]:
    post = Post()
    runner = FakeRunner(
        capacity=capacity(**fields),
        max_step_tokens=max_step_tokens,
        traps={TRAP: trap},
        overlaps=overlap,
    )
    return Loop(runner, post, clock=lambda: 7.0), post


def run(loop: Loop, *, limit: int = 1000) -> None:
    loop.turn()
    while not loop.scheduler.idle:
        loop.turn()
        limit -= 1
        assert limit
    loop.scheduler.check_integrity()


def test_a_turn_reads_computes_and_publishes_one_message():
    loop, post = machine()
    post.put(generate("a", 5, 3), generate("bb", 4, 3))
    loop.turn()
    [step] = post.sent
    assert [output.id for output in step.outputs] == ["a", "bb"]
    assert [output.started for output in step.outputs] == [7.0, 7.0]
    assert (step.stats.running, step.stats.slots_used, step.stats.step_tokens) == (2, 2, 9)
    assert step.stats.device_memory == 1_000_000
    assert (step.stats.device_free, step.stats.device_total) == (3_000_000, 4_000_000)
    run(loop)
    assert post.result("a") == alone(generate("a", 5, 3))
    assert post.sent[-1].stats.slots_used == 0
    assert len(post.sent) == 3


def test_a_device_that_computes_is_not_asked_for_its_memory(monkeypatch: pytest.MonkeyPatch):
    """It would answer after the step: what the one before has brought would come a step late."""
    monkeypatch.setattr(loop_module, "MEMORY_SECONDS", 0.0)
    loop, post = machine(overlap=True)
    held, asked = 1_000_000, []

    def room() -> tuple[int, int]:
        asked.append(loop._under_way is not None)
        return 3_000_000, 4_000_000

    monkeypatch.setattr(loop.runner, "device_room", room)
    monkeypatch.setattr(loop.runner, "device_memory", lambda: held)
    loop.run(lambda: False)
    assert asked == [False]
    post.put(generate("a", 5, 6))
    while not post.outputs("a"):
        loop.turn()
    held += 200_000
    loop.turn()
    stats = post.sent[-1].stats
    assert asked == [False] and loop._under_way is not None
    assert (stats.device_memory, stats.device_free) == (1_200_000, 2_800_000)
    assert stats.device_total == 4_000_000
    run(loop)
    assert asked == [False, False]  # after the last step
    assert post.sent[-1].stats.device_free == 3_000_000


def test_an_engine_that_comes_to_rest_asks_the_device_anew(monkeypatch: pytest.MonkeyPatch):
    """However lately it had taken what is free to be what it was."""
    loop, post = machine(overlap=True)
    now = 7.0
    monkeypatch.setattr(loop, "clock", lambda: now)
    asked: list[float] = []

    def room() -> tuple[int, int]:
        asked.append(now)
        return 3_000_000, 4_000_000

    monkeypatch.setattr(loop.runner, "device_room", room)
    loop.run(lambda: False)
    for now in (8.0, 8.1, 9.0):
        post.put(generate(str(now), 5, 3))
        run(loop)
    assert asked == [7.0, 8.0, 9.0]  # not again within half a second


def test_ready_comes_first_and_an_unwanted_engine_stops():
    loop, post = machine()
    turns = iter([True, True, False])
    loop.run(lambda: next(turns))
    [ready] = post.sent
    assert isinstance(ready, Ready) and ready.capacity.slots == 4 and ready.stats.slots_total == 4


def test_it_waits_for_messages_only_when_idle():
    loop, post = machine()
    loop.turn(0.5)
    post.put(generate("a", 5, 3))
    for _ in range(5):
        loop.turn(0.5)
    assert post.waits == [0.5, 0.5, 0.0, 0.0, 0.5, 0.5]
    assert len(post.sent) == 3  # nothing is said without news


@pytest.mark.parametrize("overlap", [False, True])
def test_no_request_waits_until_the_books_are_looked_through(
    overlap: bool, monkeypatch: pytest.MonkeyPatch
):
    loop, post = machine(overlap=overlap)
    looked: list[str] = []
    check = loop.scheduler.check_integrity

    def noted() -> None:
        looked.append(post.sent[-1].outputs[0].id)
        check()

    monkeypatch.setattr(loop.scheduler, "check_integrity", noted)
    for id in ("a", "bb"):
        post.put(generate(id, 5, 2))
        while not post.outputs(id) or post.outputs(id)[-1].finish is None:
            loop.turn()
    assert not looked  # the second was there when the first had ended
    for _ in range(3):
        loop.turn()
    assert looked == ["bb"]  # once: nothing has changed since
    post.put(generate("ccc", 5, 2))
    for _ in range(5):
        loop.turn()
    assert looked == ["bb", "ccc"]


def test_wrong_books_end_an_engine_that_rests():
    loop, post = machine()
    post.put(generate("a", 5, 2))
    loop.turn()
    loop.scheduler.holdings.slots.take("nobody")
    loop.turn()
    assert post.result("a") == alone(generate("a", 5, 2))
    with pytest.raises(AssertionError, match="a slot per running request"):
        loop.turn()


def test_a_step_out_of_device_memory_ends_its_requests_alone():
    loop, post = machine(slots=2)
    bad, fine = generate("bad", [1, TRAP, 2]), generate("fine", [4, 5], 4)
    later = generate("later", [6, 7], 4)
    post.put(generate("early", [1, 2], 4), bad, later)
    loop.turn()
    for id in ("early", "bad"):
        [output] = post.outputs(id)
        assert output.finish == "error" and "device memory" in output.error
    assert loop.scheduler.holdings.slots.held == 0
    post.put(fine)
    run(loop)
    assert post.result("fine") == alone(fine) and post.result("later") == alone(later)


def test_logits_that_are_not_finite_end_their_request_alone():
    loop, post = machine(trap=NAN)
    good = generate("good", [1, 2, 3], 6)
    post.put(generate("bad", [1, TRAP, 2]), good)
    run(loop)
    [output] = post.outputs("bad")
    assert (output.finish, output.error) == ("error", "logits were not finite")
    assert post.result("good") == alone(good)


def test_anything_else_from_the_runner_is_fatal():
    loop, post = machine(trap=BUG)
    post.put(generate("bad", [TRAP]))
    with pytest.raises(RuntimeError, match="unforeseen"):
        loop.turn()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe garbage",
        b"\x81\xa2id\xc4\x01a",
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({"type": "Abort", "ids": 3}),
        msgspec.msgpack.encode({"type": "Destroy"}),
        msgspec.msgpack.encode({"type": "Generate", "id": 4}),
    ],
)
def test_a_message_that_means_nothing_is_passed_over(data: bytes):
    loop, post = machine()
    post.put(generate("a", 5, 3))
    loop.turn()
    post.inbox.append(data)
    run(loop)
    assert post.result("a") == alone(generate("a", 5, 3))
    assert all(output.id == "a" for step in post.sent for output in step.outputs)


def test_a_malformed_message_with_an_id_is_answered():
    loop, post = machine()
    post.put({"type": "Generate", "id": "x", "tokens": "no bytes"}, generate("y", [97]))
    loop.turn()
    assert post.result("x") == post.result("y") == ([], "error")
    assert "97" in post.outputs("y")[0].error and post.outputs("x")[0].error


def test_a_second_message_of_an_id_under_way_does_not_end_the_first():
    loop, post = machine()
    post.put(generate("a", 5, 9))
    loop.turn()
    post.put(generate("a", 3, 2), {"type": "Generate", "id": "a"})
    run(loop)
    assert post.result("a") == alone(generate("a", 5, 9))


def test_an_abort_is_confirmed_even_when_nothing_is_left_to_compute():
    loop, post = machine()
    post.put(generate("a", 5, 100))
    loop.turn()
    post.put(Abort(["a", "nobody"]))
    loop.turn()
    assert post.outputs("a")[-1].finish == "abort"
    assert post.sent[-1].stats.slots_used == 0 and not post.outputs("nobody")


def test_an_abort_behind_its_own_request_in_the_inbox():
    loop, post = machine()
    post.put(generate("a", 5, 100), Abort(["a"]), generate("a", 4, 2))
    run(loop)
    assert post.outputs("a")[0].finish == "abort"
    assert not loop.runner.steps[0][0].start and len(loop.runner.steps[0]) == 1


def test_preemption_goes_through_the_runner():
    loop, post = machine(blocks=16, block_size=4)
    loop.runner.traps.clear()
    messages = [generate(id, 10, 30) for id in ("a", "bb", "ccc")]
    post.put(*messages)
    run(loop)
    assert post.sent[-1].stats.preemptions["blocks"] >= 1 and loop.runner.saved == {}
    for message in messages:
        assert post.result(message.id) == alone(message)


def test_with_overlap_a_step_is_launched_before_the_last_is_collected():
    loop, post = machine(overlap=True)
    message = generate("a", 5, 3)
    post.put(message)
    said = []
    for _ in range(5):
        loop.turn(0.5)
        said.append((len(loop.runner.steps), len(loop.runner.under_way), len(post.outputs("a"))))
    # three steps for three tokens, each told while the next one runs; nothing after the last
    assert said == [(1, 1, 0), (2, 1, 1), (3, 1, 2), (3, 0, 3), (3, 0, 3)]
    assert [list(step[0].tokens) for step in loop.runner.steps[1:]] == [[PENDING]] * 2
    assert post.waits == [0.5, 0.0, 0.0, 0.0, 0.5]
    assert post.result("a") == alone(message)


def test_with_overlap_a_stop_costs_one_row_and_changes_nothing():
    loop, post = machine(overlap=True)
    free = alone(generate("a", 5, 9))[0]
    messages = [
        generate("a", 5, 9, stop=[free[3]]), generate("bb", 7, 9),
        generate("ccc", 6, 30, min_tokens=6, stop=range(40)),
    ]  # fmt: skip
    post.put(*messages)
    run(loop)
    for message in messages:
        assert post.result(message.id) == alone(message)
    rows = sum(len(step) for step in loop.runner.steps)
    ended = [alone(message) for message in messages]
    stops = sum(finish == "stop" for _, finish in ended)
    assert rows == sum(len(tokens) for tokens, _ in ended) + stops and stops == 2
    assert loop.scheduler.holdings.slots.held == 0


def test_with_overlap_nobody_waits_for_a_slot_that_was_just_given_back():
    loop, post = machine(overlap=True, slots=1)
    post.put(generate("a", 5, 3), generate("bb", 7, 3))
    while not post.outputs("bb") or post.outputs("bb")[-1].finish is None:
        loop.turn(0.5)
    assert post.waits == [0.5] + [0.0] * (len(post.waits) - 1)


def test_with_overlap_a_lost_step_keeps_what_was_drawn_before_it():
    """The step that draws the last token is under way when the next one runs out of memory."""
    loop, post = machine(overlap=True)
    done, going = generate("done", [1, 2], 3), generate("going", [3, 4], 9)
    post.put(done, going)
    loop.turn()
    loop.turn()
    loop.turn()
    post.put(generate("bad", [1, TRAP, 2]))
    run(loop)
    assert post.result("done") == alone(done)
    assert post.result("bad") == ([], "error")
    tokens, finish = post.result("going")
    assert finish == "error" and tokens == alone(going)[0][: len(tokens)] and len(tokens) == 3
    assert loop.scheduler.holdings.slots.held == 0
    post.put(generate("fine", [4, 5], 4))
    run(loop)
    assert post.result("fine") == alone(generate("fine", [4, 5], 4))


def test_with_overlap_who_is_aborted_or_preempted_leaves_no_trace():
    loop, post = machine(overlap=True, blocks=16, block_size=4, slots=3)
    loop.runner.traps.clear()
    messages = [generate(id, 10, 30) for id in ("a", "bb", "ccc")]
    post.put(*messages, generate("dddd", 9, 50))
    for _ in range(4):
        loop.turn()
    post.put(Abort(["a"]))
    run(loop)
    assert post.outputs("a")[-1].finish == "abort"
    assert post.sent[-1].stats.preemptions["blocks"] >= 1 and loop.runner.saved == {}
    for message in messages[1:]:
        assert post.result(message.id) == alone(message)
