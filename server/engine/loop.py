"""The engine's loop: inbox, schedule, run, complete, publish.

Two kinds of failure only: that of requests (a message that asks for the impossible, logits that
are not finite, a step that runs out of device memory), after which the loop goes on, and anything
else, which leaves the loop as an exception and ends the process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from model.chunk import OutOfDeviceMemory, Runner
from server.engine.scheduler import Scheduler
from server.engine.work import Work
from server.protocol import (
    Abort,
    Export,
    Extend,
    Fetch,
    FromEngine,
    Import,
    Output,
    Pin,
    Ready,
    Reply,
    Stats,
    Step,
    ToEngine,
    Trouble,
)

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.5  # how often an idle engine looks whether it is still wanted
FILE_SECONDS = 0.001  # how often one looks whether files have been read or written
MEMORY_SECONDS = 0.5  # how often device memory is measured
CACHE_SECONDS = 0.1  # how often checkpoints are counted while no request ends


class LoadedRunner(Runner, Protocol):
    """A runner, warmed up: the token budget of a step that it was sized for, and start-up times."""

    max_step_tokens: int
    seconds: dict[str, float]


class Mailbox(Protocol):
    """Where messages come from and go to."""

    def receive(self, timeout: float) -> list[bytes]:
        """All that has arrived; waits up to `timeout` seconds for the first."""
        ...

    def send(self, message: FromEngine) -> None:
        """Queue a message; never blocks."""
        ...


class Loop:
    """Owns the scheduler and drives the runner.

    Beside a runner that overlaps, a step is scheduled and launched while the last one runs, and
    only then is the last one collected: chunks count as computed from the moment they are
    scheduled, and a work is completed whatever was scheduled since.
    """

    def __init__(
        self,
        runner: LoadedRunner,
        line: Mailbox,
        *,
        clock: Callable[[], float] = time.monotonic,
        caching: bool = False,
        host_bytes: int = 0,
        directory: Path | None = None,
        disk_bytes: int = 0,
        swap_bytes: int = 0,
        target_seconds: float | None = None,
    ) -> None:
        self.runner = runner
        self.line = line
        self.clock = clock
        self.scheduler = Scheduler(
            runner.capacity,
            max_step_tokens=runner.max_step_tokens,
            caching=caching,
            host_bytes=host_bytes,
            directory=directory,
            disk_bytes=disk_bytes,
            swap_bytes=swap_bytes,
            target_seconds=target_seconds,
        )
        self._collected: float | None = None  # when the last step was; None: it was idle since
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._memory = (0, 0, 0)  # held, free, in all
        self._under_way: tuple[Work, Any] | None = None  # launched, and not collected
        self._stuck = False  # the last turn found nothing to compute or to collect
        self._checked = False  # nothing has come or gone since the books were looked through
        self._counted = -CACHE_SECONDS  # when checkpoints were
        self._measured = -MEMORY_SECONDS
        self._asked = -MEMORY_SECONDS  # when the device said what is free

    def run(self, wanted: Callable[[], bool]) -> None:
        """Say Ready, then turn for as long as the engine is wanted."""
        ready = Ready(
            capacity=self.runner.capacity, stats=self.stats(), seconds=self.runner.seconds
        )
        self.line.send(ready)
        while wanted():
            self.turn(IDLE_SECONDS)

    def turn(self, idle_seconds: float = 0.0) -> None:
        """Read the inbox, waiting only when idle; compute one step; publish what it brought.

        To look through the books takes milliseconds where there are many blocks: it is done once
        nothing is left to do and nobody has asked, so that no request waits for it.
        """
        outputs: list[Output] = []
        due, expecting = self._due, self._expecting
        patience = 0.0 if due else FILE_SECONDS if expecting else idle_seconds
        if patience:
            self._collected = None
        messages = self.line.receive(patience)
        for data in messages:
            outputs += self._read(data)
        states = self.scheduler.states
        if states is not None and not messages and self.scheduler.idle and not self._expecting:
            states.rest()
        work = self.scheduler.schedule(self.clock())
        if work.copies:
            self.runner.copy(work.copies)
            if states is not None:
                states.copied()
        self._stuck = not work.chunks and self._under_way is None
        outputs += self._compute(work)
        for news in states.take_news() if states is not None else ():
            if isinstance(news, Output):
                outputs.append(news)
            else:
                self.line.send(news)
        if outputs:
            ended = any(output.finish is not None for output in outputs)
            self.line.send(Step(outputs=outputs, stats=self.stats(work.tokens, whole=ended)))
        if due or expecting or messages or not self.scheduler.idle:
            self._checked = False
        elif not self._checked:
            self.scheduler.check_integrity()
            self._checked = True

    @property
    def _due(self) -> bool:
        """Whether there is something to compute, to collect or to copy."""
        unfinished = not (self.scheduler.idle or self._stuck)
        return unfinished or self.scheduler.pressing or self._under_way is not None

    @property
    def _expecting(self) -> bool:
        """Whether files are being read or written."""
        return self.scheduler.states is not None and self.scheduler.states.expecting

    def stats(self, step_tokens: int = 0, *, whole: bool = True) -> Stats:
        """The gauges now; device memory is measured twice a second, at most. Unless they shall be
        whole, checkpoints are counted ten times a second: all else has little to do in a step.

        What is free there the device says only once it has ended what it computes: while a step is
        under way it is taken to be what it was, less what this process has come to hold since.
        """
        now, (before, free, total) = self.clock(), self._memory
        whole = whole or now - self._counted >= CACHE_SECONDS
        if whole:
            self._counted = now
        stats = self.scheduler.stats(cache=whole)
        stats.step_tokens = step_tokens
        if self._under_way is None and now - self._asked >= MEMORY_SECONDS:
            self._memory = (self.runner.device_memory(), *self.runner.device_room())
            self._measured = self._asked = now
        elif now - self._measured >= MEMORY_SECONDS:
            held = self.runner.device_memory()
            self._memory = held, max(free + before - held, 0), total
            self._measured = now
        stats.device_memory, stats.device_free, stats.device_total = self._memory
        return stats

    def _compute(self, work: Work) -> list[Output]:
        """Launch the work and collect the one before; without overlap, the work as well."""
        before, failed = self._under_way, False
        self._under_way = None
        if work.chunks:
            try:
                self._under_way = work, self.runner.launch(work.chunks)
            except OutOfDeviceMemory as error:
                failed = True
                work.lose()
                log.error(
                    "a step of %d tokens in %d chunks ran out of device memory: %s",
                    work.tokens, len(work.chunks), error,
                )  # fmt: skip
        outputs = [] if before is None else self._collect(*before)
        if failed:
            self._collected = None  # what the lost step took is no other's time
            trouble = "the step of this request ran out of device memory"
            return outputs + self.scheduler.fail(work, trouble)
        if self._under_way is not None and not self.runner.overlaps:
            outputs += self._collect(*self._under_way)
            self._under_way = None
        return outputs

    def _collect(self, work: Work, launched: Any) -> list[Output]:
        sampled = self.runner.collect(launched)
        self._time(work)
        return self.scheduler.complete(work, sampled)

    def _time(self, work: Work) -> None:
        """Tell the budget what a step took that was collected now: since the one before it, or
        after a pause since it was scheduled."""
        last, self._collected = self._collected, self.clock()
        seconds = self._collected - (work.begun if last is None else last)
        if self.scheduler.budget.target is not None:
            rows = work.rows
            self.scheduler.budget.learn(work.tokens - rows, rows, seconds)

    def _read(self, data: bytes) -> list[Output]:
        """Carry out one message. One that cannot be is logged, and answered if it names an id."""
        try:
            message: ToEngine = self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return self._refuse(_id_of(data), error)
        if isinstance(message, Abort):
            return self.scheduler.abort(message.ids)
        if isinstance(message, Extend):
            return self.scheduler.extend(message)
        if isinstance(message, Pin | Fetch | Export | Import):
            if self.scheduler.states is not None:
                self.scheduler.states.call(message)
            elif not isinstance(message, Pin):
                self.line.send(Reply(id=message.id, trouble=Trouble(400, "prefix_caching is off")))
            return []
        if message.id in self.scheduler:
            return self._refuse(message.id, ValueError(f"id: {message.id!r} is under way"))
        try:
            self.scheduler.add(message)
        except ValueError as error:
            return self._refuse(message.id, error)
        return []

    def _refuse(self, id: str | None, error: Exception) -> list[Output]:
        log.error("refused a message of request %s: %s", id, error)
        if id is None or id in self.scheduler:
            return []  # nobody to tell, or a request under way that must not be ended by it
        return [Output(id=id, finish="error", error=str(error))]


def _id_of(data: bytes) -> str | None:
    """The id in a message that is otherwise malformed."""
    try:
        fields = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    id = fields.get("id") if isinstance(fields, dict) else None
    return id if isinstance(id, str) else None
