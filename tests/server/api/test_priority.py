"""Priorities through HTTP: an urgent request takes the only slot, and the other goes on."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.server.api.live import Live


def text_of(lines: list[str]) -> str:
    frames = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(frame["choices"][0]["text"] for frame in frames)


@pytest.mark.parametrize("urgent", ["/v1/completions", "/v1/chat/completions"])
def test_an_urgent_request_is_served_while_another_has_the_only_slot(
    slow: Live, urgent: str
) -> None:
    slow.wait_idle()
    before = slow.metrics()
    asked = {"prompt": "the prompt", "temperature": 0, "ignore_eos": True}
    lines: list[str] = []
    with (
        httpx.Client(base_url=slow.url, timeout=20) as client,
        ThreadPoolExecutor(1) as pool,
        client.stream(
            "POST", "/v1/completions",
            json={**asked, "max_tokens": 1_000_000, "stream": True, "priority": 1},
        ) as response,
    ):  # fmt: skip
        incoming = response.iter_lines()
        while not text_of(lines):
            lines.append(next(incoming))
        ask = slow.complete if urgent == "/v1/completions" else slow.chat
        answer = pool.submit(ask, "abc", max_tokens=5, ignore_eos=True, priority=-1000)
        while not answer.done():
            lines.append(next(incoming))
        count = len(text_of(lines))
        while len(text_of(lines)) < count + 5:  # it has gone on
            lines.append(next(incoming))
    assert answer.result().status_code == 200
    assert answer.result().json()["usage"]["completion_tokens"] == 5
    slow.wait_idle()
    name = 'num_preemptions_total{reason="priority"}'
    assert slow.metrics()[name] == before[name] + 1
    assert slow.metrics()["swapped_state_bytes"] == 0
    told = text_of(lines)
    most = len(told.encode())  # a token is a byte; a frame may carry many
    undisturbed = slow.complete(**asked, max_tokens=most).json()["choices"][0]["text"]
    assert told and undisturbed.startswith(told)


def test_equals_wait_their_turn(slow: Live) -> None:
    slow.wait_idle()
    before = slow.metrics()
    with ThreadPoolExecutor(2) as pool:
        asked = {"max_tokens": 20, "ignore_eos": True, "priority": 3}
        answers = list(pool.map(lambda prompt: slow.complete(prompt, **asked), ["a", "b"]))
    assert [answer.status_code for answer in answers] == [200, 200]
    slow.wait_idle()
    name = 'num_preemptions_total{reason="priority"}'
    assert slow.metrics()[name] == before[name]


def test_a_priority_out_of_bounds_is_refused(slow: Live) -> None:
    for ask in (slow.complete, slow.chat):
        refused = ask("a", priority=1001)
        error = refused.json()["error"]
        assert refused.status_code == 400 and error["param"] == "priority"
        assert "1000" in error["message"] and "1001" in error["message"]
        assert ask("a", priority=None, max_tokens=1).status_code == 200
