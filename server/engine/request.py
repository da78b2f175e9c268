"""One generation: its tokens, how far they are computed, what it holds, why it ended."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy

from model.chunk import Sampling
from server.engine.chain import BLOCK, Chain, salt_digest
from server.engine.tree import Walk
from server.protocol import Extend, Generate, Read, unpack_tokens

if TYPE_CHECKING:
    from server.engine.catalogue import Entry, Outlook
    from server.engine.tiers import Checkpoint

READING = Sampling(temperature=0.0)  # nothing is drawn


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """Two integers, no phases: `computed` chases len(tokens).

    When it has caught up a token is drawn and appended, until a stop id or `length_limit` tokens.
    While a step that draws one is under way, the next step may compute that one, whatever it is;
    if it turns out to be a stop id, that was a token too many. A request that is only `reading`
    ends there, with no token drawn. While `more` of its prompt is to come, the last token that is
    known waits to be computed. Its urgency is its priority, or that of a more urgent one that waits
    for what it reads.
    """

    id: str
    tokens: array[int]
    prompt_length: int
    length_limit: int
    sampling: Sampling
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    salt: str = ""  # its digest
    boundaries: tuple[int, ...] = ()  # positions where messages end
    reading: bool = False
    priority: int = 0  # the lower, the sooner
    rank: tuple[int, int] = (0, 0)  # urgency and arrival: who is served before whom
    max_tokens: int = 0
    more: bool = False
    expected: int = 0  # tokens of its prompt, about

    computed: int = 0
    apart: bool = False  # the last of the tokens computed last lies apart: it can be taken back
    drawing: int = 0  # tokens that steps under way will append
    lost: bool = False  # a step has left garbage in its slot
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    started: float | None = None  # when its slot was taken first
    announced: bool = False  # whether `started` was told
    served: int = 0  # its last turn, counted over all requests
    finish: str | None = None

    chain: Chain | None = None  # None: no checkpoint is looked for or kept
    cached: int = 0  # tokens of the checkpoint that it began with
    wanted: list[int] = field(default_factory=list)  # positions to keep, in order
    kept: list[Checkpoint] = field(default_factory=list)  # made of its state
    walk: Walk[Checkpoint] = field(default_factory=Walk)  # how far it was looked up
    outlook: Outlook | None = None  # what more of it may lead to on the disk
    missed: tuple[int, int] | None = None  # where it left what is known: a miss to be explained
    waits: tuple[Request, int] | None = None  # for another to have kept a position
    asleep: bool = False  # until what it waits for is there, or will not come
    fetches: str = ""  # the key of a state that is on its way from the disk
    sought: tuple[int, int, int] | None = None  # where on the disk nothing was found to wait for
    tried: set[str] = field(default_factory=set)  # keys of those that it has waited for
    ahead: str = ""  # of one that was brought from the disk before it was certain to be needed
    refused: list[Entry] = field(default_factory=list)  # states that were not good

    @property
    def most_cached(self) -> int:
        """How many tokens a checkpoint may save: the last one's logits are needed."""
        return self.prompt_length - (not self.reading)

    @property
    def remaining(self) -> int:
        """Tokens that can be computed."""
        known = len(self.tokens) + self.drawing
        if self.drawing and known >= self.length_limit:
            return 0  # it is ending
        return known - self.computed - self.more

    @property
    def ending(self) -> bool:
        """Whether a step under way is its last, whatever that draws."""
        if self.reading:
            return self.computed == len(self.tokens)
        return self.drawing > 0 and len(self.tokens) + self.drawing >= self.length_limit

    @property
    def generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def suppress(self) -> tuple[int, ...]:
        """Ids that the next step may not draw."""
        if not self.min_tokens or self.generated + self.drawing >= self.min_tokens:
            return ()
        return self.stop_ids

    def append(self, token: int) -> None:
        """Take a drawn token, and end if it is the last."""
        stops = token in self.stop_ids and self.generated >= self.min_tokens
        self.tokens.append(token)
        if stops:
            self.finish = "stop"
        elif len(self.tokens) >= self.length_limit:
            self.finish = "length"


