"""What the endpoints share, and its life: starting, ready, draining, dead."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from fastapi import Depends, Request

from model.chunk import Capacity
from server.api.body import Body
from server.api.client import EngineClient
from server.api.fetch import fetch
from server.api.limits import Queue
from server.api.metrics import Metrics
from server.api.registry import Registry
from server.api.tokenizer import Tokenizer
from server.errors import EngineDeadError, NotFoundError
from server.logs import log
from server.settings import Settings

State = Literal["starting", "ready", "draining", "dead"]
StartEngine = Callable[[Settings], Awaitable[EngineClient]]

B = TypeVar("B", bound=Body)
T = TypeVar("T")

INLINE_SIZE = 262_144  # what is larger would hold up every stream
PURGE_SECONDS = 10.0  # how often contexts are looked at, whether their time has come
SHUTTING_DOWN = "the server is shutting down"


class Service:
    """Settings, engine, tokenizer, metrics and queue of one server.

    `tells_reasoning`: whether chats tell what the model thinks apart from what it answers.
    `failure` says why the server cannot go on; whoever runs it then ends it. `active` counts the
    requests under way, for whoever waits for them to end.
    """

    def __init__(
        self,
        settings: Settings,
        start_engine: StartEngine = EngineClient.start,
        *,
        fetch: Callable[[Settings], Awaitable[Path]] = fetch,
    ) -> None:
        self.settings = settings
        self.model_id = settings.model_id
        self.state: State = "starting"
        self.failure: str | None = None
        self.active = 0
        self.started = time.time()
        self.metrics = Metrics(self.model_id)
        self.metrics.watch(lambda: self.condition)
        self.queue = Queue(
            max_requests=settings.max_queue_requests, max_tokens=settings.max_queue_tokens
        )
        self.sampling_defaults: Mapping[str, float] = {}
        self.tokenizer: Tokenizer
        self.client: EngineClient
        self.capacity: Capacity
        self.eos_ids: tuple[int, ...] = ()
        self.contexts: Registry
        self.scratch: Path  # for files that come and go
        self.tells_reasoning = False
        self._start_engine = start_engine
        self._fetch = fetch
        self._life: asyncio.Task[None] | None = None
        self._closers: list[Callable[[], Awaitable[None] | None]] = []

    def start(self) -> None:
        """Load in the background; `state` tells when it is done."""
        self._life = asyncio.create_task(self._live(), name="service")

    async def close(self) -> None:
        """End the engine process."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait((self._life,))
        for closer in reversed(self._closers):
            closing = closer()
            if closing is not None:
                await closing

    def drain(self) -> None:
        """Take no new requests."""
        if self.state in ("starting", "ready"):
            self.state = "draining"

    def abandon(self) -> None:
        """End draining: requests that still run end with EngineDeadError."""
        if self.state == "draining" and self.active:
            self.client.abandon(SHUTTING_DOWN)

    @property
    def condition(self) -> State:
        """The state as of now: an engine that is gone makes a ready server dead at once."""
        return "dead" if self.state == "ready" and self.client.is_dead else self.state

    def check(self) -> None:
        """Raise EngineDeadError unless requests can be served."""
        condition = self.condition
        if condition == "ready":
            return
        if condition == "starting":
            raise EngineDeadError("the model is still loading")
        if condition == "draining":
            raise EngineDeadError(SHUTTING_DOWN)
        raise EngineDeadError("the engine is dead; the server is about to exit")

    def check_model(self, name: str | None) -> None:
        """Raise NotFoundError unless this model, or none, is named."""
        if name is not None and name != self.model_id:
            raise NotFoundError(
                f"the model {name!r} does not exist; {self.model_id!r} is served",
                param="model",
                code="model_not_found",
            )

    async def read(self, request: Request, kind: type[B]) -> B:
        """A request's body, parsed; see off_loop(). Raises RequestError."""
        data = await request.body()
        return await self.off_loop(len(data), lambda: kind.parse(data))

    async def off_loop(self, size: int, work: Callable[[], T]) -> T:
        """The result of work on so many bytes or ids; if they are many, it is done in a thread."""
        return work() if size <= INLINE_SIZE else await self.tokenizer.run(work)

    async def _live(self) -> None:
        try:
            settings = self.settings
            if settings.hub_id is not None:
                fetched = {"model": str(await self._fetch(settings)), "revision": None}
                settings = settings.model_copy(update=fetched)
            path = settings.model_path
            if not path.is_dir():
                raise ValueError(f"model: no checkpoint directory at {str(path)!r}")
            self.client = await self._start_engine(settings)
            self._closers.append(self.client.close)
            self.tokenizer = await asyncio.to_thread(Tokenizer, path)
            self._closers.append(self.tokenizer.close)
            self.sampling_defaults = sampling_defaults(path)
            parser = settings.reasoning_parser
            self.tells_reasoning = parser == "think" or (parser == "auto" and self.tokenizer.thinks)
            await self.client.ready()
            self.capacity = self.client.capacity
            width = self.capacity.vocab_size  # an id beyond it cannot be drawn
            self.eos_ids = tuple(id for id in self.tokenizer.eos_ids if id < width)
            self._open_contexts()
            self.metrics.attach(self.client)
            if self.state == "starting":
                self.state = "ready"
            purging = asyncio.create_task(self._purge(), name="contexts")
            try:
                await self.client.died.wait()
            finally:
                purging.cancel()
            self._fail("the engine process died")
        except Exception as error:
            log.debug("start-up failed", exc_info=True)
            self._fail(f"start-up failed: {error}")

    def _open_contexts(self) -> None:
        directory = self.settings.context_directory
        self.contexts = Registry(directory, self.capacity.identity)
        self.scratch = Path(tempfile.mkdtemp(prefix="steadystate-"))
        self._closers.append(lambda: shutil.rmtree(self.scratch, ignore_errors=True))

    async def _purge(self) -> None:
        """Take out contexts whose time has come."""
        while True:
            try:
                for record in await asyncio.to_thread(self.contexts.purge):
                    self.client.pin(record.key, -1)
            except OSError as error:
                log.error("cannot look for contexts whose time has come: %s", error)
            await asyncio.sleep(PURGE_SECONDS)

    def _fail(self, why: str) -> None:
        self.failure = why
        self.state = "dead"
        log.critical(why)


def sampling_defaults(path: Path) -> dict[str, float]:
    """How the checkpoint wants to be sampled, where generation_config.json says so.

    An explicit "do_sample": false means greedy. Values out of range are left out.
    """
    file = path / "generation_config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    ranges = {
        "temperature": (0, 2),
        "top_p": (1e-9, 1),
        "top_k": (0, 2**31 - 1),
        "min_p": (0, 1),
        "repetition_penalty": (0.01, 2),
    }
    defaults = {
        name: config[name]
        for name, (low, high) in ranges.items()
        if isinstance(config.get(name), int | float) and low <= config[name] <= high
    }
    if config.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def _of_app(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_of_app)]
