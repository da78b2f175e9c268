"""The engine as an async object: one process, one stream of Outputs per request."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import msgspec
import zmq
import zmq.asyncio

from model.chunk import Capacity
from server.engine.line import address
from server.errors import EngineDeadError
from server.protocol import (
    Abort,
    Extend,
    FromEngine,
    Generate,
    Output,
    Ready,
    Stats,
    Step,
    ToEngine,
)
from server.settings import Settings

log = logging.getLogger(__name__)

BURST = 16  # messages taken in a row
TERM_SECONDS = 5.0  # how long the engine may take to obey SIGTERM


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

    def push(self, output: Output) -> None:
        """Hand over an Output; never blocks."""
        self.ended |= output.finish is not None
        self._outputs.append(output)
        self._news.set()

    def extend(self, tokens: bytes, *, more: bool) -> None:
        """Send more of a prompt that was submitted with `more`."""
        self._sent += len(tokens) // 4
        counted = max(self.prompt_tokens, self._sent) if more else self._sent
        self._client.extend(self, Extend(self.id, tokens, more), counted)

    def wake(self) -> None:
        """Let the consumer see that the engine is gone."""
        self._news.set()

    def close(self) -> None:
        """Abort the request in the engine unless it has ended."""
        if not self.closed:
            self.closed = True
            self._news.set()
            self._client.forget(self)

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
    """Starts the engine process, talks to it, and knows when it is gone.

    A request is waiting from submit() until the engine has given it a slot, then running. An id
    is live until the engine has confirmed its end, a little longer than its stream.
    """

    def __init__(self, directory: Path) -> None:
        self.stats = Stats(running=0, waiting=0, slots_used=0, slots_total=0)
        self.seconds: dict[str, float] = {}
        self.is_ready = False
        self.is_dead = False  # the process ended, told to or not, or was given up
        self.died = asyncio.Event()  # it ended by itself
        self.observers: list[Callable[[Step], None]] = []
        self.waiting_requests = 0
        self.waiting_tokens = 0
        self._capacity: Capacity | None = None
        self._streams: dict[str, EngineStream] = {}
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
        self._process: Process
        self._tasks: list[asyncio.Task[None]] = []
        try:
            self._inbox.bind(address(directory, "outbox"))
            self._outbox.connect(address(directory, "inbox"))
        except BaseException:
            self._clean_up()
            raise

    @classmethod
    async def start(cls, settings: Settings, command: list[str] | None = None) -> EngineClient:
        """Start the engine process; it loads while the caller goes on. See ready()."""
        client = cls(_new_directory())
        try:
            await client._launch(settings, command or [sys.executable, "-m", "server.engine"])
        except BaseException:
            client._clean_up()
            raise
        return client

    async def ready(self) -> None:
        """Return once the engine has loaded; EngineDeadError when it ends before that."""
        await self._changed.wait()
        self.check_alive()

    @property
    def capacity(self) -> Capacity:
        """What the loaded model can hold."""
        if self._capacity is None:
            raise EngineDeadError("the engine has not loaded yet")
        return self._capacity

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> int:
        """Requests that hold a slot, preempted ones included."""
        return sum(not stream.closed for stream in self._streams.values()) - self.waiting_requests

    @property
    def free_slots(self) -> int:
        """Slots that no request holds; the engine may not have come to fill them yet."""
        return max(0, self.capacity.slots - self.running)

    def check_alive(self) -> None:
        """EngineDeadError when the engine is gone."""
        if self.is_dead:
            raise EngineDeadError(self._epitaph)

    def submit(self, generate: Generate) -> EngineStream:
        """Send a request. ValueError: its id is live; EngineDeadError: there is no engine."""
        self.check_alive()
        if generate.id in self._streams:
            raise ValueError(f"request {generate.id!r} is under way")
        stream = EngineStream(self, generate.id, len(generate.tokens) // 4)
        stream.prompt_tokens = max(stream.prompt_tokens, generate.expected)
        self._streams[stream.id] = stream
        self.waiting_requests += 1
        self.waiting_tokens += stream.prompt_tokens
        self._send(generate)
        return stream

    def extend(self, stream: EngineStream, message: Extend, prompt_tokens: int) -> None:
        """Send more of a prompt, which now counts as so many tokens."""
        if self._streams.get(stream.id) is not stream or stream.closed:
            return
        if not stream.started:
            self.waiting_tokens += prompt_tokens - stream.prompt_tokens
        stream.prompt_tokens = prompt_tokens
        self._send(message)

    def forget(self, stream: EngineStream) -> None:
        """Abort a closed stream's request, unless it has ended."""
        if self._streams.get(stream.id) is stream and not stream.ended:
            self._leave_queue(stream)
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
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), TERM_SECONDS)
            except TimeoutError:
                log.warning("the engine did not obey SIGTERM for %g s: killing it", TERM_SECONDS)
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
        self._bury()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._clean_up()

    async def _launch(self, settings: Settings, command: list[str]) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *command, "--directory", str(self._directory), stdin=PIPE
        )
        self._tasks = [
            asyncio.create_task(self._receive(), name="engine-messages"),
            asyncio.create_task(self._watch(), name="engine-process"),
        ]
        stdin = self._process.stdin
        assert stdin is not None
        public = settings.keyless.model_copy(update={"hub_token": None})  # it needs no secret
        stdin.write(public.model_dump_json().encode())
        stdin.close()  # after what was written

    def _clean_up(self) -> None:
        self._inbox.close(linger=0)
        self._outbox.close(linger=0)
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _send(self, message: ToEngine) -> None:
        if not self.is_dead:
            self._outbox.send(self._encoder.encode(message))

    async def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        try:
            for number in itertools.count(1):
                message: Ready | Step = decoder.decode(await self._inbox.recv())
                if isinstance(message, Ready):
                    self._capacity, self.seconds = message.capacity, message.seconds
                    self.stats = message.stats
                    self.is_ready = True
                    self._changed.set()
                else:
                    self._deliver(message)
                # recv() does not yield while messages are queued: what has piled up is delivered
                # together, and a stream that lags behind gets one Output of it
                if number % BURST == 0:
                    await asyncio.sleep(0)
        except Exception:
            log.exception("the engine cannot be understood: killing it")
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
        for observer in self.observers:
            try:
                observer(step)
            except Exception:
                log.exception("an observer of the engine failed")

    def _leave_queue(self, stream: EngineStream) -> None:
        """It waits no more: it runs, was closed or has ended."""
        if not stream.started:
            stream.started = True
            self.waiting_requests -= 1
            self.waiting_tokens -= stream.prompt_tokens

    async def _watch(self) -> None:
        code = await self._process.wait()
        if not self._closing:
            self._epitaph = f"the engine process ended with exit code {code}"
            log.critical(self._epitaph)
            self._bury()
            self.died.set()

    def _bury(self) -> None:
        self.is_dead, self.is_ready = True, False
        self._changed.set()
        for stream in self._streams.values():
            stream.wake()
        self._streams.clear()
        self.waiting_requests = self.waiting_tokens = 0


def _new_directory() -> Path:
    """A directory of mode 0700 for the sockets, under /tmp where their paths would be too long."""
    parent = tempfile.gettempdir()
    length = len(os.fsencode(parent)) + len("/steadystate-12345678/outbox")
    if length > zmq.IPC_PATH_MAX_LEN and os.path.isdir("/tmp"):
        parent = "/tmp"
    return Path(tempfile.mkdtemp(prefix="steadystate-", dir=parent))


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
        started=next((o.started for o in outputs if o.started is not None), None),
    )
