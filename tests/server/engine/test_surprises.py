"""On a GPU: a thousand mixed steps compile nothing and wait for the device in no place but one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import torch

from model.chunk import Chunk, Copy, Sampled, Sampling
from model.runner import ModelRunner, load_runner
from server.engine.loop import Loop
from server.protocol import Abort, Generate, Output, Step, pack_tokens
from tests.model.checkpoints import LIGHTNING, SOFTMAX, write
from tests.server.engine.test_loop import Post

VOCAB = 97
KINDS: dict[str, dict[str, Any]] = {
    "dense": {
        "layer_types": [LIGHTNING] * 2, "num_local_experts": 1, "num_experts_per_tok": 1,
    },
    "experts": {"layer_types": [LIGHTNING] * 2},
    "window": {"layer_types": [SOFTMAX, LIGHTNING], "sliding_window": 24},
    "hybrid": {"layer_types": [LIGHTNING, SOFTMAX]},
}  # fmt: skip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="what a GPU does")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever waits for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Watched:
    """A runner that may wait for the device where a step is collected, and nowhere else."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.capacity = runner.capacity
        self.max_step_tokens = runner.max_step_tokens
        self.seconds = runner.seconds
        self.overlaps = runner.overlaps
        self.steps = self.drew = self.mixed = 0

    def launch(self, chunks: list[Chunk]) -> Any:
        self.steps += 1
        self.drew += any(chunk.sampling is not None for chunk in chunks)
        self.mixed += len({len(chunk.tokens) > 1 for chunk in chunks}) == 2
        with undisturbed():
            return self.runner.launch(chunks)

    def collect(self, launched: Any) -> list[Sampled | None]:
        return self.runner.collect(launched)

    def copy(self, copies: list[Copy]) -> None:
        with undisturbed():
            self.runner.copy(copies)

    def device_memory(self) -> int:
        return self.runner.device_memory()

    def device_room(self) -> tuple[int, int]:
        return self.runner.device_room()


class Traffic:
    """Requests of all sorts, some with a prompt in common, some aborted."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.document = [self.rng.randrange(VOCAB) for _ in range(600)]
        self.count = 0

    def sampling(self) -> Sampling:
        rng = self.rng
        return rng.choice(
            [
                Sampling(temperature=0.0),
                Sampling(temperature=0.8, seed=self.count),
                Sampling(seed=3, top_k=5, top_p=0.9, min_p=0.01),
                Sampling(temperature=0.0, logprobs=rng.randrange(4)),
                Sampling(
                    presence_penalty=0.5, frequency_penalty=0.1, repetition_penalty=1.1, logprobs=2
                ),
                Sampling(logit_bias={3: 2.0, 9: -100.0}),
            ]
        )

    def request(self) -> Generate:
        rng = self.rng
        self.count += 1
        own = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 15, 16, 17, 64, 300, 700]))]
        shared = self.document[: rng.choice([0, 0, 200, 600])]
        return Generate(
            id=str(self.count),
            tokens=pack_tokens(shared + own),
            sampling=self.sampling(),
            max_tokens=rng.randrange(1, 60),
            min_tokens=rng.randrange(3),
            stop_token_ids=rng.sample(range(VOCAB), 3),
        )


def load(path: Path, **fields: Any) -> ModelRunner:
    write(path, num_hidden_layers=len(fields["layer_types"]), **fields)
    options = {"max_running": 24, "max_step_tokens": 512, "state_memory_gb": 0.1, "ring": 16}
    return load_runner(path, device="cuda", dtype="bfloat16", **options)  # type: ignore[arg-type]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are compiled while the test runs, those of earlier tests forgotten."""
    from triton import knobs

    for name, module in list(sys.modules.items()):
        if name.startswith("kernels."):
            for value in vars(module).values():
                if hasattr(value, "device_caches"):
                    value.device_caches.clear()
    names: list[str] = []

    def hook(**told: Any) -> None:
        names.append(told["fn"].name)

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", hook)
    return names


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mixed_steps_compile_nothing_and_wait_for_nothing(
    tmp_path: Path, compiled: list[str], kind: str
) -> None:
    runner = load(tmp_path, **KINDS[kind])
    assert compiled, "the hook sees nothing"
    compiled.clear()
    watched, post, traffic = Watched(runner), Post(), Traffic(7)
    loop = Loop(watched, post, caching=True, host_bytes=50_000_000)
    outputs: list[Output] = []
    while watched.steps < 1000:
        if traffic.rng.random() < 0.3 and len(loop.scheduler.waiting) < 20:
            post.put(traffic.request())
        if traffic.rng.random() < 0.01:
            post.put(Abort([str(traffic.rng.randrange(traffic.count + 1))]))
        loop.turn()
        outputs += (o for m in post.sent if isinstance(m, Step) for o in m.outputs)
        post.sent.clear()
    assert not [output.error for output in outputs if output.error]
    assert sum(output.finish is not None for output in outputs) > 100
    assert watched.mixed > 200 and watched.drew > 900
    assert loop.scheduler.checkpoints is not None and loop.scheduler.checkpoints.hits > 10
    assert compiled == []


def test_a_step_copies_nothing_to_the_host(tmp_path: Path) -> None:
    """A kernel tells what it drew: a copy would wait for states that leave. Counted by the
    profiler, over steps that read prompts and decode."""
    from torch.profiler import ProfilerActivity, profile

    watched, post, traffic = Watched(load(tmp_path, **KINDS["hybrid"])), Post(), Traffic(8)
    loop = Loop(watched, post)
    for _ in range(8):
        post.put(msgspec.structs.replace(traffic.request(), max_tokens=200, stop_token_ids=[]))
    for _ in range(4):
        loop.turn()
    torch.cuda.synchronize()
    steps, drew = watched.steps, watched.drew
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for turn in range(100):
            if turn % 10 == 0:
                post.put(traffic.request())
            loop.turn()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events()]
    assert not any("DtoH" in name for name in names)
    told = sum("_tell_kernel" in name or "_send_kernel" in name for name in names)
    assert watched.steps - steps == 100 and told >= watched.drew - drew
