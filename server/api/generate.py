"""From a validated request to a stream of text pieces.

n and several prompts become as many generations in the engine. Lengths are checked and the queue
is asked before anything is submitted, all in one go: start() does not wait.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace

from model.chunk import Sampling
from server.api.body import shown
from server.api.choice import Choice, Options, Piece
from server.api.logs import Record
from server.api.metrics import Timeline
from server.api.schemas import ChatBody, CompletionBody
from server.api.service import Service
from server.errors import ContextLengthError, RequestError
from server.protocol import Generate, pack_tokens


@dataclass(slots=True, frozen=True)
class Prompt:
    """Ids to continue, their text where it is known and will be echoed, and where messages end.

    With `base`, the key of a state, the ids follow its first `before` tokens; its last `drop` ones
    are replaced.
    """

    tokens: array[int]
    text: str | None = None
    boundaries: Sequence[int] = ()
    base: str = ""
    before: int = 0
    drop: int = 0

    def __len__(self) -> int:
        return self.before + len(self.tokens)


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
        queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()

        async def pump(choice: Choice) -> None:
            try:
                async for piece in choice.pieces():
                    queue.put_nowait(piece)
            except Exception as error:
                queue.put_nowait(error)

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


def start(
    service: Service, prompts: Sequence[Prompt], options: Options, record: Record
) -> Generation:
    """Check, admit and submit. Raises RequestError, QueueFullError or EngineDeadError."""
    settings, client = service.settings, service.client
    count = options.n * len(prompts)
    if count > settings.max_n:
        raise RequestError(
            f"n: n times prompts must not exceed max_n = {settings.max_n}, "
            f"got {options.n} x {len(prompts)}",
            param="n",
        )
    bounds = [_max_tokens(service, prompt, options) for prompt in prompts]
    _check_ids(service, options)
    tokens = options.n * sum(map(len, prompts))
    service.queue.admit(client, requests=count, tokens=tokens)
    service.check()  # from here on nothing waits, so submit() finds the engine alive

    generation = Generation(prompts, options.n, record)
    eos_ids = () if options.ignore_eos else service.eos_ids
    stop_ids = sorted({*options.stop_token_ids, *eos_ids})
    base = secrets.token_hex(12)
    for prompt, bound in zip(prompts, bounds, strict=True):
        packed = pack_tokens(prompt.tokens)
        for copy in range(options.n):
            index = len(generation.choices)
            stream = client.submit(
                Generate(
                    id=f"{base}-{index}",
                    tokens=packed,
                    sampling=replace(options.sampling, seed=seed_of(options.seed, copy)),
                    max_tokens=bound,
                    min_tokens=options.min_tokens,
                    stop_token_ids=stop_ids,
                    salt=options.salt,
                    boundaries=list(prompt.boundaries),
                    base=prompt.base,
                    drop=prompt.drop,
                )
            )
            timeline = Timeline(record.arrived, len(prompt))
            generation.choices.append(
                Choice(index, stream, options, service, prompt.tokens, timeline)
            )
    return generation


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
    thinking: bool | None = None,
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
        thinking=thinking,
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


def _max_tokens(service: Service, prompt: Prompt, options: Options) -> int:
    """How many tokens may be generated, once prompt and wish have been found to fit."""
    capacity = service.capacity
    size, limit = len(prompt), capacity.max_model_len
    if not len(prompt.tokens):
        raise RequestError("the prompt must have at least 1 token, got 0", param="prompt")
    wish = options.max_tokens
    if limit is not None and size + (wish or 1) > limit:
        asked = f"{size + (wish or 1)} tokens ({size} in the prompt, {wish or 1} in the completion)"
        why = ""
        if capacity.blocks and limit == capacity.blocks * capacity.block_size:
            why = (
                f" (what its {capacity.blocks} KV blocks of {capacity.block_size} positions hold; "
                "see --state-memory-gb and --memory-fraction)"
            )
        raise ContextLengthError(
            f"this model's maximum context length is {limit} tokens{why}, and {asked} were "
            "requested; shorten the prompt or max_tokens",
            param="max_tokens" if size < limit else "prompt",
        )
    bound = wish or service.settings.default_max_tokens
    if limit is not None:
        bound = min(bound, limit - size)
    if options.min_tokens > bound:
        raise RequestError(
            f"min_tokens must not exceed the {bound} tokens that may be generated, "
            f"got {options.min_tokens}",
            param="min_tokens",
        )
    return bound
