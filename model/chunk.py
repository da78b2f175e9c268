"""Chunk and Sampling: the words that server and model share. No torch here.

A prompt chunk and a decode token are both a Chunk: above the kernels there are no phases. What is
made anew for every row of every step is a struct: these are made in a fraction of the time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

PENDING = -1  # stands for the id that the slot's last step draws, which the host has not read yet


@dataclass(slots=True, frozen=True, kw_only=True)
class Sampling:
    """How one token is drawn from the logits of a row.

    Order of operations: logit_bias, suppressed ids, repetition / presence / frequency penalties,
    temperature, then top_k, min_p, top_p. `temperature` 0 is greedy. `top_k` 0 is off.
    Presence and frequency penalties count generated tokens only; the repetition penalty looks at
    prompt and generated tokens. The noise of the n-th generated token is a function of (seed, n)
    alone, so that a seed gives the same text in every batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # None: none; n: that of the drawn token and of the n best

    @property
    def penalised(self) -> bool:
        """Whether a row needs the record of the tokens it has seen."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


class Chunk(msgspec.Struct, kw_only=True, gc=False):
    """Tokens of one sequence to compute in this step.

    tokens:   ids at positions start .. start + len(tokens) - 1, at least one; a single one may be
              PENDING.
    start:    how many tokens are already folded into the slot; 0 means that the slot's old content
              is ignored, whatever it is.
    slot:     state slot of the sequence, 0 <= slot < Capacity.slots.
    blocks:   KV blocks that cover positions 0 .. start + len(tokens) - 1, in order (hybrids only).
    sampling: None while more of the prompt follows; else one token is drawn from the last row.
    generated: how many tokens this sequence has generated so far (counter of the noise).
    suppress: ids that may not be drawn in this step.
    prompt:   whether these tokens belong to the prompt: only the repetition penalty counts them.
    penalised: whether the sequence's Sampling is penalised, so that its tokens must be remembered
              (a prompt chunk says so too, though its sampling is None).
    apart:    whether the last of at least three tokens is computed behind the others, as a chunk of
              one would be, so that the state can be set back by it.
    before:   with the first chunk after a checkpoint, of a penalised sequence: the tokens in front
              of `start`, all of the prompt, which no chunk has brought.
    """

    tokens: Sequence[int]
    start: int
    slot: int
    blocks: Sequence[int] = ()
    sampling: Sampling | None = None
    generated: int = 0
    suppress: Sequence[int] = ()
    prompt: bool = True
    penalised: bool = False
    apart: bool = False
    before: Sequence[int] = ()

    @property
    def parts(self) -> tuple[Chunk, ...]:
        """What is computed, one after another."""
        if not self.apart:
            return (self,)
        n = len(self.tokens) - 1
        assert n > 1, "two parts of one token would be computed together"
        replace = msgspec.structs.replace
        return (
            replace(self, tokens=self.tokens[:n], sampling=None),
            replace(self, tokens=self.tokens[n:], start=self.start + n),
        )


class Sampled(msgspec.Struct, gc=False):
    """A drawn token. token -1: the logits were not finite, the request must fail.

    logprob and top (id, log-probability; best first) are of the model's distribution before
    temperature and filters, and are given when Sampling.logprobs is not None.
    """

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


@dataclass(slots=True, frozen=True)
class Layout:
    """A tensor that every slot (or KV block) holds. dtype is safetensors' name: F32, BF16, I64."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(slots=True, frozen=True)
class Tensor:
    """A tensor in host memory, as the bytes of its elements in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class Image:
    """A state as named tensors of bytes: what a file of it holds.

    Those of Capacity.slot_layout first, then those of Capacity.block_layout, whose first dimension
    counts the blocks. Empty until a Copy has filled it. What the state does not use is zero.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self._tensors = list(tensors)
        self._make: Callable[[], list[Tensor]] | None = None

    def fill(self, make: Callable[[], list[Tensor]]) -> None:
        """Let these be the tensors; they are made for the first who asks, on its thread."""
        self._make = make

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in order. It may take a while until the device has given them."""
        if self._make is not None:
            self._tensors, self._make = self._make(), None
        return self._tensors


@dataclass(slots=True, frozen=True)
class Place:
    """Where the state of one sequence lies: in a slot and blocks, on the host, or in an image.

    Exactly one of slot, key and image is given. `position` is how many tokens the state has folded.
    """

    slot: int | None = None
    blocks: tuple[int, ...] = ()
    key: str | None = None
    image: Image | None = None
    position: int = 0


@dataclass(slots=True, frozen=True)
class Copy:
    """Copy a state bit for bit from source to target; target None forgets a source on the host.

    Between slots, blocks that are the same on both sides are shared, not copied. With `bare`, the
    record of the tokens that a penalised sequence has seen stays behind. An image is filled from
    the host, or is checked against the layouts by its giver and put there.
    """

    source: Place
    target: Place | None
    bare: bool = False


@dataclass(slots=True, frozen=True, kw_only=True)
class Capacity:
    """What a loaded model can hold.

    state_bytes is the size of one slot, block_bytes that of one KV block over all layers (0 for a
    model without full softmax layers, whose `blocks` and `block_size` are 0 too). A state may be
    gone on with from up to `rollback` tokens before its position, as if these had not been, where
    they were computed one by one, or apart.
    pinned: states on the host lie in pinned memory, of which a state takes as much as it has, and
    beside KV blocks a power of two for its slot and one for these.
    max_model_len is None for a model whose sequences may grow without bound. dtype is that of
    weights and activations; the layouts are what a slot and a block hold.
    """

    slots: int
    state_bytes: int
    blocks: int = 0
    block_size: int = 0
    block_bytes: int = 0
    rollback: int = 0
    pinned: bool = False
    max_model_len: int | None = None
    vocab_size: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    fingerprint: str = ""
    slot_layout: tuple[Layout, ...] = ()
    block_layout: tuple[Layout, ...] = ()

    @property
    def identity(self) -> str:
        """Names what a state depends on beside tokens and a salt: the model, and how it computes.

        Where two servers differ in it, neither can use the other's states.
        """
        layouts = (
            f"{layout.name} {layout.dtype} {list(layout.shape)}"
            for layout in (*self.slot_layout, *self.block_layout)
        )
        parts = (self.fingerprint, self.dtype, str(self.block_size), *layouts)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class OutOfDeviceMemory(Exception):
    """A step ran out of device memory: its requests are lost, the runner goes on."""


class Runner(Protocol):
    """What the engine needs of a model; a fake one for tests is a few lines.

    Steps and copies are carried out in the order in which they are asked for. A runner that
    `overlaps` does so beside the host: a step may be launched before the last one is collected.
    """

    capacity: Capacity
    overlaps: bool

    def launch(self, chunks: list[Chunk]) -> Any:
        """Begin to fold each chunk into its slot and to draw a token where sampling is given.

        Raises OutOfDeviceMemory, after which the slots of these chunks hold garbage.
        """
        ...

    def collect(self, launched: Any) -> list[Sampled | None]:
        """What a step has drawn, in the order of its chunks; waits for it."""
        ...

    def copy(self, copies: list[Copy]) -> None:
        """Carry out the copies in order, ordered with the steps before and after."""
        ...

    def device_memory(self) -> int:
        """Bytes of device memory (process memory on the CPU) held now."""
        ...

    def device_room(self) -> tuple[int, int]:
        """Bytes that the device (the host on the CPU) has free for anyone now, and in all."""
        ...
