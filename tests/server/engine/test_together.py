"""All that an engine does, at once: readers give way to others, states have owners and are gone on
with, steps are lost with another under way. Each request yields what it would yield alone."""

from __future__ import annotations

import tempfile
from array import array
from pathlib import Path

import hypothesis.strategies as st
import msgspec
from hypothesis import settings
from hypothesis.stateful import initialize, invariant, rule

from model.chunk import Sampled
from server.protocol import Export, Generate, Pin, Read, State, unpack_tokens
from tests.server.engine.bench import Bench, generate
from tests.server.engine.test_random import DOCUMENTS, Readers, ids, priorities

LARGE = 1_000_000  # bytes: room for all


class Everything(Readers):
    """Contexts by the name of the reading that made them; each has a pin."""

    @initialize(
        slots=st.integers(1, 4),
        blocks=st.sampled_from([0, 0, 120, 200]),
        budget=st.sampled_from([3, 64, 300]),
        host=st.sampled_from([0, 3000, LARGE]),
        room=st.sampled_from([0, 500, LARGE]),
        overlap=st.sampled_from([True, True, False]),
        rollback=st.integers(0, 1),
        shelf=st.sampled_from([False, False, False, True]),
    )
    def start(  # type: ignore[override]
        self, slots: int, blocks: int, budget: int, host: int, room: int, overlap: bool,
        rollback: int, shelf: bool,
    ) -> None:  # fmt: skip
        sizes = {"blocks": blocks, "block_size": 4, "block_bytes": 16} if blocks else {}
        self.folder = tempfile.TemporaryDirectory()
        self.bench = Bench(
            slots=slots, max_step_tokens=budget, caching=True, host_bytes=host, swap_bytes=room,
            overlap=overlap, rollback=rollback,
            directory=Path(self.folder.name) if shelf else None, **sizes,
        )  # fmt: skip
        self.max_length = self.bench.scheduler.max_length
        self.kept = shelf or host == LARGE  # whatever is read
        self.sent = {}
        self.aborted = set()
        self.readings: dict[str, array[int]] = {}
        self.forgotten: set[str] = set()
        self.exports = 0

    @rule(
        document=st.integers(0, 2), length=st.integers(1, 400), own=st.integers(0, 3),
        priority=priorities, pick=st.integers(0, 1000), drop=st.sampled_from([None, None, 0, 7]),
    )  # fmt: skip
    def keep(
        self, document: int, length: int, own: int, priority: int, pick: int, drop: int | None
    ) -> None:
        """A context is read, that of others in front of it or not."""
        new = array("i", [*DOCUMENTS[document][:length], *range(own)])
        message = Read(id=f"read {len(self.readings)}", tokens=new.tobytes(), priority=priority)
        tokens = self.onto(message, pick, drop)
        if self.max_length is None or len(tokens) <= self.max_length:
            self.readings[message.id] = tokens
            self.bench.add(message)

    @rule(
        pick=st.integers(0, 1000), drop=st.sampled_from([0, 0, 1, 7]), prompt=ids,
        max_tokens=st.integers(1, 20), priority=priorities,
    )  # fmt: skip
    def ask(self, pick: int, drop: int, prompt: list[int], max_tokens: int, priority: int) -> None:
        """A request goes on with a context."""
        message = generate(str(len(self.sent)), prompt, max_tokens, priority=priority)
        tokens = self.onto(message, pick, drop)
        if self.max_length is None or len(tokens) < self.max_length:
            self.sent[message.id] = msgspec.structs.replace(
                message, tokens=tokens.tobytes(), base="", drop=0
            )
            self.bench.add(message)

    def onto(self, message: Generate | Read, pick: int, drop: int | None) -> array[int]:
        """Put a context in front of a message, if there is one; all of its tokens."""
        new = unpack_tokens(message.tokens)
        if drop is None or not (contexts := self.contexts()):
            return new
        name, state = contexts[pick % len(contexts)]
        before = self.readings[name]
        if drop > len(before) or not self.there(state):
            return new
        message.base, message.drop = state.key, drop
        return before[: len(before) - drop] + new

    def contexts(self) -> list[tuple[str, State]]:
        made = ((name, self.bench.outputs.get(name)) for name in self.readings)
        return [
            (name, outputs[-1].state)
            for name, outputs in made
            if outputs and outputs[-1].state is not None and name not in self.forgotten
        ]

    def there(self, state: State) -> bool:
        """Whether it can be found, unless a step was lost since that had made it."""
        cache = self.bench.scheduler.checkpoints
        on_disk = cache.disk is not None and cache.disk.shelf.path(state.key).exists()
        return on_disk or cache.get(state.key) is not None

    @rule(pick=st.integers(0, 1000))
    def forget(self, pick: int) -> None:
        """A context's pin is taken back."""
        if contexts := self.contexts():
            name, state = contexts[pick % len(contexts)]
            self.forgotten.add(name)
            self.bench.scheduler.states.call(Pin(state.key, -1))

    @rule(pick=st.integers(0, 1000))
    def export(self, pick: int) -> None:
        """Into a file, while it may be given up."""
        if contexts := self.contexts():
            _, state = contexts[pick % len(contexts)]
            self.exports += 1
            path = Path(self.folder.name) / "export"
            self.bench.scheduler.states.call(Export(f"export {self.exports}", state.key, str(path)))

    @rule()
    def rest(self) -> None:
        """Nothing is to be computed or expected, as the loop sees it."""
        idle = self.bench.scheduler.idle and self.bench.under_way is None
        if idle and not self.bench.expecting:
            self.bench.scheduler.states.rest()

    @rule(pick=st.integers(0, 1000))
    def give_up(self, pick: int) -> None:
        """A reading is aborted."""
        if self.readings:
            name = f"read {pick % len(self.readings)}"
            if self.bench.finish_of(name) is None:
                self.aborted.add(name)
            self.bench.abort(name)

    @rule(pick=st.integers(0, 1000))
    def spoil(self, pick: int) -> None:
        """What a step under way draws of one request turns out not to be finite."""
        if self.bench.under_way is None:
            return
        work, drawn = self.bench.under_way
        rows = [n for n, sampled in enumerate(drawn)
                if sampled is not None and work.requests[n].finish is None]  # fmt: skip
        if rows:
            row = rows[pick % len(rows)]
            drawn[row] = Sampled(-1)
            self.aborted.add(work.requests[row].id)

    @invariant()
    def in_order(self) -> None:
        """Everyone is in one queue, by rank, as urgent as itself or as one who waits for it."""
        if not hasattr(self, "bench"):
            return
        scheduler = self.bench.scheduler
        queues = (scheduler.waiting, scheduler.running, scheduler.swapped)
        names = [name for queue in queues for name in queue]
        assert len(names) == len(set(names))
        for queue in queues:
            ranks = [request.rank for request in queue.order]
            assert ranks == sorted(ranks)
            assert all(request.rank[0] <= request.priority for request in queue.order)
            assert all(request.finish is None for request in queue.order)

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        super().teardown()
        for name in self.readings:
            [*_, last] = self.bench.outputs[name]
            if last.finish == "stop":
                assert last.state is not None and last.state.count == len(self.readings[name])
            elif last.finish == "error":
                assert name in self.aborted or not self.kept, last.error
            else:
                assert last.finish == "abort" and name in self.aborted
        assert len(self.bench.replies) == self.exports
        self.folder.cleanup()


Everything.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestEverything = Everything.TestCase
