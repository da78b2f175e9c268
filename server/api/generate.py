"""From a validated request to a stream of text pieces.

n and several prompts become as many generations in the engine. The queue is asked before anything
is submitted. A long prompt is submitted when its first piece is known, and the engine reads it
while the rest is still text; start() returns once all of it has been found to fit.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from model.chunk import Sampling
from server.api.body import shown
from server.api.choice import Choice, Options, Piece
from server.api.client import EngineStream
from server.api.logs import Record
from server.api.metrics import Timeline
from server.api.pieces import Pieces
from server.api.schemas import ChatBody, CompletionBody
from server.api.service import Service
from server.errors import ContextLengthError, RequestError
from server.protocol import Generate, pack_tokens

Ends = Callable[["array[int]"], list[int]]


@dataclass(slots=True)
class Prompt:
    """Ids to continue, as far as they are known, their text where it is known and will be echoed,
    and where messages end.

    With `base`, the key of a state, the ids follow its first `before` tokens; its last `drop` ones
    are replaced. `field` is what the request calls it.
    """

    tokens: array[int]
    text: str | None = None
    boundaries: Sequence[int] = ()
    base: str = ""
    before: int = 0
    drop: int = 0
    rest: Pieces | None = None  # what is not yet ids
    ends: Ends | None = None  # finds where messages end in it
    field: str = "prompt"

    def __len__(self) -> int:
        return self.before + len(self.tokens)

    @property
    def expected(self) -> int:
        """How many ids it will have, about."""
        return len(self) if self.rest is None else self.rest.expected

    async def extend(self) -> tuple[array[int], list[int]]:
        """The next piece of the rest, and where messages end in it, from the prompt's beginning."""
        assert self.rest is not None
        start = len(self)
        piece = await anext(self.rest)
        self.tokens.extend(piece)
        if self.rest.done:
            self.rest = None
        return piece, [start + end for end in self.ends(piece)] if self.ends else []


async def begun(
    service: Service,
    pieces: Pieces,
    text: str | None = None,
    *,
    ends: Ends | None = None,
    field: str = "prompt",
) -> Prompt:
    """A prompt whose first piece is known. ContextLengthError when its bytes say beforehand that
    it cannot fit."""
    limit, most = service.capacity.max_model_len, service.tokenizer.most_bytes
    if limit is not None and most is not None and pieces.bytes > limit * most:
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens, and a prompt of "
            f"{pieces.bytes} bytes has at least {-(-pieces.bytes // most)}; shorten the prompt",
            param=field,
        )
    tokens = await anext(pieces)
    rest = None if pieces.done else pieces
    boundaries = ends(tokens) if ends else ()
    return Prompt(tokens, text, boundaries, rest=rest, ends=ends, field=field)


