"""The budget of a step finds the time between tokens that it aims at, whatever steps cost, stays
there, and is not led astray."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from random import Random

import numpy
import pytest

from server.engine.budget import LEAST, Budget
from server.engine.loop import Loop
from tests.server.engine.bench import Bench, alone, capacity, counts, generate
from tests.server.engine.test_loop import Post
from tests.server.fake_engine import OOM, FakeRunner

TARGET = 0.030
MOST = 8192
Cost = Callable[[int, int, int], float]  # prompt tokens, rows, position of the prompt -> seconds


def fixed(rows: int) -> float:
    return 0.008 + 2e-5 * rows


def linear(tokens: int, rows: int, position: int) -> float:
    return fixed(rows) + 3e-6 * tokens


def cliff(tokens: int, rows: int, position: int) -> float:
    """Beyond 3,000 tokens a step costs half as much again."""
    return linear(tokens, rows, position) + (0.015 if tokens > 3000 else 0.0)


def stairs(tokens: int, rows: int, position: int) -> float:
    return fixed(rows) + 0.004 * math.ceil(tokens / 1024)


def growing(tokens: int, rows: int, position: int) -> float:
    """Attention over what was read before."""
    return fixed(rows) + 3e-6 * tokens * (1 + position / 200_000)


class Machine:
    """A step is known as late as when the one after it has been given its tokens, or at once."""

    def __init__(self, cost: Cost, *, noise: float = 0.0, late: bool = False, seed: int = 1):
        self.budget = Budget(MOST, TARGET)
        self.cost = cost
        self.noise = noise
        self.late = late
        self.rng = Random(seed)
        self.position = 0
        self.sizes: list[int] = []
        self.times: list[float] = []
        self.untold: list[tuple[int, int, float]] = []

    def decode(self, steps: int, rows: int) -> None:
        for _ in range(steps):
            self.budget.learn(0, rows, 0.7 * fixed(rows))

    def read(self, steps: int, rows: int = 64, stall: float = 0.0) -> Machine:
        for _ in range(steps):
            tokens = self.budget.give(rows) - rows
            seconds = self.cost(tokens, rows, self.position)
            seconds *= math.exp(self.rng.gauss(0, self.noise))
            self.sizes.append(tokens)
            self.times.append(seconds)
            self.position += tokens
            if self.rng.random() < stall:
                seconds += self.rng.choice([0.1, 1, 10])
            self.untold.append((tokens, rows, seconds))
            while len(self.untold) > self.late:
                self.budget.learn(*self.untold.pop(0))
        return self

    def share_over(self, last: int) -> float:
        """Of the last steps, those that took longer than the target."""
        return float(numpy.mean([seconds > TARGET for seconds in self.times[-last:]]))

    def changes(self, last: int) -> float:
        """In how many of the last steps the size was another than before."""
        return float(numpy.mean([a != b for a, b in pairwise(self.sizes[-last:])]))


def best(cost: Cost, rows: int = 64, position: int = 0) -> int:
    """The largest size that fits the target."""
    sizes = Budget(MOST, TARGET).sizes
    return max((n for n in sizes if cost(n, rows, position) <= TARGET), default=sizes[0])


late = pytest.mark.parametrize("late", [False, True])


@late
@pytest.mark.parametrize("cost", [linear, stairs])
def test_it_comes_to_rest_below_the_target(cost: Cost, late: bool):
    machine = Machine(cost, late=late)
    machine.decode(20, 64)
    machine.read(40)
    assert machine.share_over(40) == 0.0  # not even on the way
    machine.read(3000)
    assert machine.changes(3000) == 0.0 and machine.share_over(3000) == 0.0
    assert 0.88 * best(cost) <= machine.sizes[-1] <= best(cost)


@late
def test_a_cliff_is_remembered(late: bool):
    machine = Machine(cliff, late=late).read(100)
    machine.read(5000)
    assert best(cliff) == 2896 and numpy.median(machine.sizes) == 2896
    assert machine.share_over(5000) < 0.01 and machine.changes(5000) < 0.01


@late
@pytest.mark.parametrize("cost", [linear, cliff, stairs, growing])
def test_noise_moves_it_little(cost: Cost, late: bool):
    machine = Machine(cost, noise=0.05, late=late)
    machine.decode(20, 64)
    machine.read(1500)
    times = numpy.array(machine.times[100:])
    typical = cost(best(cost, 64, 0), 64, 0) if cost is cliff else TARGET
    assert 0.8 * typical <= numpy.median(times) <= 1.01 * TARGET
    assert numpy.percentile(times, 99) <= 1.2 * TARGET
    assert machine.changes(1400) < 0.1


@late
def test_it_shrinks_as_attention_grows_and_grows_for_the_next_prompt(late: bool):
    machine = Machine(growing, late=late).read(1500)
    assert machine.position > 1_000_000
    assert max(machine.times) < 1.1 * TARGET
    assert 0.9 * TARGET < numpy.median(machine.times) <= TARGET
    assert machine.sizes[-1] <= best(growing, 64, machine.position) < best(growing) / 4
    machine.position = 0
    machine.read(40)
    assert machine.sizes[-1] > 0.8 * best(growing, 64, machine.position)


@late
def test_stalls_are_no_news_but_a_slower_machine_is(late: bool):
    calm = Machine(linear, late=late).read(1000)
    shaken = Machine(linear, late=late).read(1000, stall=0.02)
    assert numpy.mean(shaken.sizes) > 0.98 * numpy.mean(calm.sizes)
    calm.cost = lambda *step: 2.5 * linear(*step)
    calm.read(20)
    calm.read(200)
    assert calm.share_over(200) <= 0.02
    assert calm.sizes[-1] > 0.6 * best(calm.cost)


def test_a_first_step_that_compiles_is_forgotten():
    budget = Budget(MOST, TARGET)
    budget.learn(budget.give(64) - 64, 64, 40.0)
    assert budget.give(64) == 64 + LEAST
    for _ in range(40):
        tokens = budget.give(64) - 64
        budget.learn(tokens, 64, linear(tokens, 64, 0))
    assert budget.give(64) - 64 > 0.8 * best(linear)


@late
def test_a_stall_just_before_a_prompt_is_forgotten(late: bool):
    machine = Machine(linear, late=late)
    machine.decode(20, 64)
    machine.budget.learn(0, 64, 10.0)
    machine.read(40)
    assert machine.sizes[-1] > 0.8 * best(linear)


@late
def test_more_and_fewer_rows(late: bool):
    machine = Machine(linear, late=late)
    for _ in range(5):
        for rows in (8, 256):
            machine.read(200, rows)
            assert machine.share_over(190) < 0.02
            assert machine.sizes[-1] > 0.75 * best(linear, rows)


def test_a_target_out_of_reach_leaves_the_least():
    machine = Machine(lambda *step: 0.05).read(200)
    assert set(machine.sizes) == {LEAST}


def test_without_a_target_or_decoding_it_is_all_there_is():
    assert Budget(1000).give(10) == Budget(1000, TARGET).give(0) == 1000
    budget = Budget(1000)
    for _ in range(10):
        budget.learn(900, 64, 5.0)
    assert budget.give(64) == budget.given == 1000


@pytest.mark.parametrize("most", [1, 2, 63, 64, 65, 1000, 2048, 8192])
def test_it_is_within_bounds(most: int):
    budget, rng = Budget(most, TARGET), Random(most)
    for _ in range(500):
        rows = rng.choice([0, 1, 5, most // 2, most, 2 * most])
        given = budget.give(rows)
        assert 1 <= given <= most
        assert given > rows or given == most  # a prompt advances where there is room
        budget.learn(max(given - rows, 0), rows, rng.choice([0.0, 1e-6, 0.01, 0.03, 1.0, 1e4]))
    assert budget.sizes[-1] == most and budget.sizes == sorted(set(budget.sizes))


def test_short_prompts_and_prompts_alone_teach_nothing_wrong():
    machine = Machine(linear).read(50)
    size = machine.sizes[-1]
    for tokens in (1, 5, 300, 2000):
        machine.budget.learn(tokens, 64, linear(tokens, 64, 0))
        machine.budget.learn(MOST, 0, linear(MOST, 0, 0))
    assert machine.budget.give(64) - 64 == size


def test_short_prompts_that_take_too_long_are_heard():
    machine = Machine(linear).read(50)
    for _ in range(3):
        machine.budget.learn(500, 64, 0.05)
    assert machine.budget.give(64) - 64 < 500


def test_the_scheduler_packs_what_the_budget_gives():
    bench = Bench(slots=4, max_step_tokens=1000, target_seconds=TARGET)
    bench.add(generate("reader", 1500, 2))
    assert counts(bench.step()) == {"reader": 1000}  # nobody decodes
    message = generate("chat", 5, 60)
    bench.add(message)
    assert bench.step().tokens == 505
    bench.add(generate("late", 3000, 2))
    assert counts(bench.step()) == {"chat": 1, "reader": 1, "late": LEAST}
    assert bench.scheduler.stats().step_budget == LEAST + 2
    bench.scheduler.budget.learn(LEAST, 1, 0.001)
    assert counts(bench.step()) == {"chat": 1, "late": 2 * LEAST}
    bench.finish()
    assert bench.result("chat") == alone(message)


class TimedRunner(FakeRunner):
    """A step takes 4 s and 10 ms a token, one after the other."""

    now = 100.0
    free = 0.0

    def launch(self, chunks):
        self.free = max(self.free, self.now) + 4 + 0.01 * sum(len(c.tokens) for c in chunks)
        return super().launch(chunks), self.free

    def collect(self, launched):
        self.now = max(self.now, launched[1])
        return super().collect(launched[0])


@pytest.mark.parametrize(("overlaps", "between"), [(False, 7.01), (True, 4.01)])
def test_the_loop_times_steps_from_one_to_the_next(overlaps: bool, between: float):
    """Publishing and scheduling take 3 s; a wait for messages is no step's time."""
    post, learned = Post(), []
    runner = TimedRunner(capacity=capacity(), max_step_tokens=64, overlaps=overlaps)

    def receive(timeout: float) -> list[bytes]:
        runner.now += 50 if timeout else 3
        return Post.receive(post, timeout)

    post.receive = receive
    loop = Loop(runner, post, clock=lambda: runner.now, target_seconds=TARGET)
    loop.scheduler.budget.learn = lambda *step: learned.append(step)
    for prompt in (10, 20):
        post.put(generate(f"{prompt}", prompt, 3))
        for _ in range(5):
            loop.turn(0.5)
    rounded = [(tokens, rows, round(seconds, 6)) for tokens, rows, seconds in learned]
    assert rounded == [
        (10, 0, 4.1), (0, 1, between), (0, 1, between),
        (20, 0, 4.2), (0, 1, between), (0, 1, between),
    ]  # fmt: skip


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_time_of_a_lost_step_is_no_others(overlaps: bool):
    """It takes 1000 s until the device says that it has no memory left."""

    class Failing(TimedRunner):
        def launch(self, chunks):
            if any(13 in chunk.tokens for chunk in chunks):
                self.now += 1000
            return super().launch(chunks)

    post, learned = Post(), []
    runner = Failing(capacity=capacity(), max_step_tokens=64, overlaps=overlaps, traps={13: OOM})
    loop = Loop(runner, post, clock=lambda: runner.now, target_seconds=TARGET)
    loop.scheduler.budget.learn = lambda *step: learned.append(step[2])
    post.put(generate("a", [1, 2], 4), generate("b", [3], 4))
    loop.turn()
    post.put(generate("lost", [13], 4))
    loop.turn()
    assert loop.scheduler.idle
    runner.free = runner.now
    post.put(generate("c", [1, 2], 4))
    for _ in range(6):
        loop.turn()
    assert len(learned) == 5 and max(learned[-4:]) < 10
