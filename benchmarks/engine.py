"""The engine alone: scheduler and runner in this process, token ids in and out, random weights.

    python -m benchmarks.engine CONFIG_DIRECTORY [--only decode-64 prefill-131072 ...]

A decode work gives every sequence 16 tokens of prompt and lets it generate to 529 of context; its
value is the time between the first and the last token over the steps. A prefill work is the time
from the request to its first token. Tokens are drawn at temperature 1 and nothing ends early. The
second run of each work counts, of one that takes milliseconds the median of nine more; prompts of a
million tokens and more are read once. The floor of a decode step: every weight that it needs read
once, states read and written once, at the copy bandwidth measured in the same run. That of a
prefill: its products at the rate of a GEMM and causal attention at cuDNN's, both measured in the
same run.
Beside a prefill stands the most device memory that was reserved by its end: a pure model's does not
grow with the prompt. The file of results is written after each work and names those that are still
to come: a run may be ended at any time.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec
import numpy
import torch

from benchmarks.result import Row, write
from benchmarks.timing import copy_bandwidth, gemm_rate, milliseconds
from model.chunk import Sampling
from model.config import Fields
from model.runner import ModelRunner, load_runner
from server.engine.loop import Loop
from server.protocol import FromEngine, Generate, Step

PROMPT, END = 16, 529
ONCE = 1_000_000  # tokens of prompts that are read once
OFTEN = 10_000  # tokens of works that take milliseconds


class Mailbox:
    """What a line is to the engine's loop, in memory."""

    def __init__(self) -> None:
        self.inbox: list[bytes] = []
        self.steps: list[tuple[float, Step]] = []

    def receive(self, timeout: float) -> list[bytes]:
        messages, self.inbox = self.inbox, []
        return messages

    def send(self, message: FromEngine) -> None:
        if isinstance(message, Step):
            self.steps.append((time.perf_counter(), message))


@dataclass(slots=True, frozen=True)
class Work:
    """`count` requests of `prompt` tokens that generate `tokens` each."""

    name: str
    count: int
    prompt: int
    tokens: int
    unit: str  # "ms a step" or "s"


WORKS = [
    *(Work(f"decode-{B}", B, PROMPT, END - PROMPT, "ms a step") for B in (1, 8, 64, 256, 512)),
    *(Work(f"prefill-{T}", 1, T, 1, "s") for T in (1024, 8192, 131_072, 1_048_576, 4_194_304)),
    Work("prefill-64x2048", 64, 2048, 1, "s"),
    Work("job-256x1024+128", 256, 1024, 128, "s"),
]
# in each work's unit, on one H200
GOALS: dict[str, dict[str, float | None]] = {
    "MiniMaxForCausalLM": {
        "decode-1": 0.75, "decode-64": 2.0, "decode-256": 3.0, "decode-512": 4.8,
        "prefill-1024": None, "prefill-8192": 0.030, "prefill-131072": 0.70,
        "prefill-1048576": 21.0, "prefill-64x2048": 0.42, "job-256x1024+128": 1.4,
    },
    "TransnormerForCausalLM": {
        "decode-1": 0.75, "decode-256": 2.4,
        "prefill-1024": None, "prefill-131072": 0.50,
        "prefill-1048576": 4.0, "prefill-4194304": 16.0,
    },
}  # fmt: skip


def run(loop: Loop, mailbox: Mailbox, work: Work, vocab: int, seed: int) -> float:
    """The work's value."""
    rng = numpy.random.default_rng(seed)
    encode = msgspec.msgpack.Encoder().encode
    for i in range(work.count):
        ids = rng.integers(vocab, size=work.prompt, dtype=numpy.int32)
        mailbox.inbox.append(
            encode(
                Generate(
                    id=f"{work.name}-{seed}-{i}",
                    tokens=ids.tobytes(),
                    sampling=Sampling(temperature=1.0, seed=i),
                    max_tokens=work.tokens,
                )
            )
        )
    mailbox.steps.clear()
    done = 0
    begin = time.perf_counter()
    seen = 0
    while done < work.count:
        loop.turn()
        for _, step in mailbox.steps[seen:]:
            for output in step.outputs:
                if output.error:
                    raise RuntimeError(output.error)
                done += output.finish is not None
        seen = len(mailbox.steps)
    if work.unit == "s":
        return time.perf_counter() - begin
    drawn = [
        at for at, step in mailbox.steps if sum(bool(o.tokens) for o in step.outputs) == work.count
    ]
    return (drawn[-1] - drawn[0]) / (len(drawn) - 1) * 1e3


