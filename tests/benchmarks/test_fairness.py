"""The benchmark of long prompts among chats, against a server without arithmetic."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.fairness import Trace, rows_of, watch
from tests.server.api.checkpoint import VOCAB, write_checkpoint
from tests.server.api.live import in_thread


def test_a_trace_tells_before_from_during() -> None:
    gaps = [(-1.0, 0.01), (0.0, 0.02), (0.5, 0.6), (1.9, 1.4), (2.5, 0.4), (2.9, 0.01), (3.0, 0.1)]
    trace = Trace(gaps, [(-0.5, 100), (0.4, 20), (1.0, 30), (4.0, 100)], [(0.0, 2.0), (2.8, 2.95)])
    assert trace.before() == [0.01, 0.02]
    assert trace.during() == [0.6, 1.4, 0.01, 0.1]  # what overlaps a reading
    values = {row.work: row.value for row in rows_of("x", trace, 7, 25.0)}
    assert values["ITL p50 before, x"] == pytest.approx(15.0)
    assert values["first token of 7 tokens, x"] == pytest.approx(1.075)
    assert values["ITL p99 lift, x"] == pytest.approx(
        values["ITL p99 during, x"] - values["ITL p99 before, x"]
    )
    assert values["step budget p50 during, x"] == 25.0
    line = trace.line()
    assert line["step_token_budget"] == [(-0.5, 100), (0.4, 20), (1.0, 30)]
    assert max(gap for _, gap in line["longest_itl_ms"]) == 1400.0


def test_it_watches_a_server(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "tiny")
    options = Namespace(
        chats=3, prompt=5, chat_tokens=1_000_000, tokens=400, rounds=2, seconds=0.4, every=0.02
    )  # fmt: skip
    engine = ("--step-seconds", "0.002", "--max-step-tokens", "32")
    with in_thread(path, *engine, target_itl_ms=1000) as live:
        trace = asyncio.run(watch(live.url, options, VOCAB))
        live.wait_idle()
    assert len(trace.reads) == 2 and trace.reads[0][0] == 0.0
    assert trace.before() and trace.during() and min(gap for _, gap in trace.gaps) >= 0
    assert {tokens for _, tokens in trace.budget} == {32}