class Generation:
    """Choices of one request under way: choice i continues prompt i // n. Close it, always."""

    def __init__(self, prompts: Sequence[Prompt], n: int, record: Record) -> None:
        self.prompts = prompts
        self.choices: list[Choice] = []
        self.prompt_tokens = sum(map(len, prompts))
        self._n = n
        self._record = record
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def completion_tokens(self) -> int:
        return sum(choice.count for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that did not have to be read, counted once a prompt."""
        return sum(choice.cached for choice in self.choices[:: self._n])

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object, as of now."""
        completion = self.completion_tokens
        usage: dict[str, object] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        thought = [choice.reasoning_tokens for choice in self.choices]
        known = [count for count in thought if count is not None]
        if known:
            usage["completion_tokens_details"] = {"reasoning_tokens": sum(known)}
        return usage

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of all choices as they come; each choice's last one has a finish."""
        if len(self.choices) == 1:
            async for piece in self.choices[0].pieces():
                yield piece
            return
        # Each choice has one piece on its way; what comes meanwhile will be its next one.
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue(1)

        async def pump(choice: Choice) -> None:
            try:
                async for piece in choice.pieces():
                    await queue.put(piece)
            except Exception as error:
                await queue.put(error)

        self._tasks = [asyncio.create_task(pump(choice)) for choice in self.choices]
        going = len(self.choices)
        while going:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            going -= item.finish is not None
            yield item

    async def complete(self) -> list[Piece]:
        """All choices to their end, each as one piece."""
        whole = [Piece(choice.index) for choice in self.choices]
        texts: list[list[str]] = [[] for _ in self.choices]
        thoughts: list[list[str]] = [[] for _ in self.choices]
        async for piece in self.pieces():
            done = whole[piece.index]
            texts[piece.index].append(piece.text)
            thoughts[piece.index].append(piece.reasoning)
            done.tokens += piece.tokens
            done.logprobs += piece.logprobs
            done.finish, done.stop = piece.finish, piece.stop
        for done in whole:
            done.text = "".join(texts[done.index])
            done.reasoning = "".join(thoughts[done.index])
        return whole

    def close(self) -> None:
        """Abort what has not ended; harmless when repeated."""
        for task in self._tasks:
            task.cancel()
        for choice in self.choices:
            choice.close()
        record, first = self._record, self.choices[0].timeline if self.choices else None
        record.choices = len(self.choices)
        record.prompt_tokens = self.prompt_tokens
        record.completion_tokens = self.completion_tokens
        record.cached_tokens = self.cached_tokens
        if first is not None:
            record.started, record.first_token = first.started, first.first


async def start(
    service: Service,
    prompts: Sequence[Prompt],
    options: Options,
    record: Record,
    *,
    thinking: Callable[[Prompt], bool] | None = None,
) -> Generation:
    """Check, admit and submit. Raises RequestError, QueueFullError or EngineDeadError.

    `thinking` says of a complete prompt whether the reply begins inside a block of reasoning.
    """
    settings = service.settings
    count = options.n * len(prompts)
    if count > settings.max_n:
        raise RequestError(
            f"n: n times prompts must not exceed max_n = {settings.max_n}, "
            f"got {options.n} x {len(prompts)}",
            param="n",
        )
    for prompt in prompts:
        _check_length(service, prompt, options)
    _check_ids(service, options)
    tokens = options.n * sum(prompt.expected for prompt in prompts)
    client = service.client
    with client.admitting():
        service.queue.admit(client, requests=count, tokens=tokens)
        service.check()  # nothing waits from here to submit(), which so finds the engine alive
        submitted = time.monotonic()
        streams = _submit(service, prompts, options)
    try:
        for number, prompt in enumerate(prompts):
            copies = streams[number * options.n : (number + 1) * options.n]
            await _feed(service, prompt, copies, options)
        service.check()
    except BaseException as error:
        for number, stream in enumerate(streams):
            stream.close()
            if not isinstance(error, RequestError):  # the client left, or there is no engine
                prompt = prompts[number // options.n]
                timeline = Timeline(record.arrived, len(prompt), submitted)
                reason = "abort" if isinstance(error, asyncio.CancelledError) else "error"
                service.metrics.end(timeline, reason)
        raise
    finally:
        for prompt in prompts:
            if prompt.rest is not None:
                prompt.rest.close()
    generation = Generation(prompts, options.n, record)
    for index, stream in enumerate(streams):
        prompt = prompts[index // options.n]
        timeline = Timeline(record.arrived, len(prompt), submitted)
        told = options if thinking is None else replace(options, thinking=thinking(prompt))
        generation.choices.append(Choice(index, stream, told, service, prompt.tokens, timeline))
    return generation


def _submit(service: Service, prompts: Sequence[Prompt], options: Options) -> list[EngineStream]:
    eos_ids = () if options.ignore_eos else service.eos_ids
    base = service.client.new_id()
    streams: list[EngineStream] = []
    for prompt in prompts:
        packed = pack_tokens(prompt.tokens)
        for copy in range(options.n):
            generate = Generate(
                id=f"{base}-{len(streams)}",
                tokens=packed,
                sampling=replace(options.sampling, seed=seed_of(options.seed, copy)),
                max_tokens=options.max_tokens or service.settings.default_max_tokens,
                min_tokens=options.min_tokens,
                stop_token_ids=sorted({*options.stop_token_ids, *eos_ids}),
                more=prompt.rest is not None,
                expected=prompt.expected,
                salt=options.salt,
                priority=options.priority,
                boundaries=list(prompt.boundaries),
                base=prompt.base,
                drop=prompt.drop,
            )
            streams.append(service.client.submit(generate))
    return streams


async def _feed(
    service: Service, prompt: Prompt, streams: Sequence[EngineStream], options: Options
) -> None:
    """Send the rest of a prompt as it becomes ids; stop where it turns out to be too long."""
    while prompt.rest is not None and not all(stream.ended for stream in streams):
        piece, ends = await prompt.extend()
        _check_length(service, prompt, options)
        packed = pack_tokens(piece)
        for stream in streams:
            stream.extend(packed, more=prompt.rest is not None, boundaries=ends)


def seed_of(seed: int | None, copy: int) -> int:
    """The seed of the copy-th of n completions, 0 <= seed < 2**63; the first has the given one."""
    if seed is None:
        return secrets.randbits(63)
    if copy == 0:
        return seed % 2**63
    digest = hashlib.blake2b(f"{seed}:{copy}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def options_of(
    body: ChatBody | CompletionBody,
    service: Service,
    *,
    max_tokens: int | None,
    logprobs: int | None,
) -> Options:
    """What a body asks for, the checkpoint's own sampling defaults filled in."""
    defaults = service.sampling_defaults
    given: Mapping[str, float | None] = {
        name: getattr(body, name)
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    chosen = {**defaults, **chosen}
    return Options(
        n=body.n,
        seed=body.seed,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        ignore_eos=body.ignore_eos,
        stop=tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        salt=body.cache_salt or "",
        priority=body.priority,
        sampling=Sampling(
            temperature=chosen.get("temperature", 1.0),
            top_p=chosen.get("top_p", 1.0),
            top_k=max(0, int(chosen.get("top_k", 0))),
            min_p=chosen.get("min_p", 0.0),
            repetition_penalty=chosen.get("repetition_penalty", 1.0),
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            logit_bias=body.logit_bias,
            logprobs=logprobs,
        ),
    )


def check_tokens(service: Service, tokens: Sequence[int], param: str) -> None:
    """Raise RequestError for an id that the model does not have."""
    limit = service.capacity.vocab_size
    if tokens and not 0 <= min(tokens) <= max(tokens) < limit:
        wrong = next(id for id in tokens if not 0 <= id < limit)
        raise RequestError(
            f"{param}: token ids must be from 0 to {limit - 1}, got {shown(wrong)}", param=param
        )


def _check_ids(service: Service, options: Options) -> None:
    check_tokens(service, options.stop_token_ids, "stop_token_ids")
    check_tokens(service, list(options.sampling.logit_bias), "logit_bias")


def _check_length(service: Service, prompt: Prompt, options: Options) -> None:
    """Raise RequestError unless prompt and wish fit, as far as the prompt is known."""
    capacity = service.capacity
    size, limit = len(prompt), capacity.max_model_len
    if not len(prompt.tokens):
        raise RequestError("the prompt must have at least 1 token, got 0", param=prompt.field)
    wish = options.max_tokens or 1
    if limit is not None and size + wish > limit:
        least = "at least " if prompt.rest is not None else ""
        asked = f"{least}{size + wish} tokens ({size} in the prompt, {wish} in the completion)"
        why = ""
        if capacity.blocks and limit == capacity.blocks * capacity.block_size:
            why = (
                f" (what its {capacity.blocks} KV blocks of {capacity.block_size} positions hold; "
                "see --state-memory-gb and --memory-fraction)"
            )
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens{why}, and {asked} were "
            "requested; shorten the prompt or max_tokens",
            param="max_tokens" if size < limit else prompt.field,
        )
    bound = options.max_tokens or service.settings.default_max_tokens
    if limit is not None:
        bound = min(bound, limit - size)
    if options.min_tokens > bound:
        raise RequestError(
            f"min_tokens must not exceed the {bound} tokens that may be generated, "
            f"got {options.min_tokens}",
            param="min_tokens",
        )
