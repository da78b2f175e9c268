"""Trains "recall": python -m model.bundled.train CORPUS_DIR --out DIR [--resume PATH].

A curriculum: one fact in 128 bytes first, more of both each time the answers are learnt. Each
training step on a GPU is one CUDA graph; the conversations come from processes beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.bundled.checkpoint import ASSISTANT, END, END_OF_TEXT, USER, encode, load, save
from model.bundled.evaluate import exact_answers
from model.bundled.facts import Library, case, conversation, drill
from model.bundled.network import LightningAttention, Network, Shape, WindowAttention

HELD_OUT_BOOK = "news-from-nowhere.txt"
LANGUAGE_WEIGHT = 0.05
PAD, READ, WRITTEN, FIRST = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Stage:
    """Conversations of up to `size` tokens with up to `facts` facts, and a share of drills; over
    when the mean loss of the numbers' first digits is below `learnt`. `weight` is that of the mean
    loss of answers, beside 1 for these digits."""

    size: int
    facts: int
    drills: float = 0.0
    terse: float = 0.0
    learnt: float = 0.02
    weight: float = 10.0


STAGES = (
    Stage(192, 2, drills=0.95, terse=1.0, learnt=0.4, weight=1.0),
    Stage(256, 2, drills=0.7, terse=0.4, learnt=0.3, weight=1.0),
    Stage(256, 2, drills=0.25, terse=0.3, learnt=0.2, weight=1.0),
    Stage(384, 3, drills=0.15, terse=0.3),
    Stage(512, 4, drills=0.15, terse=0.3),
    Stage(1024, 4),
    Stage(2048, 5),
    Stage(4096, 6),
)


def example(rng: Random, library: Library, stage: Stage) -> tuple[list[int], list[int]]:
    """Token ids, and for each of them whether it is read or written; may be too long."""
    if rng.random() < stage.drills:
        said, again = (x.encode() for x in drill(rng, size=stage.size - 6, terse=stage.terse))
        digits = [WRITTEN if chr(byte).isdigit() else READ for byte in again]
        marks = [READ] * (len(said) + 3) + digits + [READ]
        return [USER, *said, END, ASSISTANT, *again, END], marks
    facts = rng.randint(1, stage.facts)
    size = stage.size + 1
    if rng.random() < 0.3:
        size = rng.randint(min(size, 128 * facts), size)
    ids, written = encode(conversation(rng, library, size=size, facts=facts))
    return ids, [WRITTEN if mine else READ for mine in written]


def make_batch(rng: Random, library: Library, stage: Stage, rows: int) -> np.ndarray:
    """int16 [2, rows, size + 1]: token ids, and for each whether it is padding, read, written, or
    the first digit that is written of a number: the one that tells which fact is meant."""
    batch = np.zeros((2, rows, stage.size + 1), dtype=np.int16)
    batch[0] = END_OF_TEXT
    row = 0
    while row < rows:
        ids, marks = example(rng, library, stage)
        if len(ids) <= stage.size + 1:
            batch[0, row, : len(ids)] = ids
            batch[1, row, : len(ids)] = marks
            row += 1
    digit = (batch[0] >= ord("0")) & (batch[0] <= ord("9")) & (batch[1] == WRITTEN)
    batch[1, :, 1:][digit[:, 1:] & ~digit[:, :-1]] = FIRST
    return batch


def produce(queue: Any, stage: Any, corpus: Path, seed: int, batch_size: int) -> None:
    """Fill the queue with (stage, batch) forever; a quarter are of stages gone by."""
    rng = Random(seed)
    library = Library.read(corpus, hold_out=HELD_OUT_BOOK, held_out=False)
    while True:
        now = int(stage.value)
        if now and rng.random() < 0.25:
            now = rng.randrange(max(0, now - 4), now)
        size = STAGES[now].size
        queue.put((now, make_batch(rng, library, STAGES[now], max(2, batch_size // size))))


class Trainer:
    """The optimizer and one step function per stage, a CUDA graph where there is a GPU."""

    def __init__(self, network: Network, rate: float, decay: float) -> None:
        self.network = network
        self.device = next(network.parameters()).device
        self.weights = [weight for weight in network.parameters() if weight.requires_grad]
        self.rate = torch.tensor(rate, device=self.device)
        self.optimizer = torch.optim.AdamW(
            self.weights,
            lr=self.rate,
            betas=(0.9, 0.95),
            weight_decay=decay,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        self.steps: dict[int, Callable[[np.ndarray], Tensor]] = {}

    def step(self, stage: int, batch: np.ndarray) -> Tensor:
        """One step on a batch; the losses of first digits, answers and all, and the share of
        first digits that were the most likely ones [4]."""
        if stage not in self.steps:
            graph = self.device.type == "cuda"
            weight = STAGES[stage].weight
            self.steps[stage] = (self._graph if graph else self._eager)(batch, weight)
        return self.steps[stage](batch)

    def _eager(self, batch: np.ndarray, weight: float) -> Callable[[np.ndarray], Tensor]:
        return lambda batch: self._update(torch.from_numpy(batch).to(self.device).long(), weight)

    def _graph(self, batch: np.ndarray, weight: float) -> Callable[[np.ndarray], Tensor]:
        inputs = torch.from_numpy(batch).to(self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._update(inputs.long(), weight)
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses = self._update(inputs.long(), weight)

        def replay(batch: np.ndarray) -> Tensor:
            inputs.copy_(torch.from_numpy(batch))
            graph.replay()
            return losses.clone()

        return replay

    def _update(self, batch: Tensor, weight: float) -> Tensor:
        ids, marks = batch[0], batch[1, :, 1:]
        logits = self.network(ids[:, :-1])
        targets = ids[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = loss.view_as(targets)
        masks = [(marks >= least).float() for least in (FIRST, WRITTEN, READ)]
        first, answer, language = ((loss * mask).sum() / mask.sum() for mask in masks)
        self.optimizer.zero_grad(set_to_none=True)
        (first + weight * answer + LANGUAGE_WEIGHT * language).backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            right = ((logits.argmax(-1) == targets) * masks[0]).sum() / masks[0].sum()
            return torch.stack((first, answer, language, right))


@torch.no_grad()
def prime(network: Network) -> None:
    """Make what is attended to as loud as the residual, and queries start like the keys: without
    both, no likeness of contexts is seen and the model never learns which number was meant."""
    shape = network.shape
    size = (shape.num_attention_heads, 3, shape.head_dim, shape.hidden_size)
    for module in network.modules():
        if isinstance(module, LightningAttention):
            q, k, _ = module.qkv_proj.weight.view(size).unbind(1)
            q.copy_(0.9 * k + (1 - 0.9**2) ** 0.5 * q)
        elif isinstance(module, WindowAttention):
            module.o_proj.weight.mul_(4.0)


def rate_at(options: argparse.Namespace, step: int, elapsed: float) -> float:
    """Linear warm-up by steps; constant; a cosine down to 2 % in the last part of the time."""
    part = (elapsed / options.seconds - options.hold) / (1 - options.hold)
    cosine = 0.51 + 0.49 * math.cos(math.pi * min(max(part, 0.0), 1.0))
    return float(options.rate * min(1.0, (step + 1) / options.warm_up) * cosine)


def write_state(network: Network, stage: int, path: Path) -> None:
    """Float32 weights to go on from, with the shape and the stage in the metadata."""
    weights = {name: weight.detach().cpu() for name, weight in network.state_dict().items()}
    about = {"shape": json.dumps(asdict(network.shape)), "stage": str(stage)}
    partial = path.with_suffix(".partial")
    save_file(weights, partial, metadata=about)
    partial.replace(path)


def read_state(path: Path) -> tuple[Network, int]:
    """The network and the stage that `write_state` wrote, or a checkpoint's and the last stage."""
    if path.is_dir():
        saved = load(path)
        network = Network(saved.shape)
        network.load_state_dict(saved.state_dict())
        return network, len(STAGES) - 1
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        network = Network(Shape(**json.loads(about["shape"])))
        names = file.keys()
        network.load_state_dict({name: file.get_tensor(name) for name in names})
    return network, int(about["stage"])


