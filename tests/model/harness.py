"""Sequences in slots and the logits of their chunks: what the tests of every family stand on."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from model.batch import Batch
from model.chunk import Chunk, Sampling
from model.families import added, forward
from model.runner import ModelRunner, load_runner

GREEDY = Sampling(temperature=0.0)
STEP_TOKENS = 288  # of the longest step here: each size of a step has kernels to be compiled
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(path: Path, **options: object) -> ModelRunner:
    """A runner for steps of few tokens: it warms up, and records, as many kinds of them."""
    usual = {"dtype": "float32", "max_running": 8, "state_memory_gb": 0.02}
    usual["max_step_tokens"] = STEP_TOKENS
    return load_runner(path, device=DEVICE, **usual | options)  # type: ignore[arg-type]


class Sequence:
    """A sequence in a slot, with blocks where the model has them."""

    def __init__(self, runner: ModelRunner, ids: list[int], slot: int) -> None:
        self.runner, self.ids, self.slot, self.done = runner, ids, slot, 0
        c = runner.capacity
        per = -(-c.blocks // c.slots) if c.blocks else 0
        self.all_blocks = list(range(slot * per, min((slot + 1) * per, c.blocks)))
        random.Random(slot).shuffle(self.all_blocks)

    def chunk(self, n: int) -> Chunk:
        """The next n tokens; the last row is asked for."""
        start, self.done = self.done, self.done + n
        size = self.runner.capacity.block_size
        blocks = self.all_blocks[: -(-self.done // size)] if size else []
        return Chunk(
            tokens=self.ids[start : self.done],
            start=start,
            slot=self.slot,
            blocks=blocks,
            sampling=GREEDY,
        )


@torch.inference_mode()
def logits_of(runner: ModelRunner, chunks: list[Chunk]) -> torch.Tensor:
    """Logits of the last row of each chunk, in the chunks' order (singles must come first)."""
    runner.sequences.keep(chunks)
    batch = Batch.pack(chunks, runner.sequences)
    return added(forward(runner.model, batch, runner.store)).cpu()


def prompt(length: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(length)]
