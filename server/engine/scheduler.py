"""What is computed next: admit, pack a step under a token budget, preempt, finish.

Plain values in, plain values out: the scheduler knows neither a device nor a socket.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from model.chunk import Capacity, Chunk, Copy, Sampled
from server.engine.request import Request, accept, extend
from server.engine.slots import Holdings, saved
from server.protocol import Extend, Generate, Output, Stats, TokenLogprob, pack_tokens


@dataclass(slots=True)
class Work:
    """What the runner does next: the copies in order, then one step over the chunks."""

    copies: list[Copy]
    chunks: list[Chunk]
    requests: list[Request]  # whose chunk it is, in the same order
    admitted: list[Request]  # who took its first slot, with or without a chunk

    @property
    def tokens(self) -> int:
        return sum(len(chunk.tokens) for chunk in self.chunks)


class Scheduler:
    """Every request that has not ended is in exactly one of three queues.

    waiting: oldest first, nothing held.
    running: oldest first, each with a slot and the blocks of its positions.
    swapped: preempted, state saved on the host, youngest first. All of them are younger than any
             that runs and older than any that waits, because none is admitted before them.
    """

    def __init__(self, capacity: Capacity, *, max_step_tokens: int) -> None:
        assert max_step_tokens >= 1
        self.max_step_tokens = max_step_tokens
        self.vocab_size = capacity.vocab_size
        self.holdings = Holdings(capacity)
        bounds = [capacity.max_model_len, self.holdings.most_positions]
        self.max_length = min((bound for bound in bounds if bound is not None), default=None)
        self.waiting: dict[str, Request] = {}
        self.running: dict[str, Request] = {}
        self.swapped: dict[str, Request] = {}
        self.preemptions = 0
        self._copies: list[Copy] = []
        self._turns = 0

    def __contains__(self, id: str) -> bool:
        return id in self.running or id in self.waiting or id in self.swapped

    @property
    def idle(self) -> bool:
        """Whether nothing is left to compute."""
        return not (self.running or self.swapped or self.waiting)

    def add(self, message: Generate) -> None:
        """Queue a request. ValueError: something in it is impossible."""
        assert message.id not in self, f"{message.id} is under way"
        self.waiting[message.id] = accept(
            message, max_length=self.max_length, vocab_size=self.vocab_size
        )

    def extend(self, message: Extend) -> list[Output]:
        """More of a prompt. One that has ended meanwhile needs no more."""
        id = message.id
        request = self.running.get(id) or self.waiting.get(id) or self.swapped.get(id)
        if request is None:
            return []
        try:
            extend(request, message, max_length=self.max_length, vocab_size=self.vocab_size)
        except ValueError as error:
            return [self._fail(request, str(error))]
        return []

    def abort(self, ids: Iterable[str]) -> list[Output]:
        """End these requests wherever they are; all that they hold is free at once."""
        outputs = []
        for id in ids:
            request = self.running.get(id) or self.waiting.get(id) or self.swapped.get(id)
            if request is not None:
                request.finish = "abort"
                self._retire(request)
                outputs.append(_output(request))
        return outputs

    def schedule(self, now: float) -> Work:
        """Admit who fits and pack the next step. Empty work: there is nothing to do now."""
        admitted = self._admit(now)
        packed = self._pack()
        requests = [self.running[id] for id in packed]
        for turn, request in enumerate(requests, self._turns + 1):
            request.served = turn
        self._turns += len(requests)
        chunks = [_chunk(request, packed[request.id]) for request in requests]
        copies, self._copies = self._copies, []
        return Work(copies, chunks, requests, admitted)

    def complete(self, work: Work, sampled: list[Sampled | None]) -> list[Output]:
        """Take the tokens that the work has drawn; who has ended gives everything back."""
        assert len(sampled) == len(work.chunks), f"{len(sampled)} for {len(work.chunks)} chunks"
        outputs = []
        for request, chunk, drawn in zip(work.requests, work.chunks, sampled, strict=True):
            if request.finish is not None:
                continue  # aborted meanwhile
            if chunk.sampling is None:
                outputs.append(_output(request))
                continue
            assert drawn is not None, f"no token was drawn for {request.id}"
            if drawn.token < 0:
                outputs.append(self._fail(request, "logits were not finite"))
                continue
            request.append(drawn.token)
            outputs.append(_output(request, drawn))
            if request.finish is not None:
                self._retire(request)
        return outputs + self._announce(work)

    def fail(self, work: Work, error: str) -> list[Output]:
        """End every request of the work: its step was lost."""
        lost = [request for request in work.requests if request.finish is None]
        return [self._fail(request, error) for request in lost] + self._announce(work)

    def stats(self) -> Stats:
        """The gauges now."""
        slots, blocks = self.holdings.slots, self.holdings.blocks
        return Stats(
            running=len(self.running),
            waiting=len(self.waiting) + len(self.swapped),
            slots_used=slots.held,
            slots_total=slots.total,
            blocks_used=blocks.held,
            blocks_total=blocks.total,
            preemptions=self.preemptions,
        )

    def check_integrity(self) -> None:
        """Assert that nothing is lost, and when idle that nothing is held."""
        self.holdings.check()
        assert self.holdings.slots.held == len(self.running), "a slot per running request"
        if self.idle:
            assert self.holdings.blocks.held == 0, "blocks are held and nothing runs"

    def _admit(self, now: float) -> list[Request]:
        """Swapped first, then waiting, both oldest first, while slots and blocks last.

        One is let in only when its known tokens fit beside those of all who run, so that nobody
        comes in to be preempted at once. Into an empty engine anyone fits.
        """
        admitted = []
        lacking = self.holdings.lacking
        spare = self.holdings.blocks.free
        if self.holdings.block_size:
            spare -= sum(lacking(request) for request in self.running.values())
        while self.holdings.slots.free and (self.swapped or self.waiting):
            if self.swapped:
                request = next(reversed(self.swapped.values()))
            else:
                request = next(iter(self.waiting.values()))
            spare -= lacking(request)
            if spare < 0:
                break
            if self.swapped:
                del self.swapped[request.id]
                self._copies += self.holdings.restore(request)
            else:
                del self.waiting[request.id]
                self.holdings.admit(request)
                request.started = now
                admitted.append(request)
            self.running[request.id] = request
        return admitted

    def _pack(self) -> dict[str, int]:
        """How many tokens of whom: one token of all who have one left, then prompts in order.

        If the budget is less than that, turns are taken, the longest unserved first.
        """
        ready = [request for request in self.running.values() if request.remaining == 1]
        reading = [request for request in self.running.values() if request.remaining > 1]
        order = ready + reading
        budget = self.max_step_tokens
        if len(ready) >= budget:
            order.sort(key=lambda request: request.served)
        packed: dict[str, int] = {}
        for request in order:
            if budget == 0:
                break
            if request.id not in self.running:
                continue  # preempted by one before it in this step
            while (count := self.holdings.reach(request, min(request.remaining, budget))) == 0:
                youngest = next(reversed(self.running.values()))
                if youngest is request:
                    break  # keeps its place until an older one needs it
                budget += packed.pop(youngest.id, 0)
                self._preempt(youngest)
            if count:
                self.holdings.cover(request, request.computed + count)
                packed[request.id] = count
                budget -= count
        return packed

    def _preempt(self, request: Request) -> None:
        del self.running[request.id]
        self._copies += self.holdings.save(request)
        self.swapped[request.id] = request
        self.preemptions += 1

    def _fail(self, request: Request, error: str) -> Output:
        request.finish = "error"
        self._retire(request)
        return _output(request, error=error)

    def _retire(self, request: Request) -> None:
        """The one way out, whatever the end."""
        if self.swapped.pop(request.id, None) is not None and request.computed:
            self._copies.append(Copy(saved(request), None))
        self.waiting.pop(request.id, None)
        self.running.pop(request.id, None)
        self.holdings.release(request)

    def _announce(self, work: Work) -> list[Output]:
        """News of those who took a slot but had no part in the step."""
        return [_output(request) for request in work.admitted if not request.announced]


def _chunk(request: Request, count: int) -> Chunk:
    """The next `count` tokens as a chunk; from here on they count as computed."""
    assert request.slot is not None
    start, end = request.computed, request.computed + count
    request.computed = end
    last = end == len(request.tokens)
    return Chunk(
        tokens=request.tokens[start:end],
        start=start,
        slot=request.slot,
        blocks=request.blocks,
        sampling=request.sampling if last else None,
        generated=request.generated,
        suppress=request.suppress if last else (),
        prompt=start < request.prompt_length,
        penalised=request.sampling.penalised,
    )


def _output(request: Request, drawn: Sampled | None = None, *, error: str | None = None) -> Output:
    """What there is to tell of a request; `started` is told once."""
    started = None if request.announced else request.started
    request.announced = request.started is not None
    logprobs = None
    if drawn is not None and drawn.logprob is not None:
        logprobs = [TokenLogprob(drawn.logprob, drawn.top)]
    return Output(
        id=request.id,
        tokens=b"" if drawn is None else pack_tokens([drawn.token]),
        logprobs=logprobs,
        finish=request.finish,
        error=error,
        computed=min(request.computed, request.prompt_length),
        started=started,
    )
