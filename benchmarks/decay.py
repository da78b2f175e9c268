"""How well a Ring-linear checkpoint predicts a text under each published decay (docs/decay.md).

    python -m benchmarks.decay MODEL TEXT [--tokens 8192] [--last 1024]

Reads the first tokens of a text file at once and the last ones of them one by one; prints the mean
log-probability of these under each --decay-layer-factor. The decay it was trained with wins.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model.batch import Batch
from model.chunk import Chunk, Sampling
from model.families import added, forward
from model.families.bailing import LAYER_FACTORS
from model.runner import ModelRunner, load_runner


@torch.inference_mode()
def mean_logprob(runner: ModelRunner, ids: list[int], last: int) -> float:
    """Of the last tokens of ids, each after all before it."""
    size = runner.capacity.block_size
    total, start, read = 0.0, 0, len(ids) - last
    while start < len(ids) - 1:
        stop = min(start + runner.max_step_tokens, read) if start < read else start + 1
        blocks = range(-(-stop // size)) if size else ()
        chunk = Chunk(
            tokens=ids[start:stop], start=start, slot=0, blocks=blocks, sampling=Sampling()
        )
        runner.sequences.keep([chunk])
        batch = Batch.pack([chunk], runner.sequences)
        logits = added(forward(runner.model, batch, runner.store))
        if stop >= read:
            total += float(logits[0].log_softmax(-1)[ids[stop]])
        start = stop
    return total / last


def compare(path: Path, ids: list[int], last: int, **options: object) -> dict[str, float]:
    """Mean log-probability by layer factor."""
    means = {}
    for name in LAYER_FACTORS:
        runner = load_runner(path, max_running=1, decay_layer_factor=name, **options)
        means[name] = mean_logprob(runner, ids, last)
        del runner
        gc.collect()
        torch.cuda.empty_cache()
    return means


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.decay", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint directory")
    parser.add_argument("text", type=Path, help="a long text that the model has not seen")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text")
    parser.add_argument("--last", type=int, default=1024, help="of these, that count")
    given = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(given.model / "tokenizer.json"))
    ids = tokenizer.encode(given.text.read_text(encoding="utf-8")).ids[: given.tokens]
    if not 0 < given.last < len(ids):
        parser.error(f"--last is {given.last}, the text has {len(ids)} tokens")
    for name, mean in compare(given.model, ids, given.last).items():
        print(f"{name:8} {mean:.5f}")


if __name__ == "__main__":
    main()
