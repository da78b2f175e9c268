"""One completion in the making: the engine's tokens in, pieces of text out."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from model.chunk import Sampling
from server.api.client import EngineStream
from server.api.metrics import Timeline
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

    There is one TokenChoice for each token when log-probabilities were asked for. `finish` is
    "stop" or "length"; `stop` is the stop string, or the id of stop_token_ids, that ended it.
    """

    index: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenChoice] = field(default_factory=list)
    finish: str | None = None
    stop: str | int | None = None


class Choice:
    """Counts, detokenises and watches for stop strings. `count` tokens have been generated."""

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
            prompt, skip_special_tokens=options.skip_special_tokens
        )
        self._stops = StopStrings(options.stop, include=options.include_stop)
        self._decoded = 0  # characters before the next token
        self._piece = Piece(index)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Raises GenerationError when the engine gives it up, EngineDeadError when that is gone."""
        async for output in self._stream:
            self._metrics.output(self.timeline, output, time.monotonic())
            self.cached = max(self.cached, output.cached)
            if output.finish not in (None, "stop", "length"):
                self._metrics.end(self.timeline, "error")
                raise GenerationError(output.error or "the engine gave this request up")
            self._take(output)
            piece = self._piece
            if piece.finish is not None:
                self._stream.close()
                self._metrics.end(self.timeline, piece.finish)
                yield piece
                return
            if piece.text:
                self._piece = Piece(self.index)
                yield piece
        self._metrics.end(self.timeline, "abort")
        raise EngineDeadError("the generation ended before it was finished")

    def close(self) -> None:
        """Give the slot back, unless it has ended."""
        self._stream.close()
        self._metrics.end(self.timeline, "abort")

    def _take(self, output: Output) -> None:
        """Add an Output to the piece, up to the token that completes a stop string."""
        piece, tokens = self._piece, unpack_tokens(output.tokens)
        for position, token in enumerate(tokens):
            self.count += 1
            piece.tokens.append(token)
            if output.logprobs:
                piece.logprobs.append(self._shown(token, output.logprobs[position]))
            ends = output.finish == "stop" and position == len(tokens) - 1
            if not ends or self._options.include_stop:
                self._add(self._detokenizer.push(token))
            if piece.finish is not None:
                return
            if ends and token in self._options.stop_token_ids:
                piece.stop = token
        if output.finish is not None:
            self._add(self._detokenizer.flush())
            if piece.finish is None:
                piece.text += self._stops.flush()
                piece.finish = output.finish

    def _add(self, text: str) -> None:
        self._decoded += len(text)
        if not self._options.stop or self.count < self._options.min_tokens:
            self._piece.text += text
            return
        out, stop = self._stops.push(text)
        self._piece.text += out
        if stop is not None:
            self._piece.finish, self._piece.stop = "stop", stop

    def _shown(self, token: int, entry: TokenLogprob) -> TokenChoice:
        show = self._tokenizer.show
        return TokenChoice(
            show(token),
            max(entry.logprob, LEAST_LOGPROB),
            self._decoded,
            [(show(id), max(logprob, LEAST_LOGPROB)) for id, logprob in entry.top],
        )
