"""Whatever arrives, leaves and runs out: each request yields what it would yield alone."""

from __future__ import annotations

from array import array

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.protocol import Generate, unpack_tokens
from tests.server.engine.bench import VOCAB, Bench, alone, generate

DOCUMENTS = [[(7 * i + 13 * n + i // 50) % VOCAB for i in range(400)] for n in range(3)]
ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


class Traffic(RuleBasedStateMachine):
    """Random arrivals and aborts between the steps of a small engine."""

    @initialize(
        slots=st.integers(1, 5),
        blocks=st.sampled_from([0, 0, 6, 9, 14]),
        budget=st.sampled_from([1, 2, 5, 16, 64]),
        bound=st.sampled_from([None, 20]),
        overlap=st.booleans(),
    )
    def start(self, slots: int, blocks: int, budget: int, bound: int | None, overlap: bool) -> None:
        self.bench = Bench(
            slots=slots, blocks=blocks, block_size=4 if blocks else 0,
            max_step_tokens=budget, max_model_len=bound, overlap=overlap,
        )  # fmt: skip
        self.max_length = self.bench.scheduler.max_length
        self.sent: dict[str, Generate] = {}
        self.aborted: set[str] = set()

    @rule(
        prompt=ids, max_tokens=st.integers(1, 20), min_tokens=st.integers(0, 4),
        stop=st.lists(st.integers(0, VOCAB - 1), max_size=20),
    )  # fmt: skip
    def arrive(self, prompt: list[int], max_tokens: int, min_tokens: int, stop: list[int]) -> None:
        message = generate(
            str(len(self.sent)), prompt, max_tokens, min_tokens=min_tokens, stop=stop
        )
        self.sent[message.id] = message
        self.bench.add(message)

    @rule(prompt=ids, known=st.integers(1, 12), max_tokens=st.integers(1, 20))
    def begin(self, prompt: list[int], known: int, max_tokens: int) -> None:
        """One arrives whose prompt is not all there."""
        message = generate(str(len(self.sent)), prompt, max_tokens)
        self.sent[message.id] = message
        self.bench.begin(message, min(known, len(prompt)))

    @rule(pick=st.integers(0, 1000), count=st.integers(0, 6), more=st.booleans())
    def extend(self, pick: int, count: int, more: bool) -> None:
        if self.bench.rest:
            ids = list(self.bench.rest)
            self.bench.extend(ids[pick % len(ids)], count, more=more)

    @rule(pick=st.integers(0, 1000))
    def abort(self, pick: int) -> None:
        if self.sent:
            id = str(pick % len(self.sent))
            if self.bench.finish_of(id) is None:
                self.aborted.add(id)
            self.bench.abort(id)
            assert id not in self.bench.scheduler

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.bench.step()

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "bench"):
            self.bench.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        for id in list(self.bench.rest):
            self.bench.extend(id, 0, more=False)
        self.bench.finish()
        for id, message in self.sent.items():
            tokens, finish = alone(message, self.max_length)
            if id in self.aborted:
                assert self.bench.finish_of(id) in ("abort", "error")
                assert self.bench.tokens(id) == tokens[: len(self.bench.tokens(id))]
            else:
                assert self.bench.result(id) == (tokens, finish)


class Readers(Traffic):
    """Prompts that begin with one of a few documents, in an engine that keeps checkpoints."""

    @initialize(
        slots=st.integers(1, 5),
        blocks=st.sampled_from([0, 0, 120, 200]),
        budget=st.sampled_from([7, 64, 300]),
        host=st.sampled_from([0, 3000, 100_000]),
        overlap=st.booleans(),
        rollback=st.integers(0, 1),
    )
    def start(
        self, slots: int, blocks: int, budget: int, host: int, overlap: bool, rollback: int
    ) -> None:
        self.bench = Bench(
            slots=slots, blocks=blocks, block_size=4 if blocks else 0, max_step_tokens=budget,
            caching=True, host_bytes=host, overlap=overlap, rollback=rollback,
        )  # fmt: skip
        self.max_length = self.bench.scheduler.max_length
        self.sent = {}
        self.aborted = set()

    @rule(
        document=st.integers(0, 2), length=st.integers(0, 400), prompt=ids,
        max_tokens=st.integers(1, 40), boundaries=st.lists(st.integers(0, 400), max_size=3),
        salt=st.sampled_from(["", "", "", "salt"]),
    )  # fmt: skip
    def read(
        self, document: int, length: int, prompt: list[int], max_tokens: int,
        boundaries: list[int], salt: str,
    ) -> None:  # fmt: skip
        message = generate(
            str(len(self.sent)), [*DOCUMENTS[document][:length], *prompt], max_tokens,
            boundaries=boundaries, salt=salt,
        )  # fmt: skip
        self.sent[message.id] = message
        self.bench.add(message)

    @rule(
        document=st.integers(0, 2), length=st.integers(0, 400), prompt=ids,
        known=st.integers(1, 400), max_tokens=st.integers(1, 40),
    )  # fmt: skip
    def begin_to_read(
        self, document: int, length: int, prompt: list[int], known: int, max_tokens: int
    ) -> None:
        tokens = [*DOCUMENTS[document][:length], *prompt]
        message = generate(str(len(self.sent)), tokens, max_tokens)
        self.sent[message.id] = message
        self.bench.begin(message, min(known, len(tokens)))

    @rule(pick=st.integers(0, 1000), count=st.integers(30, 300))
    def read_on(self, pick: int, count: int) -> None:
        self.extend(pick, count, True)

    @rule(pick=st.integers(0, 1000), prompt=ids)
    def go_on(self, pick: int, prompt: list[int]) -> None:
        """Another turn of what has ended."""
        ended = [id for id in self.sent if self.bench.finish_of(id) in ("stop", "length")]
        if ended:
            id = ended[pick % len(ended)]
            before = [*unpack_tokens(self.sent[id].tokens), *self.bench.tokens(id)]
            if self.max_length is None or len(before) + len(prompt) < self.max_length:
                message = generate(str(len(self.sent)), [*before, *prompt], 5)
                self.sent[message.id] = message
                self.bench.add(message)

    @rule(pick=st.integers(0, 1000))
    def lose(self, pick: int) -> None:
        """A step runs out of memory: garbage in its slots, and nothing kept of it."""
        work = self.bench.scheduler.schedule(0.0)
        self.bench.runner.copy(work.copies)
        for chunk in work.chunks:
            self.bench.runner.slots[chunk.slot] = array("i", [-7] * pick)
        work.lose()
        self.bench.settle()
        self.bench.gather(self.bench.scheduler.fail(work, "lost"))
        self.aborted |= {r.id for r in work.requests if r.finish == "error"}

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "bench"):
            cache = self.bench.scheduler.checkpoints
            for checkpoint in [*cache.tiers.device, *cache.tiers.host]:
                cache.tiers.drop(checkpoint)
            cache.sweep()
            self.bench.step()
            cache.check()
            holdings = self.bench.scheduler.holdings
            assert holdings.slots.held == holdings.blocks.held == cache.tiers.host_bytes == 0
            assert not self.bench.runner.saved


Traffic.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestTraffic = Traffic.TestCase
Readers.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestReaders = Readers.TestCase