def accept(
    message: Generate | Read,
    *,
    max_length: int | None,
    vocab_size: int,
    base: Chain | None = None,
) -> Request:
    """The request that a message asks for; ValueError names what is impossible in it.

    max_length bounds prompt and generated tokens (None: unbounded); vocab_size 0 is unknown. base
    is the sequence that the tokens follow.
    """
    if len(message.tokens) % 4:
        raise ValueError(f"tokens: {len(message.tokens)} bytes are no int32 ids")
    new = unpack_tokens(message.tokens)
    reading = isinstance(message, Read)
    tokens, chain = new, None
    if base is not None:
        kept = len(base.tokens) - message.drop
        if kept < 0:
            raise ValueError(f"drop: more than the {len(base.tokens)} tokens before")
        tokens = base.tokens[:kept] + new
        chain = Chain(base.digest(0), tokens, base.digests(kept // BLOCK))
    length = len(tokens)
    if length == 0:
        raise ValueError("tokens: the prompt is empty")
    if max_length is not None and length >= max_length + reading:
        raise ValueError(f"tokens: a prompt of {length} leaves no room in {max_length} tokens")
    if len(new):
        ids = numpy.frombuffer(message.tokens, dtype="<i4")
        _check_ids("tokens", int(ids.min()), int(ids.max()), vocab_size)
    digest = message.salt_digest if isinstance(message, Read) else ""
    request = Request(
        id=message.id,
        tokens=tokens,
        prompt_length=length,
        length_limit=length,
        sampling=READING,
        salt=digest or salt_digest(message.salt),
        boundaries=tuple(message.boundaries),
        reading=reading,
        priority=message.priority,
        chain=chain,
    )
    if isinstance(message, Generate):
        _limit(request, message, max_length=max_length, vocab_size=vocab_size)
    return request


def _limit(request: Request, message: Generate, *, max_length: int | None, vocab_size: int) -> None:
    """What a request generates, and how much of it."""
    if message.more and message.base:
        raise ValueError("more: a prompt with a base is complete")
    if message.max_tokens < 1:
        raise ValueError(f"max_tokens: {message.max_tokens} is less than 1")
    for name, named in (
        ("stop_token_ids", message.stop_token_ids),
        ("logit_bias", message.sampling.logit_bias),
    ):
        if named:
            _check_ids(name, min(named), max(named), vocab_size)
    request.sampling = message.sampling
    request.min_tokens = message.min_tokens
    request.stop_ids = tuple(message.stop_token_ids)
    request.max_tokens = message.max_tokens
    request.more = message.more
    request.expected = message.expected
    limit = max(request.prompt_length, message.expected) + message.max_tokens
    request.length_limit = limit if max_length is None else min(limit, max_length)


def extend(request: Request, message: Extend, *, max_length: int | None, vocab_size: int) -> None:
    """More of a request's prompt; ValueError names what is impossible in it."""
    if not request.more:
        raise ValueError("tokens: the prompt is complete")
    if len(message.tokens) % 4:
        raise ValueError(f"tokens: {len(message.tokens)} bytes are no int32 ids")
    length = request.prompt_length + len(message.tokens) // 4
    if max_length is not None and length >= max_length:
        raise ValueError(f"tokens: a prompt of {length} leaves no room in {max_length} tokens")
    if message.tokens:
        ids = numpy.frombuffer(message.tokens, dtype="<i4")
        _check_ids("tokens", int(ids.min()), int(ids.max()), vocab_size)
    request.tokens.frombytes(message.tokens)
    request.prompt_length = length
    request.boundaries += tuple(message.boundaries)
    request.more = message.more
    request.expected = max(request.expected, length) if message.more else length
    limit = request.expected + request.max_tokens
    request.length_limit = limit if max_length is None else min(limit, max_length)


def _check_ids(name: str, least: int, greatest: int, vocab_size: int) -> None:
    if least < 0:
        raise ValueError(f"{name}: id {least} is negative")
    if vocab_size and greatest >= vocab_size:
        raise ValueError(f"{name}: id {greatest} is not below the vocabulary's {vocab_size}")
