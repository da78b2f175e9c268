"""Thousands of random operations on contexts against a dictionary of token lists: every answer is
what the whole sequence would yield, and in the end nothing is left anywhere."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from server.api.registry import Record, Registry
from server.errors import NotFoundError
from server.protocol import Fetch, Generate, Output, Pin, Read, State, pack_tokens
from tests.model.captured import captured
from tests.model.streams import apart
from tests.server.engine.bench import VOCAB, Bench, alone, generate
from tests.server.engine.test_cached import Engine, load, told

OWNER = "owner"


class World:
    """An engine, a registry, and what both should know. Does as server.api.contexts does."""

    def __init__(self, seed: int, directory: Path | None, **fields: Any) -> None:
        self.rng = Random(seed)
        self.directory = directory
        self.fields = fields
        self.oracle: dict[str, list[int]] = {}
        self.number = 0
        self.done: dict[str, int] = {}
        self.saved = self.refused = 0
        self.documents = [self.words(300) for _ in range(5)]
        self.start()

    def start(self) -> None:
        self.bench = self.engine()
        self.registry = Registry(self.directory, "")

    def engine(self) -> Bench:
        return Bench(caching=True, directory=self.directory, max_step_tokens=128, **self.fields)

    def words(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCAB) for _ in range(count)]

    def text(self) -> list[int]:
        """The beginning of a document, or something new; a few words more at times."""
        text = self.rng.choice(self.documents)[: self.rng.randrange(1, 300)]
        if self.rng.random() < 0.3:
            text = text[:100] + self.words(self.rng.randrange(1, 60))
        return text

    def id(self) -> str:
        self.number += 1
        return f"ctx_{self.number}"

    def pick(self) -> str | None:
        return self.rng.choice(sorted(self.oracle)) if self.oracle else None

    def run(self, message: Generate | Read) -> tuple[list[int], Output] | None:
        """Its tokens and last Output; None when it was cancelled on the way, as one in eight is."""
        bench, id = self.bench, message.id
        if isinstance(message, Generate) and not message.base and self.rng.random() < 0.5:
            self.send_in_pieces(message)
        else:
            bench.add(message)
        if self.rng.random() < 0.125:
            for _ in range(self.rng.randrange(4)):
                bench.step()
            if bench.finish_of(id) is None:
                bench.abort(id)
                bench.rest.pop(id, None)
                bench.finish()
                assert bench.finish_of(id) == "abort"
                return None
        if id in bench.rest:
            bench.extend(id, 0, more=False)
        bench.finish()
        tokens = bench.tokens(id)
        return tokens, bench.outputs.pop(id)[-1]

    def send_in_pieces(self, message: Generate) -> None:
        """All but the last piece of a prompt, some steps apart."""
        length = len(message.tokens) // 4
        self.bench.begin(message, self.rng.randrange(1, length + 1))
        while self.rng.random() < 0.7:
            for _ in range(self.rng.randrange(3)):
                self.bench.step()
            self.bench.extend(message.id, self.rng.randrange(length))

    def record(self, id: str, state: State, tokens: list[int]) -> Record:
        assert state.count == len(tokens)
        return Record(
            id=id, key=state.key, identity="", owner=OWNER, kind="text", count=state.count,
            bytes=state.bytes, salt=state.salt, created=time.time(),
        )  # fmt: skip

    def read(self, tokens: list[int], **fields: Any) -> State | None:
        message = Read(id=self.id(), tokens=pack_tokens(tokens), **fields)
        ran = self.run(message)
        if ran is None:
            return None
        if ran[1].state is None:
            assert ran[1].trouble is not None and ran[1].trouble.status == 507
            self.refused += 1
        return ran[1].state

    def create(self) -> None:
        tokens = self.text()
        state = self.read(tokens)
        if state is not None:
            id = self.id()
            self.registry.put(self.record(id, state, tokens))
            self.oracle[id] = tokens

    def opened(self, id: str) -> Record:
        record = self.registry.get(id, OWNER)
        reply = self.bench.call(Fetch(self.id(), record.key))
        assert reply is not None and reply.state is not None, reply
        assert reply.state.count == len(self.oracle[id]) == record.count
        return record

    def append(self) -> None:
        if (id := self.pick()) is not None and len(self.oracle[id]) < 700:
            record, more = self.opened(id), self.words(self.rng.randrange(1, 80))
            drop = min(self.rng.choice([0, 0, 0, 1, 5]), len(self.oracle[id]) - 1)
            state = self.read(more, base=record.key, drop=drop)
            if state is not None:
                kept = self.oracle[id][: len(self.oracle[id]) - drop]
                grown = self.record(id, state, kept + more)
                self.registry.put(grown, instead=record)
                self.bench.call(Pin(record.key, -1))
                self.oracle[id] = kept + more

    def fork(self) -> None:
        if (id := self.pick()) is not None:
            record, new = self.opened(id), self.id()
            self.bench.call(Pin(record.key, 1))
            state = State(key=record.key, count=record.count, bytes=record.bytes, salt=record.salt)
            self.registry.put(self.record(new, state, self.oracle[id]))
            self.oracle[new] = list(self.oracle[id])

    def delete(self) -> None:
        if (id := self.pick()) is not None:
            record = self.registry.get(id, OWNER)
            assert self.registry.remove(record)
            self.bench.call(Pin(record.key, -1))
            del self.oracle[id]
            with pytest.raises(NotFoundError):
                self.registry.get(id, OWNER)

    def chat(self) -> None:
        """A prompt behind a context."""
        if (id := self.pick()) is not None:
            record, prompt = self.opened(id), self.words(self.rng.randrange(1, 40))
            message = generate(self.id(), prompt, self.rng.randrange(1, 8))
            message.base = record.key
            self.check(message, self.oracle[id] + prompt)

    def complete(self) -> None:
        """A prompt of its own, which may begin as others do."""
        prompt = [*self.text(), *self.words(self.rng.randrange(1, 5))]
        message = generate(self.id(), prompt, self.rng.randrange(1, 8))
        self.check(message, prompt)

    def check(self, message: Generate, tokens: list[int]) -> None:
        """Run it, and see that it is answered as a prompt of all these tokens would be."""
        ran = self.run(message)
        if ran is not None:
            whole = Generate(
                id="whole", tokens=pack_tokens(tokens), sampling=message.sampling,
                max_tokens=message.max_tokens,
            )  # fmt: skip
            assert (ran[0], ran[1].finish) == self.answer(whole)
            assert ran[1].cached < len(tokens)
            self.saved += ran[1].cached

    def answer(self, message: Generate) -> tuple[list[int], str | None]:
        return alone(message)

    def evict(self) -> None:
        cache = self.bench.scheduler.checkpoints
        for _ in range(self.rng.randrange(1, 4)):
            cache.evict()
        self.bench.finish()

    def rest(self) -> None:
        """There is nothing to do for a moment."""
        self.bench.scheduler.states.rest()
        self.bench.finish()

    def restart(self) -> None:
        """With files contexts are there again; without, there are none."""
        if self.rng.random() < 0.1:
            self.bench.scheduler.checkpoints.jobs.close()
            self.start()
            if self.directory is None:
                self.oracle.clear()
        assert {record.id for record in self.registry.owned(OWNER)} == set(self.oracle)

    def operate(self, count: int) -> None:
        operations = [
            *[self.create] * 3, *[self.append] * 3, self.fork, *[self.delete] * 3,
            *[self.chat] * 5, *[self.complete] * 4, self.evict, self.rest, self.restart,
        ]  # fmt: skip
        for _ in range(count):
            operation = self.rng.choice(operations)
            operation()
            self.done[operation.__name__] = self.done.get(operation.__name__, 0) + 1
            self.bench.scheduler.check_integrity()

    def leave(self) -> None:
        """Forget every context, give up every checkpoint: nothing may be left."""
        while self.oracle:
            self.delete()
        cache = self.bench.scheduler.checkpoints
        assert not any(c.pins for c in cache.tiers.host)
        for checkpoint in {*cache.tiers.device, *cache.tiers.host}:
            cache.tiers.drop(checkpoint)
        cache.sweep()
        self.bench.finish()
        cache.check()
        holdings = self.bench.scheduler.holdings
        assert holdings.slots.held == holdings.blocks.held == cache.tiers.host_bytes == 0
        assert not self.bench.runner.saved and not cache.tree.blocks and not cache._by_key
        if self.directory is not None:
            files = list((self.directory / "states").iterdir())
            shelf = cache.disk.shelf
            assert {path.name[:64] for path in files} == set(shelf.entries)
            assert sum(path.stat().st_size for path in files) == shelf.bytes <= shelf.budget
            assert not list((self.directory / "contexts").iterdir())
            assert not list((self.directory / "quarantine").iterdir())


@pytest.mark.parametrize(
    ("kind", "count", "fields"),
    [
        ("memory", 5000, {"slots": 3, "host_bytes": 5_000, "overlap": True, "rollback": 1}),
        ("memory", 3400, {"slots": 6, "host_bytes": 8_000, "blocks": 400, "block_size": 4}),
        ("disk", 1000, {"slots": 3, "host_bytes": 6_000, "disk_bytes": 200_000}),
        ("disk", 600, {"slots": 2, "host_bytes": 0, "disk_bytes": 200_000, "rollback": 1}),
    ],
)
def test_ten_thousand_operations(
    tmp_path: Path, kind: str, count: int, fields: dict[str, Any]
) -> None:
    world = World(count, tmp_path if kind == "disk" else None, **fields)
    world.operate(count)
    assert len(world.done) == 9 and min(world.done.values()) > count / 50
    assert world.saved > 15 * count and world.refused > 0
    world.leave()


class Real(World):
    """On a real model, beside one that caches nothing."""

    def __init__(
        self, seed: int, directory: Path | None, models: Path, kind: str, *, ring: int = 0
    ) -> None:
        self.cold = Engine(load(models, kind), caching=False)
        self.runner = load(models, kind, ring=ring)
        super().__init__(seed, directory)

    def engine(self) -> Bench:
        self.runner.saved.clear()  # as a process that begins
        return Bench(
            caching=True, directory=self.directory, runner=self.runner, host_bytes=400_000,
            max_step_tokens=512,
        )  # fmt: skip

    def answer(self, message: Generate) -> tuple[list[int], str | None]:
        outputs = self.cold.run([message])[message.id]
        return told(outputs)[0], outputs[-1].finish


@pytest.mark.parametrize(("kind", "disk"), [("pure", True), ("window", False), ("hybrid", True)])
def test_operations_on_a_real_model(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, kind: str, disk: bool
) -> None:
    world = Real(7, tmp_path if disk else None, tmp_path_factory.mktemp("models"), kind)
    world.operate(300)
    assert len(world.done) == 9 and world.saved > 5000
    world.leave()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they do")
@pytest.mark.parametrize(("kind", "disk"), [("pure", True), ("pure", False), ("hybrid", True)])
def test_operations_as_beside_a_gpu(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    disk: bool,
) -> None:
    """Steps overlap and are graphs, states have rings and are set back by a token, and nobody sees
    one on the host that has not got there."""
    models = tmp_path_factory.mktemp("models")
    world = Real(8, tmp_path if disk else None, models, kind, ring=8)
    captured(world.runner, 512, monkeypatch)
    apart(world.runner.store, 3, monkeypatch)
    monkeypatch.setattr(world.runner, "overlaps", True)
    world.operate(200)
    assert len(world.done) == 9 and world.saved > 3000
    for graphs in (world.runner.graphs, world.runner.ends):
        assert graphs is not None and graphs._exchange._staging.turns > 20
    world.leave()
