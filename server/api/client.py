"""The engine as an async object: one process, one stream of Outputs per request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import shutil
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

import msgspec
import zmq
import zmq.asyncio

from model.chunk import Capacity
from server.api.launch import end, launch, new_directory
from server.api.ledger import REQUESTS, RUNNING, TOKENS, Ledger
from server.engine.line import LEDGER, address, outbox_name
from server.errors import EngineDeadError
from server.protocol import (
    Abort,
    Export,
    Extend,
    Fetch,
    FromEngine,
    Generate,
    Import,
    Output,
    Pin,
    Read,
    Ready,
    Reply,
    Stats,
    Step,
    ToEngine,
)
from server.settings import Settings

log = logging.getLogger(__name__)

READY_SECONDS = 0.02  # how often API processes look whether the others are ready
BURST = 16  # messages taken in a row


class EngineStream:
    """The Outputs of one request, the last with a finish; close it to forget the request."""

    def __init__(self, client: EngineClient, id: str, prompt_tokens: int) -> None:
        self.id = id
        self.prompt_tokens = prompt_tokens
        self.started = False  # whether the engine has given it a slot
        self.ended = False  # whether the engine has said its last word
        self.closed = False
        self._client = client
        self._sent = prompt_tokens
        self._outputs: deque[Output] = deque()
        self._news = asyncio.Event()

    @property
    def orphaned(self) -> bool:
        """Whether it can come to no end, for the engine is gone."""
        return self._client.is_dead and not self.ended

    def push(self, output: Output) -> None:
        """Hand over an Output; never blocks."""
        self.ended |= output.finish is not None
        self._outputs.append(output)
        self._news.set()
        if self.closed:
            self._let_go()

    def extend(self, tokens: bytes, *, more: bool, boundaries: Sequence[int] = ()) -> None:
        """Send more of a prompt that was submitted with `more`."""
        self._sent += len(tokens) // 4
        counted = max(self.prompt_tokens, self._sent) if more else self._sent
        message = Extend(id=self.id, tokens=tokens, more=more, boundaries=list(boundaries))
        self._client.extend(self, message, counted)

    def wake(self) -> None:
        """Let the consumer see that the engine is gone."""
        self._news.set()

    def close(self) -> None:
        """Abort the request in the engine unless it has ended."""
        if not self.closed:
            self.closed = True
            self._news.set()
            self._let_go()
            self._client.forget(self)

    def _let_go(self) -> None:
        """Nobody will have the states of which Outputs tell that were not taken."""
        for output in self._outputs:
            if output.state is not None:
                self._client.pin(output.state.key, -1)
        self._outputs.clear()

    def __aiter__(self) -> EngineStream:
        return self

    async def __anext__(self) -> Output:
        """The next Output; those that have queued up meanwhile come merged into one."""
        while not self.closed:
            if self._outputs:
                merged = merge(list(self._outputs))
                self._outputs.clear()
                return merged
            if self.ended:
                break
            self._client.check_alive()
            self._news.clear()
            await self._news.wait()
        raise StopAsyncIteration

    async def __aenter__(self) -> EngineStream:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class EngineClient:
    """Talks to the engine process, and knows when it is gone. Starts it, or joins it as one of
    several API processes that share a ledger.

    A request is waiting from submit() until the engine has given it a slot, then running; these
    are counted over all API processes. An id is live until the engine has confirmed its end, a
    little longer than its stream.
    """

    def __init__(self, directory: Path, *, worker: int = 0, ledger: Ledger | None = None) -> None:
        self.worker = worker
        self.ledger = ledger
        self.stats = Stats(running=0, waiting=0, slots_used=0, slots_total=0)
        self.seconds: dict[str, float] = {}
        self.is_ready = False
        self.is_dead = False  # the process ended, told to or not, or was given up
        self.died = asyncio.Event()  # it ended by itself
        self.observers: list[Callable[[Step], None]] = []
        self._waiting_requests = 0
        self._waiting_tokens = 0
        self._capacity: Capacity | None = None
        self._streams: dict[str, EngineStream] = {}
        self._calls: dict[str, asyncio.Future[Reply]] = {}
        self._changed = asyncio.Event()  # ready or dead
        self._epitaph = "the engine is shutting down"
        self._closing = False
        self._encoder = msgspec.msgpack.Encoder()
        self._directory = directory
        self._context = zmq.Context(1)
        self._inbox = zmq.asyncio.Socket(self._context, zmq.PULL)
        self._inbox.set_hwm(0)
        self._outbox = self._context.socket(zmq.PUSH)
        self._outbox.set_hwm(0)
        self._process: Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        try:
            self._inbox.bind(address(directory, outbox_name(worker)))
            self._outbox.connect(address(directory, "inbox"))
        except BaseException:
            self._clean_up()
            raise

    @classmethod
    async def start(cls, settings: Settings, command: list[str] | None = None) -> EngineClient:
        """Start the engine process; it loads while the caller goes on. See ready()."""
        client = cls(new_directory())
        try:
            await client._launch(settings, command)
        except BaseException:
            client._clean_up()
            raise
        return client

    @classmethod
    async def join(cls, directory: Path, worker: int) -> EngineClient:
        """Talk to an engine that another process starts, and whose death it tells by bury()."""
        client = cls(directory, worker=worker, ledger=Ledger(directory / LEDGER, worker))
        client._tasks = [asyncio.create_task(client._receive(), name="engine-messages")]
        return client

    async def ready(self) -> None:
        """Return once the engine has loaded and all API processes know it; EngineDeadError when it
        ends before that."""
        await self._changed.wait()
        self.check_alive()
        if self.ledger is not None:
            self.ledger.ready()
            while not self.ledger.all_ready:
                await asyncio.sleep(READY_SECONDS)
                self.check_alive()

    @property
    def capacity(self) -> Capacity:
        """What the loaded model can hold."""
        if self._capacity is None:
            raise EngineDeadError("the engine has not loaded yet")
        return self._capacity

    @property
    def pid(self) -> int:
        assert self._process is not None, "another process has started it"
        return self._process.pid

    @property
    def running(self) -> int:
        """Requests that hold a slot, preempted ones included."""
        return self._running if self.ledger is None else self.ledger.total(RUNNING)

    @property
    def waiting_requests(self) -> int:
        return self._waiting_requests if self.ledger is None else self.ledger.total(REQUESTS)

    @property
    def waiting_tokens(self) -> int:
        return self._waiting_tokens if self.ledger is None else self.ledger.total(TOKENS)

    @property
    def free_slots(self) -> int:
        """Slots that no request holds; the engine may not have come to fill them yet."""
        return max(0, self.capacity.slots - self.running)

    def check_alive(self) -> None:
        """EngineDeadError when the engine is gone."""
        if self.is_dead:
            raise EngineDeadError(self._epitaph)

    def admitting(self) -> AbstractContextManager[None]:
        """While it is held no other API process takes up requests. Never wait in it."""
        return contextlib.nullcontext() if self.ledger is None else self.ledger.lock()

    def new_id(self) -> str:
        """An id that no other request has, and whose Outputs come here."""
        return f"{self.worker}.{secrets.token_hex(12)}"

    def submit(self, generate: Generate | Read) -> EngineStream:
        """Send a request. ValueError: its id is live; EngineDeadError: there is no engine."""
        self.check_alive()
        if generate.id in self._streams:
            raise ValueError(f"request {generate.id!r} is under way")
        stream = EngineStream(self, generate.id, len(generate.tokens) // 4)
        if isinstance(generate, Generate):
            stream.prompt_tokens = max(stream.prompt_tokens, generate.expected)
        self._streams[stream.id] = stream
        self._waiting_requests += 1
        self._waiting_tokens += stream.prompt_tokens
        self._enter()
        self._send(generate)
        return stream

    def extend(self, stream: EngineStream, message: Extend, prompt_tokens: int) -> None:
        """Send more of a prompt, which now counts as so many tokens."""
        if self._streams.get(stream.id) is not stream or stream.closed:
            return
        if not stream.started:
            self._waiting_tokens += prompt_tokens - stream.prompt_tokens
            self._enter()
        stream.prompt_tokens = prompt_tokens
        self._send(message)

    async def call(self, message: Fetch | Export | Import) -> Reply:
        """Ask about a state, and wait for the answer. EngineDeadError: there is no engine."""
        self.check_alive()
        self._calls[message.id] = answer = asyncio.get_running_loop().create_future()
        self._send(message)
        try:
            return await answer
        finally:
            del self._calls[message.id]

    def pin(self, key: str, change: int) -> None:
        """One context more, or fewer, is of a state."""
        self._send(Pin(key, change))

    def forget(self, stream: EngineStream) -> None:
        """Abort a closed stream's request, unless it has ended."""
        if self._streams.get(stream.id) is stream and not stream.ended:
            self._leave_queue(stream)
            self._enter()
            self._send(Abort([stream.id]))

    def abandon(self, why: str) -> None:
        """Take the engine for dead: streams end with EngineDeadError, and so does submit().

        The process goes on until close().
        """
        self._closing = True
        self._epitaph = why
        self._bury()

    async def close(self) -> None:
        """End the engine (SIGTERM, then SIGKILL) and every stream; nothing is left behind."""
        self._closing = True
        if self._process is not None:
            await end(self._process)
        self._bury()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._clean_up()

    def bury(self, epitaph: str) -> None:
        """The engine is gone, or will be: streams and submit() end with EngineDeadError."""
        if not self._closing:
            self._epitaph = epitaph
            log.critical(epitaph)
            self._bury()
            self.died.set()

    async def _launch(self, settings: Settings, command: list[str] | None) -> None:
        self._process = process = await launch(settings, self._directory, command)
        self._tasks = [
            asyncio.create_task(self._receive(), name="engine-messages"),
            asyncio.create_task(self._watch(process), name="engine-process"),
        ]

    def _clean_up(self) -> None:
        self._inbox.close(linger=0)
        self._outbox.close(linger=0)
        self._context.term()
        if self.ledger is None:
            shutil.rmtree(self._directory, ignore_errors=True)
        else:
            self.ledger.close()

    def _send(self, message: ToEngine) -> None:
        if not self.is_dead:
            self._outbox.send(self._encoder.encode(message))

    async def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        try:
            for number in itertools.count(1):
                message: FromEngine = decoder.decode(await self._inbox.recv())
                if isinstance(message, Ready):
                    self._capacity, self.seconds = message.capacity, message.seconds
                    self.stats = message.stats
                    self.is_ready = True
                    self._changed.set()
                elif isinstance(message, Reply):
                    answer = self._calls.get(message.id)
                    if answer is not None and not answer.done():
                        answer.set_result(message)
                else:
                    self._deliver(message)
                # recv() does not yield while messages are queued: what has piled up is delivered
                # together, and a stream that lags behind gets one Output of it
                if number % BURST == 0:
                    await asyncio.sleep(0)
        except Exception:
            log.exception("the engine cannot be understood: giving it up")
            if self._process is None:
                self.bury("the engine cannot be understood")
            else:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()

    def _deliver(self, step: Step) -> None:
        self.stats = step.stats
        for output in step.outputs:
            stream = self._streams.get(output.id)
            if stream is None:
                continue
            if not stream.started and (output.started is not None or output.finish is not None):
                self._leave_queue(stream)
            if output.finish is not None:
                del self._streams[output.id]
            stream.push(output)
        self._enter()
        for observer in self.observers:
            try:
                observer(step)
            except Exception:
                log.exception("an observer of the engine failed")

    def _leave_queue(self, stream: EngineStream) -> None:
        """It waits no more: it runs, was closed or has ended."""
        if not stream.started:
            stream.started = True
            self._waiting_requests -= 1
            self._waiting_tokens -= stream.prompt_tokens

    @property
    def _running(self) -> int:
        return sum(not stream.closed for stream in self._streams.values()) - self._waiting_requests

    def _enter(self) -> None:
        """Let the other API processes know what this one has."""
        if self.ledger is not None:
            self.ledger.write(
                running=self._running, requests=self._waiting_requests, tokens=self._waiting_tokens
            )

    async def _watch(self, process: Process) -> None:
        code = await process.wait()
        self.bury(f"the engine process ended with exit code {code}")

    def _bury(self) -> None:
        self.is_dead, self.is_ready = True, False
        self._changed.set()
        for stream in self._streams.values():
            stream.wake()
        self._streams.clear()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(EngineDeadError(self._epitaph))
        self._waiting_requests = self._waiting_tokens = 0
        self._enter()


def merge(outputs: list[Output]) -> Output:
    """Consecutive Outputs of one request as one: every token and log-probability, latest news."""
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    return Output(
        id=last.id,
        tokens=b"".join(output.tokens for output in outputs),
        logprobs=logprobs or None,
        finish=last.finish,
        error=last.error,
        computed=max(output.computed for output in outputs),
        cached=max(output.cached for output in outputs),
        state=last.state,
        trouble=last.trouble,
        started=next((o.started for o in outputs if o.started is not None), None),
    )