def measure(network: Network, corpus: Path, *, sizes: list[int], count: int) -> dict[str, float]:
    """The share of exact answers on the held-out book, by size and form, in bfloat16."""
    library = Library.read(corpus, hold_out=HELD_OUT_BOOK, held_out=True)
    rounded = Network(network.shape)
    rounded.load_state_dict(network.state_dict())
    rounded.to(next(network.parameters()).device, torch.bfloat16)
    shares = {}
    for size in sizes:
        for form in ("single", "follow-up", "nameless"):
            rng = Random(size)
            cases = [
                case(rng, library, size=size, facts=1 + i % 4, form=form) for i in range(count)
            ]
            right = exact_answers(rounded, cases, tokens=1 << 17)
            shares[f"{size} {form}"] = sum(right) / count
    return shares


def train(options: argparse.Namespace) -> Network:
    """Train for `options.seconds`, writing the state as it goes."""
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision(options.precision)
    stage = 0
    if options.resume:
        network, stage = read_state(options.resume)
    else:
        network = Network(
            Shape(
                hidden_size=options.width,
                intermediate_size=options.inner,
                num_hidden_layers=options.layers,
                num_attention_heads=options.heads,
                head_dim=options.head_dim,
            )
        )
        prime(network)
    if options.stage is not None:
        stage = options.stage
    network.to(options.device)
    context = mp.get_context("spawn")
    queue, shared = context.Queue(maxsize=16), context.Value("i", stage)
    producers = [
        context.Process(
            target=produce,
            args=(queue, shared, options.corpus, options.seed * 1000 + i, options.batch),
            daemon=True,
        )
        for i in range(options.producers)
    ]
    for producer in producers:
        producer.start()
    trainer = Trainer(network, options.rate, options.decay)
    print(json.dumps({"parameters": sum(w.numel() for w in network.parameters())}), flush=True)
    mean: Tensor | None = None
    recent: list[Tensor] = []
    entered, step = 0, 0
    start = told = saved = since = time.monotonic()
    while (now := time.monotonic()) - start < options.seconds and step < options.steps:
        trainer.rate.fill_(rate_at(options, step, now - start))
        at, batch = queue.get()
        losses = trainer.step(at, batch)
        step += 1
        if at == stage:
            recent.append(losses)
        if len(recent) == 16:
            block = torch.stack(recent).mean(0).cpu()
            recent.clear()
            mean = block if mean is None else mean + 0.3 * (block - mean)
            learnt = float(mean[0]) < STAGES[stage].learnt and step - entered > 60
            learnt |= now - since > options.patience
            learnt &= stage + 1 < min(len(STAGES), options.stages)
            if learnt:
                stage += 1
                shared.value, entered, since = stage, step, now
            if learnt or now - told > options.tell:
                told = now
                line = {
                    "step": step,
                    "seconds": round(now - start, 1),
                    "stage": stage,
                    "first": round(float(mean[0]), 4),
                    "answer": round(float(mean[1]), 4),
                    "language": round(float(mean[2]), 3),
                    "right": round(float(mean[3]), 4),
                }
                if entered == step:
                    mean = None
                print(json.dumps(line), flush=True)
        if options.state and now - saved > options.save:
            saved = now
            write_state(network, stage, options.state)
    for producer in producers:
        producer.terminate()
    if options.state:
        write_state(network, stage, options.state)
    return network


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, help="folder of books, *.txt")
    parser.add_argument("--out", type=Path, help="folder for the finished checkpoint")
    parser.add_argument("--state", type=Path, help="file for the float32 weights as it goes")
    parser.add_argument("--resume", type=Path, help="a --state file or a checkpoint to go on from")
    parser.add_argument("--stage", type=int, help="curriculum stage to begin at")
    parser.add_argument("--stages", type=int, default=len(STAGES), help="how many there are")
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--patience", type=float, default=60.0, help="most seconds in a stage")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--inner", type=int, default=384)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--warm-up", type=int, default=200, help="steps")
    parser.add_argument("--hold", type=float, default=0.4, help="share of the time at full rate")
    parser.add_argument("--decay", type=float, default=0.01)
    parser.add_argument("--batch", type=int, default=16384, help="bytes")
    parser.add_argument("--precision", default="high", help="of float32 products")
    parser.add_argument("--producers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tell", type=float, default=5.0, help="seconds between lines")
    parser.add_argument("--save", type=float, default=30.0, help="seconds between states")
    parser.add_argument("--measure", type=int, nargs="*", default=[512, 2048, 4096])
    parser.add_argument("--cases", type=int, default=100)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device)
    return parser.parse_args()


def main() -> None:
    """Train, measure, write the checkpoint."""
    options = parse()
    network = train(options)
    if options.measure:
        print(
            json.dumps(
                measure(network, options.corpus, sizes=options.measure, count=options.cases)
            ),
            flush=True,
        )
    if options.out:
        save(network, options.out)


if __name__ == "__main__":
    main()
