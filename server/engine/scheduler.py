"""What is computed next: admit, pack a step under a token budget, preempt, finish.

Plain values in, plain values out: the scheduler knows neither a device nor a socket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from model.chunk import Capacity, Copy, Sampled
from server.engine.admission import Admission
from server.engine.budget import Budget
from server.engine.chain import Chain
from server.engine.checkpoints import Checkpoints
from server.engine.queue import Queue
from server.engine.request import Request, accept, extend
from server.engine.slots import Holdings, saved
from server.engine.states import States
from server.engine.tiers import Checkpoint
from server.engine.work import Work, chunk_of, output_of
from server.protocol import Extend, Generate, Output, Read, Stats


class Scheduler:
    """Every request that has not ended is in exactly one of three queues, in the order of rank:
    the more urgent first, and of one urgency the older.

    waiting: nothing held.
    running: each with a slot and the blocks of its positions.
    swapped: preempted, state saved on the host.

    The last of those who run leaves when blocks run out, whoever needs them. To let one in that has
    no slot or blocks only less urgent ones leave, the last first, and while the host has room. Of
    one urgency the preempted come in before those who wait. Nobody comes in before anyone more
    urgent, unless that one waits for a checkpoint, and nobody leaves and comes in in one step. Who
    ends once the step under way is collected is let end: what it leaves behind lies in its slot.
    """

    REASONS = ("blocks", "priority")  # of preemptions

    def __init__(
        self,
        capacity: Capacity,
        *,
        max_step_tokens: int,
        caching: bool = False,
        host_bytes: int = 0,
        directory: Path | None = None,
        disk_bytes: int = 0,
        swap_bytes: int = 0,
        target_seconds: float | None = None,
    ) -> None:
        self.budget = Budget(max_step_tokens, target_seconds)
        self.vocab_size = capacity.vocab_size
        self.rollback = capacity.rollback
        self.holdings = Holdings(capacity)
        bounds = [capacity.max_model_len, self.holdings.most_positions]
        self.max_length = min((bound for bound in bounds if bound is not None), default=None)
        self.waiting = Queue()
        self.running = Queue()
        self.swapped = Queue()
        self.preemptions: Counter[str] = Counter(dict.fromkeys(self.REASONS, 0))
        self._copies: list[Copy] = []
        self.checkpoints: Checkpoints | None = None
        self.states: States | None = None
        if caching:
            self.checkpoints = Checkpoints(
                capacity,
                self.holdings,
                self._copies,
                host_bytes=host_bytes,
                directory=directory,
                disk_bytes=disk_bytes,
            )
            self.states = States(self.checkpoints)
        self.admission = Admission(
            self.holdings,
            self.checkpoints,
            waiting=self.waiting,
            running=self.running,
            swapped=self.swapped,
            swap_bytes=swap_bytes,
        )
        self._arrivals = 0
        self._turns = 0

    def __contains__(self, id: str) -> bool:
        if self.states is not None and id in self.states:
            return True
        return id in self.running or id in self.waiting or id in self.swapped

    @property
    def idle(self) -> bool:
        """Whether nothing is left to compute."""
        return not (self.running or self.swapped or self.waiting)

    @property
    def pressing(self) -> bool:
        """Whether copies are due, though nothing may be left to compute."""
        return bool(self._copies)

    def add(self, message: Generate | Read) -> None:
        """Queue a request. ValueError: something in it is impossible."""
        assert message.id not in self, f"{message.id} is under way"
        base: Chain | None = None
        salt = ""
        if message.base or isinstance(message, Read):
            if self.states is None:
                raise ValueError("prefix_caching is off")
            if message.base:
                found = self.states.base(message.base)
                if found is None:
                    self.states.arrive(message, self.add)
                    return
                base, salt = found
        request = accept(message, max_length=self.max_length, vocab_size=self.vocab_size, base=base)
        request.salt = salt or request.salt
        if self.checkpoints is not None:
            self.checkpoints.begin(request)
        self._arrivals += 1
        request.rank = (request.priority, self._arrivals)
        self.waiting[request.id] = request

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
        if self.checkpoints is not None and id not in self.waiting:
            self.checkpoints.extend(request, len(message.tokens) // 4)
        return []

    def abort(self, ids: Iterable[str]) -> list[Output]:
        """End these requests wherever they are; all that they hold is free at once."""
        outputs = []
        for id in ids:
            request = self.running.get(id) or self.waiting.get(id) or self.swapped.get(id)
            if request is not None:
                request.finish = "abort"
                self._retire(request)
                outputs.append(output_of(request))
            elif self.states is not None and self.states.abort(id):
                outputs.append(Output(id=id, finish="abort"))
        return outputs

    def schedule(self, now: float) -> Work:
        """Admit who fits and pack the next step. Empty work: there is nothing to do now."""
        if self.checkpoints is not None:
            self.checkpoints.jobs.done()
            for request in self.running.order:
                if request.wanted:
                    self.checkpoints.take(request)
        admitted = self._admit(now)
        packed = self._pack()
        if packed and not self.waiting and self.checkpoints is not None:
            self.checkpoints.make_room()
        for turn, request in enumerate(packed, self._turns + 1):
            request.served = turn
        self._turns += len(packed)
        chunks = [chunk_of(request, count) for request, count in packed.items()]
        copies = self._copies.copy()
        self._copies.clear()
        return Work(copies, chunks, list(packed), admitted, sum(packed.values()), now)

    def complete(self, work: Work, sampled: list[Sampled | None]) -> list[Output]:
        """Take the tokens that the work has drawn; who has ended gives everything back.

        One work more may have been scheduled since, and launched.
        """
        assert len(sampled) == len(work.chunks), f"{len(sampled)} for {len(work.chunks)} chunks"
        outputs = []
        for request, chunk, drawn in zip(work.requests, work.chunks, sampled, strict=True):
            request.drawing -= chunk.sampling is not None
            if request.finish is not None:
                continue  # aborted meanwhile, or ended by a token before this one
            if chunk.sampling is None:
                outputs.append(output_of(request))
                if request.reading and chunk.start + len(chunk.tokens) == len(request.tokens):
                    request.finish = "stop"
                    self._retire(request)
                continue
            assert drawn is not None, f"no token was drawn for {request.id}"
            if drawn.token < 0:
                if self.checkpoints is not None:
                    self.checkpoints.disown(request)
                outputs.append(self._fail(request, "logits were not finite"))
                continue
            request.append(drawn.token)
            outputs.append(output_of(request, drawn))
            if request.finish is not None:
                self._retire(request)
        return outputs + self._announce(work)

    def fail(self, work: Work, error: str) -> list[Output]:
        """End every request of the work: its step was lost, and what was kept since.

        After work.lose(), and when all work before it was completed.
        """
        lost = [request for request in work.requests if request.finish is None]
        if self.checkpoints is not None:
            for request, chunk in zip(work.requests, work.chunks, strict=True):
                self.checkpoints.disown(request, chunk.start)
        return [self._fail(request, error) for request in lost] + self._announce(work)

    def stats(self, *, cache: bool = True) -> Stats:
        """The gauges now, with those of checkpoints or without."""
        slots, blocks = self.holdings.slots, self.holdings.blocks
        return Stats(
            running=len(self.running),
            waiting=len(self.waiting) + len(self.swapped),
            slots_used=len(self.running),
            slots_total=slots.total,
            blocks_used=blocks.held,
            blocks_total=blocks.total,
            step_budget=self.budget.given,
            preemptions=dict(self.preemptions),
            swapped_bytes=self.admission.swapped_bytes,
            cache=self.checkpoints.stats() if cache and self.checkpoints is not None else None,
        )

    def check_integrity(self) -> None:
        """Assert that nothing is lost, and when idle that nothing is held."""
        self.holdings.check()
        kept: set[int] = set()
        slots = len(self.running)
        if self.checkpoints is not None:
            self.checkpoints.check()
            slots += len(self.checkpoints.tiers.device)
            kept = {block for c in self.checkpoints.tiers.device for block in c.blocks}
        assert self.holdings.slots.held == slots, "a slot per running request and checkpoint"
        if self.idle:
            assert self.holdings.blocks.held == len(kept), "blocks are held and nothing runs"

    def _admit(self, now: float) -> list[Request]:
        """Who comes in, in order, while slots and blocks last.

        One is let in only when its known tokens fit beside those of all who run, so that nobody
        comes in to be preempted at once; checkpoints make room, then less urgent requests. Into an
        empty engine anyone fits. Who waits for a checkpoint of another is passed by. What is left
        of the room of those who leave is theirs, not that of others who are no more urgent.
        """
        admitted: list[Request] = []
        left: list[Request] = []
        candidates = self.admission.candidates()
        readers = (*self.running.order, *self.swapped.order)
        for request in candidates:
            if not self.admission.slot(request) or any(r.rank[0] <= request.rank[0] for r in left):
                break
            found = None
            if request.id in self.waiting:
                found = self.checkpoints.find(request) if self.checkpoints else None
                if self.admission.defer(request, found, readers):
                    continue
                if request.reading and found and found.position == request.prompt_length:
                    request.finish, request.cached = "stop", found.position
                    assert self.checkpoints is not None
                    self.checkpoints.count(request, found)
                    self._retire(request, found)
                    continue
            if not self.admission.fits(request, found):
                leaving = self.admission.leaving(request, found)
                if self.running and not leaving:
                    break
                for other in leaving:
                    self._preempt(other, "priority")
                left += leaving
                if not leaving:
                    # it takes all there is on the device, what its own checkpoint holds as well
                    assert self.admission.fits(request, None), "an empty engine has room for anyone"
                    found = self.checkpoints.find(request) if self.checkpoints else None
            if request.id in self.swapped:
                del self.swapped[request.id]
                self._copies += self.holdings.restore(request)
            else:
                del self.waiting[request.id]
                self.holdings.admit(request)
                if self.checkpoints is not None:
                    self.checkpoints.admit(request, found)
                request.started = now
                admitted.append(request)
            self.running[request.id] = request
            readers = (*readers, request)
        if self.checkpoints is not None:
            self.checkpoints.settle()
        return admitted

    def _pack(self) -> dict[Request, int]:
        """How many tokens of whom: one token of all who have one left, then prompts in order.

        If the budget is less than that, turns are taken, among equally urgent ones the longest
        unserved first.
        """
        ready: list[Request] = []
        reading: list[Request] = []
        for request in self.running.order:
            remaining = request.remaining
            if remaining == 1:
                ready.append(request)
            elif remaining > 1:
                reading.append(request)
        order = ready + reading
        budget = self.budget.give(len(ready))
        if len(ready) >= budget:
            order.sort(key=lambda request: (request.rank[0], request.served))
        packed: dict[Request, int] = {}
        for request in order:
            if budget == 0:
                break
            if request.slot is None:
                continue  # preempted by one before it in this step
            while (count := self._reach(request, budget)) == 0:
                last = self.running.order[-1]
                if last is request or last.ending:
                    break  # keeps its place until one before it needs it, or the last has ended
                budget += packed.pop(last, 0)
                self._preempt(last, "blocks")
            if count:
                self.holdings.cover(request, request.computed + count)
                packed[request] = count
                budget -= count
        return packed

    def _reach(self, request: Request, budget: int) -> int:
        """How many of the next tokens can be computed: up to the next position that is wanted, or
        one past it, and as far as blocks last when checkpoints have made room."""
        wish = min(request.remaining, budget)
        if request.wanted:
            pause = request.wanted[0] - request.computed
            if wish != pause + 1 or not self._passes(request, wish):
                wish = min(wish, pause)
        while (count := self.holdings.reach(request, wish)) < wish and self.admission.evict():
            pass
        return count

    def _passes(self, request: Request, count: int) -> bool:
        """Whether the next `count` tokens are the rest of a prompt whose last one can be taken back
        from its state: that need not pause for the state in front of it."""
        if request.reading or request.more or not self.rollback:
            return False
        return count > 2 and request.computed + count == request.prompt_length

    def _preempt(self, request: Request, reason: str) -> None:
        del self.running[request.id]
        self._copies += self.holdings.save(request)
        self.swapped[request.id] = request
        self.preemptions[reason] += 1

    def _fail(self, request: Request, error: str) -> Output:
        request.finish = "error"
        self._retire(request)
        return output_of(request, error=error)

    def _retire(self, request: Request, kept: Checkpoint | None = None) -> None:
        """The one way out, whatever the end. `kept` is the checkpoint that is all a read asks."""
        if self.swapped.pop(request.id, None) is not None and request.computed:
            self._copies.append(Copy(saved(request), None))
        self.waiting.pop(request.id, None)
        ran = self.running.pop(request.id, None) is not None
        done = request.finish in ("stop", "length")
        if ran and done and self.checkpoints is not None:
            kept = self.checkpoints.inherit(request)
        if done and request.reading and self.states is not None:
            self.states.keep(request, kept)
        self.holdings.release(request)
        if self.checkpoints is not None:
            self.checkpoints.leave(request)

    def _announce(self, work: Work) -> list[Output]:
        """News of those who took a slot but had no part in the step."""
        return [output_of(request) for request in work.admitted if not request.announced]
