"""What a request becomes for the engine: seeds, sampling defaults, bounds."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.chunk import Capacity, Sampling
from server.api.choice import Options, Piece
from server.api.generate import Generation, Prompt, options_of, seed_of, start
from server.api.limits import Keys, Queue
from server.api.logs import Record
from server.api.schemas import CompletionBody
from server.api.service import sampling_defaults
from server.errors import ContextLengthError, QueueFullError
from tests.server.api.checkpoint import write_checkpoint


def test_seeds_of_choices() -> None:
    assert seed_of(7, 0) == 7 and seed_of(7, 1) == seed_of(7, 1)
    assert len({seed_of(seed, copy) for seed in range(50) for copy in range(10)}) == 500
    assert seed_of(None, 0) != seed_of(None, 0)
    for seed in (-1, -(2**63), 2**63 - 1, None):
        for copy in range(3):
            assert 0 <= seed_of(seed, copy) < 2**63


def sampling(defaults: dict[str, float], **fields: Any) -> Any:
    body = CompletionBody.parse(json.dumps({"prompt": "a", **fields}).encode())
    service: Any = SimpleNamespace(sampling_defaults=defaults)
    return options_of(body, service, max_tokens=1, logprobs=None).sampling


def test_the_checkpoints_own_sampling_is_the_default() -> None:
    plain = sampling({})
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p) == (1.0, 1.0, 0, 0.0)
    tuned = {"temperature": 0.6, "top_k": 20}
    assert sampling(tuned).temperature == 0.6 and sampling(tuned).top_k == 20
    assert sampling(tuned, temperature=0).temperature == 0
    assert sampling(tuned, top_k=-1).top_k == 0
    assert sampling(tuned, logit_bias={"5": 2}).logit_bias == {5: 2.0}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 40}, "same"),
        ({"temperature": 9, "top_p": None, "min_p": "x", "top_k": -5}, {}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": True, "repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
    ],
)
def test_generation_config(tmp_path: Path, config: dict[str, Any], expected: Any) -> None:
    path = write_checkpoint(tmp_path / "m", **config)
    assert sampling_defaults(path) == (config if expected == "same" else expected)


def test_a_queue_counts_requests_and_tokens() -> None:
    queue = Queue(max_requests=3, max_tokens=100)

    def admit(waiting: int, waiting_tokens: int, requests: int, tokens: int, free: int = 0) -> bool:
        engine: Any = SimpleNamespace(
            waiting_requests=waiting, waiting_tokens=waiting_tokens, free_slots=free
        )
        try:
            queue.admit(engine, requests=requests, tokens=tokens)
        except QueueFullError:
            return False
        return True

    assert admit(0, 0, 50, 5000)  # nothing is refused for ever
    assert admit(2, 60, 1, 40) and not admit(2, 60, 2, 40) and not admit(2, 60, 1, 41)
    assert not admit(3, 0, 1, 0)
    assert admit(12, 500, 1, 500, free=12)  # these do not wait for a slot
    assert admit(13, 500, 2, 0, free=12) and not admit(13, 500, 3, 0, free=12)


@pytest.mark.parametrize(("limit", "named"), [(128, True), (100, False)])
def test_the_memory_that_bounds_a_prompt_is_named(limit: int, named: bool) -> None:
    capacity = Capacity(slots=1, state_bytes=1, blocks=2, block_size=64, max_model_len=limit)
    settings = SimpleNamespace(max_n=1, default_max_tokens=8)
    service: Any = SimpleNamespace(capacity=capacity, settings=settings, client=None)
    options = Options(max_tokens=30, sampling=Sampling())
    with pytest.raises(ContextLengthError, match=f"{limit} tokens") as caught:
        asyncio.run(
            start(service, [Prompt(array("i", range(100)))], options, Record("a", "POST", "/"))
        )
    assert ("2 KV blocks of 64 positions" in caught.value.message) == named
    assert ("--state-memory-gb" in caught.value.message) == named


def test_keys() -> None:
    keys = Keys(["a", "bé"])
    assert [keys.accept(key) for key in ("a", "bé", "", "A", "a ")] == [True, True] + [False] * 3
    assert Keys([]).accept("anything")


def test_choices_run_ahead_of_their_reader_by_a_piece_each() -> None:
    """So that what comes while a frame is sent goes into the next one."""

    class Endless:
        def __init__(self, index: int) -> None:
            self.index, self.made, self.timeline = index, 0, None

        async def pieces(self) -> AsyncIterator[Piece]:
            while True:
                await asyncio.sleep(0)
                self.made += 1
                yield Piece(self.index, str(self.made))

        def close(self) -> None:
            pass

    async def read() -> None:
        generation = Generation([Prompt(array("i", [1]))], 3, Record("a", "POST", "/"))
        choices: Any = [Endless(index) for index in range(3)]
        generation.choices = choices
        read = [0] * 3
        async for piece in generation.pieces():
            read[piece.index] += 1
            for _ in range(50):
                await asyncio.sleep(0)
            ahead = [choice.made - count for choice, count in zip(choices, read, strict=True)]
            assert max(ahead) <= 2 and piece.text == str(read[piece.index])
            if sum(read) == 30:
                break
        assert min(read) >= 8  # in turn, or nearly
        for task in generation._tasks:
            task.cancel()

    asyncio.run(read())
