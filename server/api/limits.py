"""What a public server refuses before any work: wrong keys, full queues, bodies out of bounds."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Protocol

from server.errors import QueueFullError

MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_NAME_CHARS = 1024
MAX_METADATA = 16
MAX_TEMPLATE_KWARGS = 32
MAX_TEMPLATE_KWARGS_BYTES = 65_536
MAX_TOOLS = 128
MAX_TOOLS_BYTES = 524_288  # of all tools of a request, schemas included
MAX_TOOL_CALLS = 128  # of a message
MAX_ARGUMENTS_BYTES = 4_194_304  # of a call
MAX_DEPTH = 64  # of schemas, arguments and template arguments
MAX_MESSAGES = 16_384
MAX_PARTS = 16_384  # of a message
MAX_TOKENS = 2**31 - 1
MAX_PRIORITY = 1000  # and as far below 0


class Keys:
    """The accepted API keys. Compared as digests and to the last, so that time tells nothing."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, key: str) -> bool:
        """Whether the key is one of them; with no keys at all everything is."""
        digest = hashlib.sha256(key.encode()).digest()
        found = not self._digests
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


class Waiting(Protocol):
    """What admission needs to know of the engine."""

    @property
    def waiting_requests(self) -> int: ...

    @property
    def waiting_tokens(self) -> int: ...

    @property
    def free_slots(self) -> int: ...


class Queue:
    """Bounds what waits for a slot; what a free slot will take does not count as waiting.

    An empty queue admits any request.
    """

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens

    def admit(self, engine: Waiting, *, requests: int = 1, tokens: int = 0) -> None:
        """Raise QueueFullError when these would wait behind too many others."""
        free = engine.free_slots
        waiting = engine.waiting_requests - free
        if waiting <= 0:
            return
        if waiting + requests > self.max_requests:
            raise QueueFullError(
                f"the queue is full: {waiting} requests wait and max_queue_requests is "
                f"{self.max_requests}, got {requests} more; try again later"
            )
        if not free and engine.waiting_tokens + tokens > self.max_tokens:
            raise QueueFullError(
                f"the queue is full: {engine.waiting_tokens} prompt tokens wait and "
                f"max_queue_tokens is {self.max_tokens}, got {tokens} more; try again later"
            )
