"""The engine's loop with caching and without, by turns, around a runner without arithmetic."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import saving
from tests.server.engine.bench import capacity
from tests.server.fake_engine import FakeRunner


@pytest.mark.parametrize("caching", [False, True])
def test_a_round_generates_all_and_tells_what_the_loop_did(
    monkeypatch: pytest.MonkeyPatch, caching: bool
) -> None:
    monkeypatch.setattr(saving, "LEAST", 4)
    monkeypatch.setattr(saving, "MOST", 9)
    messages, tokens = saving.requests(6, 97, 1)
    assert len(messages) == 6 and 24 <= tokens <= 54
    runner: Any = FakeRunner(capacity=capacity(slots=2), max_step_tokens=256, overlaps=True)
    rate, seconds = saving.play(runner, 1 << 20, caching, 2, 6, seed=1)
    generated = sum(chunk.sampling is not None for step in runner.steps for chunk in step)
    assert rate > 0 and generated == tokens
    always = {"scheduling", "completing", "waiting"}
    always |= {"launching steps that read", "launching steps that decode"}
    assert set(seconds) - always == ({"copying"} if caching else set())
    assert bool(runner.copies) == caching
    assert not {"launch", "copy", "collect"} & set(vars(runner))
