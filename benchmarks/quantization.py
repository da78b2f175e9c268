"""What quantised weights save and cost: a model's shape with random weights, as they are and small.

    python -m benchmarks.quantization --config DIRECTORY [--only int8] [--prefill 8192 131072]

The same weights are drawn on the device for each run. Told are bytes of weights, milliseconds of a
decode step, tokens of a prompt read in a second (engine and works as in benchmarks.engine), and how
far logits are from those of the unquantised weights after random tokens: ||l - l0|| / ||l0||, and
how often the likeliest token is the same. Random weights make flat logits, in which two tokens are
often almost equally likely: a trained model agrees more often.
"""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from benchmarks.engine import PROMPT, Mailbox, Work, run
from benchmarks.result import Row, write
from model.batch import Batch
from model.chunk import Chunk, Sampling
from model.families import added, forward
from model.runner import ModelRunner, load_runner
from model.weights import QUANTIZATIONS
from server.engine.loop import Loop

LENGTH = 64  # tokens before each position whose logits are compared
POSITIONS = 512


@dataclass(slots=True, frozen=True)
class Measured:
    """One run: bytes of weights, each work's value, logits [POSITIONS, V] on the host."""

    weights: int
    works: dict[str, float]
    logits: torch.Tensor


def works(decode: list[int], prefill: list[int], tokens: int) -> list[Work]:
    """Decoding of so many sequences at once, `tokens` each; prompts of so many tokens."""
    return [
        *(Work(f"decode, {B} at once", B, PROMPT, tokens, "ms a step") for B in decode),
        *(Work(f"prefill of {T:,}", 1, T, 1, "s") for T in prefill),
    ]


@torch.inference_mode()
def logits_of(runner: ModelRunner, positions: int) -> torch.Tensor:
    """Logits after `positions` random texts of LENGTH tokens."""
    rng, greedy, parts = Random(5), Sampling(temperature=0.0), []
    size = runner.capacity.block_size
    blocks = -(-LENGTH // size) if size else 0
    for first in range(0, positions, runner.capacity.slots):
        chunks = [
            Chunk(
                tokens=[rng.randrange(runner.capacity.vocab_size) for _ in range(LENGTH)],
                start=0,
                slot=slot,
                blocks=range(slot * blocks, (slot + 1) * blocks),
                sampling=greedy,
            )
            for slot in range(min(runner.capacity.slots, positions - first))
        ]
        runner.sequences.keep(chunks)
        batch = Batch.pack(chunks, runner.sequences)
        logits = added(forward(runner.model, batch, runner.store))
        parts.append(logits[:, : runner.model.drawable].cpu())
    return torch.cat(parts)


def measure(
    config: Path, quantization: str, todo: list[Work], positions: int, state_memory_gb: float | None
) -> Measured:
    """A run of its own: what it took of the device is given back."""
    runner = load_runner(
        config,
        seed=0,
        max_running=max(work.count for work in todo),
        state_memory_gb=state_memory_gb,
        quantization=quantization,
    )
    assert runner.parameters is not None
    mailbox, vocab = Mailbox(), runner.capacity.vocab_size
    loop = Loop(runner, mailbox)
    values = {}
    for work in todo:
        value = [run(loop, mailbox, work, vocab, seed) for seed in (1, 2)][-1]
        values[work.name] = value if work.unit == "ms a step" else work.prompt / value
    measured = Measured(runner.parameters.nbytes, values, logits_of(runner, positions))
    del runner, loop
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return measured


def compare(name: str, whole: Measured, small: Measured) -> list[Row]:
    """Rows of one quantization beside the run without."""
    kind = "bfloat16" if torch.cuda.is_available() else "float32"
    rows = [
        Row(
            work=f"{name}: weights",
            value=small.weights / 1e9,
            unit="GB",
            better="lower",
            peers={kind: whole.weights / 1e9},
        )
    ]
    for work, value in small.works.items():
        decode = work.startswith("decode")
        rows.append(
            Row(
                work=f"{name}: {work}",
                value=value,
                unit="ms a step" if decode else "tokens/s",
                better="lower" if decode else "higher",
                peers={kind: whole.works[work]},
            )
        )
    off = (small.logits - whole.logits).norm() / whole.logits.norm()
    same = (small.logits.argmax(-1) == whole.logits.argmax(-1)).double().mean()
    rows.append(Row(work=f"{name}: logits", value=float(off), unit="off", better="lower"))
    rows.append(
        Row(work=f"{name}: likeliest token the same", value=float(same), unit="", better="higher")
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", type=Path, required=True, help="directory with config.json")
    names = [name for name in QUANTIZATIONS if name != "none"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--decode", nargs="+", type=int, default=[1, 64], metavar="B")
    parser.add_argument("--prefill", nargs="+", type=int, default=[8192], metavar="T")
    parser.add_argument("--tokens", type=int, default=257, help="generated by each sequence")
    parser.add_argument("--positions", type=int, default=POSITIONS, help="of logits compared")
    parser.add_argument("--state-memory-gb", type=float, help="as serve's")
    options = parser.parse_args()
    todo = works(options.decode, options.prefill, options.tokens)
    fixed = todo, options.positions, options.state_memory_gb
    whole = measure(options.config, "none", *fixed)
    rows: list[Row] = []
    for name in options.only:
        rows += compare(name, whole, measure(options.config, name, *fixed))
    write("quantization", rows, name=f"quantization-{options.config.name}")


if __name__ == "__main__":
    main()
