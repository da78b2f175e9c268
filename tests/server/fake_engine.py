"""The real engine loop around a runner without arithmetic: python -m tests.server.fake_engine.

The next token of a sequence is a function of all tokens folded into its slot (see `next_token`),
so a slot mixed up with another, a token lost or folded twice changes everything that follows.
With --echo the n-th generated token is the n-th of the prompt instead, then --end-token.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model.chunk import (
    PENDING,
    Capacity,
    Chunk,
    Copy,
    Layout,
    OutOfDeviceMemory,
    Place,
    Sampled,
    Tensor,
)
from server.engine.process import run_engine

LONGEST = 4096  # tokens that a state of it can hold in a file
LAYOUT = (Layout("folded", "I32", (LONGEST,)),)
NAN, OOM, BUG = "nan", "oom", "bug"


def next_token(tokens: Sequence[int], vocab_size: int, suppress: Sequence[int] = ()) -> int:
    """Sum of the tokens and their number, modulo the vocabulary; the next id not suppressed."""
    token = (sum(tokens) + len(tokens)) % vocab_size
    while token in suppress:
        token = (token + 1) % vocab_size
    return token


@dataclass(kw_only=True)
class FakeRunner:
    """Slots, KV blocks and saved states as lists of the tokens folded into them.

    A trap is a token that, folded in, makes logits that are not finite, exhausts the device
    memory or raises something unforeseen.
    """

    capacity: Capacity = field(default_factory=lambda: Capacity(slots=4, state_bytes=8))
    max_step_tokens: int = 64
    seconds: dict[str, float] = field(default_factory=lambda: {"load": 0.0})
    traps: dict[int, str] = field(default_factory=dict)
    step_seconds: float = 0.0
    crash_after: int | None = None  # steps, after which the process is killed
    echo: bool = False
    end_token: int = 0
    overlaps: bool = False
    slots: dict[int, array[int]] = field(default_factory=dict)
    blocks: dict[int, dict[int, int]] = field(default_factory=dict)  # block: offset: token
    saved: dict[str, array[int]] = field(default_factory=dict)
    latest: dict[int, int] = field(default_factory=dict)  # what each slot drew last
    folded: dict[int, int] = field(default_factory=dict)  # how far each slot can be set back
    under_way: list[list[Sampled | None]] = field(default_factory=list)
    steps: list[list[Chunk]] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    keep_steps: bool = True

    def step(self, chunks: list[Chunk]) -> list[Sampled | None]:
        return self.collect(self.launch(chunks))

    def collect(self, launched: list[Sampled | None]) -> list[Sampled | None]:
        assert self.under_way and self.under_way.pop(0) is launched, "out of order"
        return launched

    def launch(self, chunks: list[Chunk]) -> list[Sampled | None]:
        assert len(self.under_way) <= self.overlaps, "one step too many is under way"
        if self.crash_after is not None:
            if self.crash_after == 0:
                os._exit(70)
            self.crash_after -= 1
        if self.step_seconds:
            time.sleep(self.step_seconds)
        if self.keep_steps:
            self.steps.append(chunks)
        assert 0 < sum(len(chunk.tokens) for chunk in chunks) <= self.max_step_tokens
        assert len({chunk.slot for chunk in chunks}) == len(chunks) <= self.capacity.slots
        traps = {self.traps[id] for chunk in chunks for id in chunk.tokens if id in self.traps}
        for chunk in chunks:
            self._fold(chunk)
        if BUG in traps:
            raise RuntimeError("an unforeseen failure")
        if OOM in traps:
            for chunk in chunks:
                self.slots[chunk.slot] = array("i", [-7])
            raise OutOfDeviceMemory("tried to allocate 1 GB")
        drawn = [self._draw(chunk) if chunk.sampling is not None else None for chunk in chunks]
        for chunk, sampled in zip(chunks, drawn, strict=True):
            if sampled is not None:
                self.latest[chunk.slot] = max(sampled.token, 0)
        self.under_way.append(drawn)
        return drawn

    def copy(self, copies: list[Copy]) -> None:
        self.copies += copies
        for copy in copies:
            state = self._load(copy.source)
            assert len(state) == copy.source.position, "a copy of another position"
            if copy.target is not None and copy.target.slot is not None:
                self.latest.pop(copy.target.slot, None)
            if copy.target is None:
                assert copy.source.key is not None
                del self.saved[copy.source.key]
            elif copy.target.key is not None:
                self.saved[copy.target.key] = state
            elif copy.target.image is not None:
                padded = array("i", [*state, *[-1] * (LONGEST - len(state))])
                data = memoryview(padded.tobytes())
                copy.target.image.tensors.append(Tensor("folded", "I32", (LONGEST,), data))
            else:
                assert copy.target.slot is not None
                self.slots[copy.target.slot] = state
                self.folded[copy.target.slot] = len(state)
                self._write(copy.target.blocks, 0, state)

    def device_memory(self) -> int:
        return 1_000_000

    def device_room(self) -> tuple[int, int]:
        return 3_000_000, 4_000_000

    def _fold(self, chunk: Chunk) -> None:
        assert 0 <= chunk.slot < self.capacity.slots
        state = self.slots[chunk.slot] if chunk.start else array("i")
        assert len(state) == chunk.start, "the slot is at another position"
        tokens = array("i", chunk.tokens)
        if PENDING in tokens:
            assert self.overlaps and self.under_way and len(tokens) == 1, "nothing is pending"
            tokens[0] = self.latest[chunk.slot]
        self.slots[chunk.slot] = state + tokens
        for part in chunk.parts:
            alone = len(part.tokens) == 1
            end = part.start + len(part.tokens)
            self.folded[chunk.slot] = end - self.capacity.rollback * alone
        if self.capacity.blocks:
            size = self.capacity.block_size
            assert len(chunk.blocks) == -(-(chunk.start + len(chunk.tokens)) // size)
            self._write(chunk.blocks, chunk.start, tokens)
            assert self._read(chunk.blocks, len(self.slots[chunk.slot])) == self.slots[chunk.slot]

    def _draw(self, chunk: Chunk) -> Sampled:
        state, vocab_size = self.slots[chunk.slot], self.capacity.vocab_size or 256
        if any(trap == NAN and id in state for id, trap in self.traps.items()):
            return Sampled(-1)
        if self.echo:
            prompt_length = len(state) - chunk.generated
            ended = chunk.generated >= prompt_length
            token = self.end_token if ended else state[chunk.generated]
        else:
            token = next_token(state, vocab_size, chunk.suppress)
        assert chunk.sampling is not None
        if chunk.sampling.logprobs is None:
            return Sampled(token)
        best = [(token, -0.5)] + [((token + n) % vocab_size, -1.0 - n) for n in range(1, 21)]
        return Sampled(token, -0.5, best[: chunk.sampling.logprobs])

    def _load(self, place: Place) -> array[int]:
        if place.key is not None:
            return self.saved[place.key]
        if place.image is not None:
            [tensor] = place.image.tensors
            return array("i", bytes(tensor.data))[: place.position]
        assert place.slot is not None
        state = self.slots[place.slot]
        folded = self.folded.get(place.slot, len(state))
        assert folded <= place.position <= len(state), "a state that cannot be set back so far"
        state = state[: place.position]
        if self.capacity.blocks:
            assert len(place.blocks) == -(-place.position // self.capacity.block_size)
            assert self._read(place.blocks, len(state)) == state
        return array("i", state)

    def _write(self, blocks: Sequence[int], start: int, tokens: Sequence[int]) -> None:
        size = self.capacity.block_size
        if size:
            for position, token in enumerate(tokens, start):
                block = blocks[position // size]
                assert 0 <= block < self.capacity.blocks
                self.blocks.setdefault(block, {})[position % size] = token

    def _read(self, blocks: Sequence[int], length: int) -> array[int]:
        size = self.capacity.block_size
        return array("i", [self.blocks[blocks[i // size]][i % size] for i in range(length)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.server.fake_engine", description=__doc__)
    add = parser.add_argument
    add("--directory", type=Path, required=True)
    add("--slots", type=int, default=4)
    add("--blocks", type=int, default=0)
    add("--block-size", type=int, default=16)
    add("--vocab-size", type=int, default=256)
    add("--max-model-len", type=int)
    add("--max-step-tokens", type=int, default=64)
    add("--step-seconds", type=float, default=0.0, help="how long a step takes")
    add("--crash-after", type=int, help="exit with code 70 in the step after so many")
    add("--load-when", type=Path, help="wait with loading until there is such a file")
    add("--fail-load", action="store_true", help="raise while loading")
    add("--oom-token", type=int, help="a step with this token is out of device memory")
    add("--nan-token", type=int, help="logits after this token are not finite")
    add("--bug-token", type=int, help="a step with this token raises something unforeseen")
    add("--echo", action="store_true", help="generate the prompt again, then --end-token")
    add("--end-token", type=int, default=0)
    add("--overlap", action="store_true", help="let a step be launched before the last is read")
    options = parser.parse_args()
    capacity = Capacity(
        slots=options.slots,
        state_bytes=1024,
        blocks=options.blocks,
        block_size=options.block_size if options.blocks else 0,
        block_bytes=64 if options.blocks else 0,
        max_model_len=options.max_model_len,
        vocab_size=options.vocab_size,
        rollback=int(options.overlap),
        fingerprint="fake",
        slot_layout=LAYOUT,
    )
    traps = {options.oom_token: OOM, options.nan_token: NAN, options.bug_token: BUG}
    traps.pop(None, None)

    def load(settings: object) -> FakeRunner:
        while options.load_when is not None and not options.load_when.exists():
            time.sleep(0.01)
        if options.fail_load:
            raise RuntimeError("tensors are missing")
        return FakeRunner(
            capacity=capacity,
            max_step_tokens=options.max_step_tokens,
            traps=traps,
            step_seconds=options.step_seconds,
            crash_after=options.crash_after,
            echo=options.echo,
            end_token=options.end_token,
            overlaps=options.overlap,
            keep_steps=False,
        )

    return run_engine(options.directory, load)


if __name__ == "__main__":
    sys.exit(main())
