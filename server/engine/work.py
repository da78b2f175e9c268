"""A step's work, the chunk that a request has in it, and the news that comes of it."""

from __future__ import annotations

from dataclasses import dataclass

from model.chunk import PENDING, Chunk, Copy, Sampled
from server.engine.request import Request
from server.protocol import Output, TokenLogprob, pack_token

UNKNOWN = (PENDING,)  # the tokens of a chunk that begins where what is known ends


@dataclass(slots=True)
class Work:
    """What the runner does next: the copies in order, then one step over the chunks."""

    copies: list[Copy]
    chunks: list[Chunk]
    requests: list[Request]  # whose chunk it is, in the same order
    admitted: list[Request]  # who took its first slot, with or without a chunk
    tokens: int  # of all chunks
    begun: float  # when it was scheduled

    @property
    def rows(self) -> int:
        """How many of the tokens continue what was generated."""
        return sum(not chunk.prompt for chunk in self.chunks)

    def lose(self) -> None:
        """The step has failed: nothing may be kept of what lies in the slots of these chunks."""
        for request in self.requests:
            request.lost = True


def chunk_of(request: Request, count: int) -> Chunk:
    """The next `count` tokens as a chunk; from here on they count as computed."""
    assert request.slot is not None
    start, end, known = request.computed, request.computed + count, len(request.tokens)
    request.computed = end
    request.apart = bool(request.wanted) and request.wanted[0] < end
    assert not request.apart or request.wanted[0] == end - 1, (
        "a position is passed by more than one"
    )
    penalised = request.sampling.penalised
    last = end == known + request.drawing and not request.reading
    chunk = Chunk(
        tokens=request.tokens[start:end] if start < known else UNKNOWN,
        start=start,
        slot=request.slot,
        blocks=request.blocks,
        sampling=request.sampling if last else None,
        generated=known + request.drawing - request.prompt_length,
        suppress=request.suppress if last else (),
        prompt=start < request.prompt_length,
        penalised=penalised,
        apart=request.apart,
        before=request.tokens[:start] if penalised and 0 < start == request.cached else (),
    )
    request.drawing += last
    return chunk


def output_of(
    request: Request, drawn: Sampled | None = None, *, error: str | None = None
) -> Output:
    """What there is to tell of a request; `started` is told once."""
    started = None
    if not request.announced:
        started = request.started
        request.announced = started is not None
    logprobs = None
    if drawn is not None and drawn.logprob is not None:
        logprobs = [TokenLogprob(drawn.logprob, drawn.top)]
    return Output(
        id=request.id,
        tokens=b"" if drawn is None else pack_token(drawn.token),
        logprobs=logprobs,
        finish=request.finish,
        error=error,
        computed=min(request.computed, request.prompt_length),
        cached=request.cached,
        started=started,
    )
