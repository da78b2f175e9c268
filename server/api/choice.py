"""One completion in the making: the engine's tokens in, pieces of text out."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from model.chunk import Sampling
from server.api.client import EngineStream
from server.api.metrics import Timeline
from server.api.reasoning import Reasoning
from server.api.service import Service
from server.api.stops import StopStrings
from server.api.tokenizer import TokenText
from server.errors import EngineDeadError, GenerationError
from server.protocol import Output, TokenLogprob, unpack_tokens

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


@dataclass(slots=True, frozen=True, kw_only=True)
class Options:
    """What a request asks of every one of its completions."""

    n: int = 1
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    salt: str = ""
    priority: int = 0
    thinking: bool | None = None  # None: reasoning is not told apart; True: the prompt opened it
    sampling: Sampling


@dataclass(slots=True, frozen=True)
class TokenChoice:
    """A generated token, where its text begins, and what else might have been (best first)."""

    token: TokenText
    logprob: float
    offset: int
    top: list[tuple[TokenText, float]]


@dataclass(slots=True)
class Piece:
    """News of a choice: more text and the tokens that went into it, and perhaps its end.

    `reasoning` is text that comes before the answer; no piece has both. There is one TokenChoice
    for each token when log-probabilities were asked for. `finish` is "stop" or "length"; `stop` is
    the stop string, or the id of stop_token_ids, that ended it.
    """

    index: int
    text: str = ""
    reasoning: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenChoice] = field(default_factory=list)
    finish: str | None = None
    stop: str | int | None = None


class Choice:
    """Counts, detokenises, watches for stop strings, tells reasoning and answer apart.

    `count` tokens have been generated. Stop strings are found in what the model writes, tags and
    reasoning included.
    """

    def __init__(
        self,
        index: int,
        stream: EngineStream,
        options: Options,
        service: Service,
        prompt: Sequence[int],
        timeline: Timeline,
    ) -> None:
        self.index = index
        self.count = 0
        self.cached = 0
        self.timeline = timeline
        self._stream = stream
        self._options = options
        self._metrics = service.metrics
        self._tokenizer = service.tokenizer
        self._detokenizer = service.tokenizer.detokenizer(
            prompt,
            skip_special_tokens=options.skip_special_tokens,
            keep_tags=options.thinking is not None,
        )
        self._stops = StopStrings(options.stop, include=options.include_stop)
        self._reasoning = None if options.thinking is None else Reasoning(inside=options.thinking)
        self._decoded = 0  # characters before the next token
        self._ends: list[int] = []  # characters up to each token's end, as long as it may think
        self._piece = Piece(index)
        self._whole: list[Piece] = []  # pieces that end with the reasoning

    @property
    def reasoning_tokens(self) -> int | None:
        """How many of the tokens went into the reasoning, its tags included; None: not told."""
        if self._reasoning is None:
            return None
        if self._reasoning.end is not None:
            return min(bisect_left(self._ends, self._reasoning.end) + 1, self.count)
        return self.count if self._reasoning.state == "inside" else 0

    async def pieces(self) -> AsyncIterator[Piece]:
        """Raises GenerationError when the engine gives it up, EngineDeadError when that is gone."""
        async for output in self._stream:
            self._metrics.output(self.timeline, output, time.monotonic())
            self.cached = max(self.cached, output.cached)
            if output.finish not in (None, "stop", "length"):
                self._metrics.end(self.timeline, "error")
                raise GenerationError(output.error or "the engine gave this request up")
            self._take(output)
            for whole in self._whole:
                yield whole
            self._whole.clear()
            piece = self._piece
            if piece.finish is not None:
                self._stream.close()
                self._metrics.end(self.timeline, piece.finish)
                yield piece
                return
            if piece.text or piece.reasoning:
                self._piece = Piece(self.index)
                yield piece
        self._metrics.end(self.timeline, "abort")
        raise EngineDeadError("the generation ended before it was finished")

    def close(self) -> None:
        """Give the slot back, unless it has ended."""
        self._stream.close()
        self._metrics.end(self.timeline, "error" if self._stream.orphaned else "abort")

    def _take(self, output: Output) -> None:
        """Add an Output to the piece, up to the token that completes a stop string."""
        tokens = unpack_tokens(output.tokens)
        stop: int | None = None
        for position, token in enumerate(tokens):
            self.count += 1
            self._piece.tokens.append(token)
            if output.logprobs:
                self._piece.logprobs.append(self._shown(token, output.logprobs[position]))
            ends = output.finish == "stop" and position == len(tokens) - 1
            if not ends or self._options.include_stop:
                self._add(self._detokenizer.push(token))
            if self._piece.finish is not None:
                return
            if ends and token in self._options.stop_token_ids:
                stop = token
        if output.finish is not None:
            self._add(self._detokenizer.flush())
            if self._piece.finish is None:
                self._end(self._stops.flush(), output.finish, stop)

    def _add(self, text: str) -> None:
        """Text of one more token, through the stop strings."""
        self._decoded += len(text)
        if self._reasoning is not None and self._reasoning.state != "after":
            self._ends.append(self._decoded)
        if not self._options.stop or self.count < self._options.min_tokens:
            self._say(text)
            return
        out, stop = self._stops.push(text)
        if stop is None:
            self._say(out)
        else:
            self._end(out, "stop", stop)

    def _say(self, text: str) -> None:
        """Text that goes out: to the reasoning, or to the answer in a piece of its own."""
        if self._reasoning is None:
            self._piece.text += text
            return
        thought, said = self._reasoning.push(text)
        self._piece.reasoning += thought
        if self._piece.reasoning and self._reasoning.state == "after":
            self._whole.append(self._piece)
            self._piece = Piece(self.index)
        self._piece.text += said

    def _end(self, text: str, finish: str, stop: str | int | None) -> None:
        """The last text, and why it is the last."""
        self._say(text)
        if self._reasoning is not None:
            thought, said = self._reasoning.flush()
            self._piece.reasoning += thought
            self._piece.text += said
        self._piece.finish, self._piece.stop = finish, stop

    def _shown(self, token: int, entry: TokenLogprob) -> TokenChoice:
        show = self._tokenizer.show
        return TokenChoice(
            show(token),
            max(entry.logprob, LEAST_LOGPROB),
            self._decoded,
            [(show(id), max(logprob, LEAST_LOGPROB)) for id, logprob in entry.top],
        )
