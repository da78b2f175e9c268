"""Every message that passes between API processes and the engine process, as msgspec structs.

Token ids travel as raw little-endian int32 bytes. Times are time.monotonic(), which the processes
of one host share. Encoded with msgpack over ZeroMQ ipc sockets; nothing is ever pickled.
"""

from __future__ import annotations

from array import array

import msgspec

from model.chunk import Capacity, Sampling


class Generate(msgspec.Struct, tag=True, kw_only=True):
    """Continue a prompt. `max_tokens` bounds the generated tokens, at least 1.

    Generation ends with reason "stop" when an id of stop_token_ids is drawn (not before
    min_tokens, until when these ids are suppressed), with "length" at max_tokens or at the
    model's maximum length. With `more`, the rest of the prompt follows in Extends, and no token is
    drawn until the last of these; the prompt is `expected` to have about so many tokens in all.
    Checkpoints are shared among prompts of one salt; boundaries are the positions where messages
    end. With `base`, the tokens follow those of the state of that key, less the last `drop` of
    these; such a prompt is complete. A lower `priority` is served first.
    """

    id: str
    tokens: bytes
    sampling: Sampling
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    more: bool = False
    expected: int = 0
    salt: str = ""
    boundaries: list[int] = []
    base: str = ""
    drop: int = 0
    priority: int = 0


class Extend(msgspec.Struct, tag=True, kw_only=True):
    """The next tokens of a prompt, perhaps none; the last ones unless there is `more`. Boundaries
    are counted from the prompt's beginning."""

    id: str
    tokens: bytes
    more: bool
    boundaries: list[int] = []


class Read(msgspec.Struct, tag=True, kw_only=True):
    """Fold tokens into a state and keep it: on the shelf where there is one, else pinned on the
    host until a Pin takes that back. The last Output says which state it is.

    `base`, `drop` and `priority` are as in Generate. salt_digest may stand for a salt that is not
    known.
    """

    id: str
    tokens: bytes
    salt: str = ""
    salt_digest: str = ""
    boundaries: list[int] = []
    base: str = ""
    drop: int = 0
    priority: int = 0


class Pin(msgspec.Struct, tag=True):
    """One context more, or fewer, is of this state. Without a shelf, the last one frees it."""

    key: str
    change: int


class Fetch(msgspec.Struct, tag=True):
    """Bring a state to where a request finds it at once. Answered by a Reply."""

    id: str
    key: str


class Export(msgspec.Struct, tag=True):
    """Write a state into a file. Answered by a Reply."""

    id: str
    key: str
    path: str


class Import(msgspec.Struct, tag=True):
    """Keep the state in a file, as Read does, once it was found to be good. Answered by a Reply."""

    id: str
    path: str


class Abort(msgspec.Struct, tag=True):
    """Forget these requests wherever they are; unknown or ended ids are no error."""

    ids: list[str]


class TokenLogprob(msgspec.Struct, array_like=True):
    """Log-probability of a drawn token and of the best ones, (id, log-probability) best first."""

    logprob: float
    top: list[tuple[int, float]]


class Trouble(msgspec.Struct):
    """Why there is no state, with the HTTP status that fits: 400 the file that was given is wrong,
    410 it is gone or damaged, 507 no memory or disk has room for it."""

    status: int
    message: str


class State(msgspec.Struct, kw_only=True):
    """A state that is kept: its key, tokens, bytes on the host, and the digest of its salt."""

    key: str
    count: int
    bytes: int
    salt: str


class Output(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """News of one request.

    tokens:   newly generated ids, raw int32; the stop id itself is the last when finish is "stop".
    finish:   None while it goes on; "stop", "length", "error" or "abort" when it ended. Every
              Generate gets exactly one Output with a finish, its last.
    error:    what went wrong, with finish "error".
    computed: prompt tokens folded in so far.
    cached:   prompt tokens that were taken from a checkpoint.
    started:  when its slot was taken, once known.
    state:    what a Read has made.
    trouble:  why a Read has made none, with finish "error".
    """

    id: str
    tokens: bytes = b""
    logprobs: list[TokenLogprob] | None = None
    finish: str | None = None
    error: str | None = None
    computed: int = 0
    cached: int = 0
    started: float | None = None
    state: State | None = None
    trouble: Trouble | None = None


class Reply(msgspec.Struct, tag=True, kw_only=True):
    """The answer to a Fetch, an Export or an Import: a state, or why there is none."""

    id: str
    state: State | None = None
    trouble: Trouble | None = None


class CacheStats(msgspec.Struct, kw_only=True):
    """Checkpoints: tokens of prompts looked up and saved, requests that hit by tier and that missed
    by reason, all since the engine started; what lies in each tier; and how long files took to
    write and to read since the last news."""

    queried: int = 0
    saved: int = 0
    hits: dict[str, int] = {}
    misses: dict[str, int] = {}
    checkpoints: dict[str, int] = {}
    bytes: dict[str, int] = {}
    save_seconds: list[float] = []
    load_seconds: list[float] = []


class Stats(msgspec.Struct, kw_only=True):
    """The engine after a step: gauges, and what this step did."""

    running: int
    waiting: int
    slots_used: int
    slots_total: int
    blocks_used: int = 0
    blocks_total: int = 0
    step_tokens: int = 0
    step_budget: int = 0  # tokens that the last step might have had
    preemptions: dict[str, int] = {}  # by reason, since the engine started
    swapped_bytes: int = 0  # of preempted sequences, on the host
    device_memory: int = 0
    device_free: int = 0
    device_total: int = 0
    cache: CacheStats | None = None  # None: what it was, or nothing is kept


class Step(msgspec.Struct, tag=True, kw_only=True):
    """What one engine step brought: all its outputs in one message, and the gauges after it."""

    outputs: list[Output]
    stats: Stats


class Ready(msgspec.Struct, tag=True, kw_only=True):
    """The engine has loaded and warmed up; seconds is start-up time by phase."""

    capacity: Capacity
    stats: Stats
    seconds: dict[str, float]


ToEngine = Generate | Extend | Read | Abort | Pin | Fetch | Export | Import
FromEngine = Ready | Step | Reply


def worker_of(id: str, workers: int) -> int:
    """The API process that a request is from: its number stands before a dot."""
    number, dot, _ = id.partition(".")
    known = dot and number.isdecimal() and int(number) < workers
    return int(number) if known else 0


def pack_tokens(ids: list[int] | array[int]) -> bytes:
    """Ids as raw int32."""
    return array("i", ids).tobytes()


def pack_token(id: int) -> bytes:
    """One id as raw int32."""
    return id.to_bytes(4, "little", signed=True)


def unpack_tokens(data: bytes) -> array[int]:
    """Raw int32 as ids."""
    ids = array("i")
    ids.frombytes(data)
    return ids