@dataclass(slots=True, frozen=True)
class Rates:
    """Of the card, as measured: bytes copied a second, operations of a GEMM and of cuDNN's causal
    attention a second."""

    bandwidth: float
    gemm: float
    attention: float

    @classmethod
    def measured(cls) -> Rates:
        bandwidth, gemm = copy_bandwidth(), gemm_rate()
        T, H, d = 32_768, 16, 128
        q, k, v = (torch.randn(1, H, T, d, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention
        milli = milliseconds(lambda: attend(q, k, v, None, False, 0.0, True, False), graphed=False)
        torch.cuda.empty_cache()
        return cls(bandwidth, gemm, 2 * H * T * T * d / milli * 1e3)


def floor(runner: ModelRunner, fields: Fields, work: Work, rates: Rates) -> float:
    """In the work's unit. Of experts, a decode step reads those that so many tokens are expected
    to meet, and a prompt's token meets its own."""
    parameters = runner.parameters
    assert parameters is not None
    experts = fields.values.get("num_local_experts", 1)
    top = fields.values.get("num_experts_per_tok", 1)
    if work.unit == "s":
        active = sum(
            t.numel() * (top / experts if t.ndim == 3 else 1)
            for t in parameters.tensors
            if t.ndim > 1 and t.shape[0] != runner.capacity.vocab_size
        )
        generated = work.count * (work.tokens - 1)
        seconds = 2 * active * (work.count * work.prompt + generated) / rates.gemm
        softmax = sum(name.startswith("keys.") for name in runner.store.blocks.views)
        heads, d = fields.values.get("num_attention_heads", 0), fields.values.get("head_dim", 0)
        scores = softmax * work.count * 2 * heads * d * work.prompt**2
        return seconds + scores / rates.attention
    met = 1 - (1 - top / experts) ** work.count
    weights = sum(t.nbytes * (met if t.ndim == 3 else 1) for t in parameters.tensors)
    tables = [t for t in parameters.tensors if t.shape[0] == runner.capacity.vocab_size]
    weights -= sum(t.nbytes for t in tables[1:])  # an embedding beside the head: some rows of it
    states = sum(
        view[0].nbytes
        for name, view in runner.store.slots.views.items()
        if name.startswith("state.")
    )
    return (weights + 2 * work.count * states) / rates.bandwidth * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config", type=Path, help="directory with config.json")
    parser.add_argument("--only", nargs="+", choices=[work.name for work in WORKS])
    parser.add_argument("--max-step-tokens", type=int, default=None)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    rates = Rates.measured() if cuda else None
    runner = load_runner(
        options.config, seed=0, max_running=512, max_step_tokens=options.max_step_tokens
    )
    print("start-up:", {name: round(value, 1) for name, value in runner.seconds.items()})
    mailbox = Mailbox()
    loop = Loop(runner, mailbox)
    gc.collect()
    gc.freeze()
    fields = Fields.read(options.config)
    goals = GOALS.get(fields.architecture, {})
    works = [
        work for work in WORKS
        if work.name in (options.only or goals) or not (options.only or goals)
    ]  # fmt: skip
    rows: list[Row] = []
    held: list[float] = []  # GB of device memory after each prefill
    told = {} if rates is None else {
        "copy_TBps": rates.bandwidth / 1e12,
        "gemm_TFLOPs": rates.gemm / 1e12,
        "attention_TFLOPs": rates.attention / 1e12,
    }  # fmt: skip
    for number, work in enumerate(works, 1):
        runs = 1 if work.prompt >= ONCE else 2
        if work.unit == "s" and work.count * (work.prompt + work.tokens) <= OFTEN:
            runs = 10
        values = [
            run(loop, mailbox, work, runner.capacity.vocab_size, seed) for seed in range(runs)
        ]
        rows.append(
            Row(
                work=f"{options.config.name} {work.name}",
                value=median(values[1:] or values),
                unit=work.unit,
                better="lower",
                floor=None if rates is None else floor(runner, fields, work, rates),
                goal=goals.get(work.name),
            )
        )
        print(rows[-1], values, flush=True)
        if work.name.startswith("prefill"):
            name = f"{options.config.name} device memory, {work.name}"
            held.append(runner.device_memory() / 1e9)
            rows.append(Row(work=name, value=held[-1], unit="GB", better="lower"))
            if len(held) > 1 and not runner.capacity.blocks:
                more = Row(work=f"{name}, over the first", value=held[-1] / held[0], unit="x",
                           better="lower", goal=1.01)  # fmt: skip
                rows.append(more)
        missing = [f"{options.config.name} {work.name}" for work in works[number:]]
        write("engine", rows, name=f"engine-{options.config.name}", missing=missing,
              startup_seconds=runner.seconds, **told)  # fmt: skip


if __name__ == "__main__":
    main()
