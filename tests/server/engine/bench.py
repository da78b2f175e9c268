"""A scheduler and a fake runner on the bench: step by step, everything recorded."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from model.chunk import Capacity, Sampling
from server.engine.scheduler import Scheduler
from server.engine.work import Work
from server.protocol import (
    Export,
    Extend,
    Fetch,
    Generate,
    Import,
    Output,
    Pin,
    Read,
    Reply,
    pack_tokens,
    unpack_tokens,
)
from tests.server.fake_engine import LAYOUT, FakeRunner, next_token

VOCAB = 97


def capacity(**fields: Any) -> Capacity:
    standard = {"slots": 4, "state_bytes": 8, "vocab_size": VOCAB, "slot_layout": LAYOUT}
    return Capacity(**(standard | fields))


def generate(
    id: str, prompt: Sequence[int] | int, max_tokens: int = 5, *, logprobs: int | None = None,
    min_tokens: int = 0, stop: Sequence[int] = (), salt: str = "",
    boundaries: Sequence[int] = (), priority: int = 0,
) -> Generate:  # fmt: skip
    """A prompt, or one of so many tokens; greedy."""
    if isinstance(prompt, int):
        prompt = [(7 * i + len(id)) % VOCAB for i in range(prompt)]
    return Generate(
        id=id,
        tokens=pack_tokens(list(prompt)),
        sampling=Sampling(temperature=0.0, logprobs=logprobs),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop_token_ids=list(stop),
        salt=salt,
        boundaries=list(boundaries),
        priority=priority,
    )


def alone(message: Generate, max_length: int | None = None) -> tuple[list[int], str]:
    """What a request yields in an engine of its own: its tokens and its finish."""
    tokens = unpack_tokens(message.tokens)
    generated: list[int] = []
    while True:
        stops = message.stop_token_ids
        suppress = stops if len(generated) < message.min_tokens else []
        token = next_token(tokens, VOCAB, suppress)
        tokens.append(token)
        generated.append(token)
        if token in stops and not suppress:
            return generated, "stop"
        if len(generated) == message.max_tokens or len(tokens) == max_length:
            return generated, "length"


class Bench:
    """Runs a scheduler against a fake runner and gathers what comes out for whom."""

    def __init__(
        self, *, max_step_tokens: int = 64, caching: bool = False, host_bytes: int = 0,
        directory: Path | None = None, disk_bytes: int = 1 << 30, swap_bytes: int = 1 << 30,
        target_seconds: float | None = None, runner: Any = None, overlap: bool = False,
        **fields: Any,
    ) -> None:  # fmt: skip
        self.runner = runner or FakeRunner(
            capacity=capacity(**fields), max_step_tokens=max_step_tokens, keep_steps=True,
            overlaps=overlap,
        )  # fmt: skip
        self.under_way: tuple[Work, Any] | None = None
        self.scheduler = Scheduler(
            self.runner.capacity, max_step_tokens=max_step_tokens, caching=caching,
            host_bytes=host_bytes, directory=directory, disk_bytes=disk_bytes,
            swap_bytes=swap_bytes, target_seconds=target_seconds,
        )  # fmt: skip
        self.replies: dict[str, Reply] = {}
        self.outputs: dict[str, list[Output]] = {}
        self.rest: dict[str, bytes] = {}  # of prompts that are known in part
        self.now = 0

    def add(self, *messages: Generate | Read) -> None:
        for message in messages:
            self.scheduler.add(message)

    def begin(self, message: Generate, known: int) -> None:
        """Add a request of whose prompt only so much is known."""
        self.rest[message.id] = message.tokens[4 * known :]
        size = len(message.tokens) // 4
        self.add(
            msgspec.structs.replace(
                message, tokens=message.tokens[: 4 * known], more=True, expected=size
            )
        )

    def extend(self, id: str, count: int, *, more: bool = True) -> None:
        """So much more of a prompt, or all of the rest."""
        rest = self.rest[id]
        piece = rest[: 4 * count] if more else rest
        self.rest[id] = rest[len(piece) :]
        if not more:
            del self.rest[id]
        self.gather(self.scheduler.extend(Extend(id=id, tokens=piece, more=more)))

    def abort(self, *ids: str) -> None:
        self.gather(self.scheduler.abort(ids))

    def step(self) -> Work:
        """One step, and the integrity of everything after it."""
        self.now += 1
        states, expecting = self.scheduler.states, self.expecting
        if expecting and self.scheduler.checkpoints is not None:
            self.scheduler.checkpoints.jobs.wait()
        work = self.scheduler.schedule(float(self.now))
        self.runner.copy(work.copies)
        if states is not None:
            states.copied()
        before, self.under_way = self.under_way, None
        if work.chunks:
            self.under_way = work, self.runner.launch(work.chunks)
        else:
            done = before is not None or expecting or self.expecting
            assert self.scheduler.idle or done or self.rest, "there is work and none is done"
        if before is not None:
            self._collect(*before)
        if not self.runner.overlaps:
            self.settle()
        for news in states.take_news() if states is not None else ():
            if isinstance(news, Output):
                self.gather([news])
            else:
                self.replies[news.id] = news
        self.scheduler.check_integrity()
        return work

    def settle(self) -> None:
        """Collect what is under way."""
        before, self.under_way = self.under_way, None
        if before is not None:
            self._collect(*before)

    def _collect(self, work: Work, launched: Any) -> None:
        self.gather(self.scheduler.complete(work, self.runner.collect(launched)))

    @property
    def expecting(self) -> bool:
        return self.scheduler.states is not None and self.scheduler.states.expecting

    def finish(self, limit: int = 10_000) -> int:
        """Step until idle; how many steps that took."""
        steps = 0
        while (
            not self.scheduler.idle
            or self.expecting
            or self.scheduler.pressing
            or self.under_way is not None
        ):
            steps += not self.scheduler.idle
            self.step()
            assert steps < limit, "no end in sight"
        self.step()
        cache = self.scheduler.checkpoints
        kept = {c.name for c in cache.tiers.host} if cache is not None else set()
        assert set(self.runner.saved) == kept, "states are left on the host"
        return steps

    def call(self, message: Pin | Fetch | Export | Import) -> Reply | None:
        """Carry out a message about a state, and the answer if there is one."""
        assert self.scheduler.states is not None
        self.scheduler.states.call(message)
        self.finish()
        return None if isinstance(message, Pin) else self.replies.pop(message.id)

    def gather(self, outputs: list[Output]) -> None:
        for output in outputs:
            assert not self.finish_of(output.id), f"news of {output.id} after its end"
            self.outputs.setdefault(output.id, []).append(output)

    def tokens(self, id: str) -> list[int]:
        return array("i", b"".join([output.tokens for output in self.outputs.get(id, [])])).tolist()

    def finish_of(self, id: str) -> str | None:
        outputs = self.outputs.get(id)
        return outputs[-1].finish if outputs else None

    def result(self, id: str) -> tuple[list[int], str | None]:
        return self.tokens(id), self.finish_of(id)


def counts(work: Work) -> dict[str, int]:
    """How many tokens of whom a step computes."""
    return {
        request.id: len(chunk.tokens)
        for request, chunk in zip(work.requests, work.chunks, strict=True)
    }
