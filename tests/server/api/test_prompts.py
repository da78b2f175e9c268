"""Long prompts over HTTP: read while they are still text, answered once they are found to fit."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.api import encoder
from server.protocol import Step
from tests.server.api.checkpoint import ASSISTANT, END, USER
from tests.server.api.live import PATIENCE, Live, eventually, in_thread
from tests.server.api.test_disconnect import posted

LONG = "All work and no play makes Jack a dull boy. " * 3000  # 132,000 bytes, as many tokens

OPTIONS = ("--echo", "--max-step-tokens", "4096", "--max-model-len", "200000", "--slots", "2")


@pytest.fixture(scope="module")
def live(checkpoint: Path) -> Iterator[Live]:
    """One that repeats its prompt, of 200,000 tokens at most, and remembers none."""
    with in_thread(checkpoint, *OPTIONS, prefix_caching=False) as live:
        yield live


class Gate:
    """Holds up all pieces of prompts but the first ones, until it is opened."""

    def __init__(self) -> None:
        self.encoded: list[int] = []
        self._open = threading.Event()

    def __call__(self, *arguments: Any, **options: Any) -> array[int]:
        if threading.current_thread().name.startswith("tokenize-long"):
            assert self._open.wait(PATIENCE)
        self.encoded.append(len(arguments[1]))
        return encode(*arguments, **options)

    def open(self) -> None:
        self._open.set()


encode = encoder.encode


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(encoder, "encode", gate)
    yield gate
    gate.open()


class Reading:
    """How far the engine has come with prompts."""

    def __init__(self, live: Live) -> None:
        self.computed = 0
        self._observers = live.service.client.observers
        self._observers.append(self._note)

    def _note(self, step: Step) -> None:
        self.computed = max([self.computed, *(output.computed for output in step.outputs)])

    def close(self) -> None:
        self._observers.remove(self._note)


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_reads_while_the_rest_is_text(live: Live, gate: Gate, stream: bool) -> None:
    live.wait_idle()
    reading = Reading(live)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(live.complete, LONG, max_tokens=5, stream=stream)
        eventually(lambda: reading.computed >= encoder.FIRST - 100)
        assert reading.computed <= encoder.FIRST and len(gate.encoded) == 1
        assert live.service.client.stats.slots_used == 1 and not answer.done()
        assert live.complete("abc", max_tokens=9).json()["choices"][0]["text"] == "abc"
        gate.open()
        response = answer.result()
    reading.close()
    assert response.status_code == 200
    if not stream:
        assert response.json()["choices"][0]["text"] == LONG[:5]
        assert response.json()["usage"]["prompt_tokens"] == len(LONG)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_before_all_is_ids_is_counted(live: Live, gate: Gate, stream: bool) -> None:
    live.wait_idle()
    aborted = 'request_success_total{finished_reason="abort"}'
    before = live.metrics()[aborted]
    with posted(live, "/v1/completions", {"prompt": LONG, "n": 2, "stream": stream}):
        eventually(lambda: live.service.client.stats.slots_used == 2)
    live.wait_idle()
    eventually(lambda: live.metrics()[aborted] == before + 2)


@pytest.mark.parametrize("n", [1, 2])
def test_too_long_is_found_on_the_way(live: Live, gate: Gate, n: int) -> None:
    live.wait_idle()
    gate.open()
    for stream in (False, True):
        response = live.complete(LONG * 4, n=n, stream=stream)
        error = response.json()["error"]
        assert response.status_code == 400 and error["code"] == "context_length_exceeded"
        assert error["param"] == "prompt"
        assert "200000 tokens" in error["message"] and "at least 2" in error["message"]
    assert sum(gate.encoded) < 2 * 2 * len(LONG) + 20 * encoder.MOST  # and no more than that
    live.wait_idle()
    exact = live.complete("x" * 199_000, max_tokens=1001).json()["error"]
    assert "200001 tokens (199000 in the prompt, 1001" in exact["message"]
    assert exact["param"] == "max_tokens"
    live.wait_idle()
    assert live.complete("x" * 199_000, max_tokens=2).status_code == 200


def test_the_hopeless_is_refused_before_any_work(live: Live, gate: Gate) -> None:
    text = "x" * (200_000 * live.service.tokenizer.most_bytes + 1)
    response = live.complete(text)
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "context_length_exceeded"
    assert f"{len(text)} bytes has at least 200001" in error["message"] and not gate.encoded
    chat = live.chat(text)
    assert chat.status_code == 400 and "at least 200003" in chat.json()["error"]["message"]
    assert (error["param"], chat.json()["error"]["param"]) == ("prompt", "messages")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_takes_its_prompt_along(
    live: Live, gate: Gate, stream: bool, n: int
) -> None:
    live.wait_idle()
    client = live.service.client
    with posted(live, "/v1/completions", {"prompt": LONG, "stream": stream, "n": n}):
        eventually(lambda: client.stats.slots_used == min(n, 2))
        assert client.waiting_requests == max(0, n - 2)
    live.wait_idle()
    eventually(lambda: live.service.active == 0)
    assert client.waiting_tokens == 0 and len(gate.encoded) == 1
    gate.open()
    assert live.complete("abc", max_tokens=9).json()["choices"][0]["text"] == "abc"


def test_what_waits_counts_with_all_its_tokens(live: Live, gate: Gate) -> None:
    live.wait_idle()
    client = live.service.client
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(live.complete, LONG, max_tokens=2) for _ in range(3)]
        eventually(lambda: client.waiting_requests == 1 and client.stats.slots_used == 2)
        assert client.waiting_tokens == len(LONG)
        gate.open()
        assert [answer.result().status_code for answer in answers] == [200] * 3
    assert client.waiting_tokens == client.waiting_requests == 0


def test_several_long_prompts_and_a_conversation(live: Live) -> None:
    texts = [LONG, "ab", "Ω" + LONG]
    body = live.complete(texts, max_tokens=4, n=1, return_token_ids=True).json()
    assert body["usage"]["prompt_tokens"] == sum(len(text.encode()) for text in texts)
    for text, choice in zip(texts, body["choices"], strict=True):
        assert choice["prompt_token_ids"] == list(text.encode())
        assert choice["token_ids"][:2] == list(text.encode())[:2]
    answer = live.chat("<|end|>" + LONG, max_tokens=3, return_token_ids=True).json()
    expected = [USER, *("<|end|>" + LONG).encode(), END, ASSISTANT]
    assert answer["prompt_token_ids"] == expected
    ids = live.http.post("/tokenize", json={"prompt": LONG + "<|end|>"}).json()["tokens"]
    assert ids == [*LONG.encode(), END]


def test_a_long_prompt_that_is_known_is_found_all_the_same(checkpoint: Path) -> None:
    with in_thread(checkpoint, *OPTIONS) as live:
        for cached in (0, len(LONG) - 1):
            usage = live.complete(LONG + "!" * (cached > 0), max_tokens=2).json()["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] >= cached
        message = LONG + " And so on."
        for _ in range(2):
            usage = live.chat(message, max_tokens=2).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= len(message)
        live.wait_idle()


def test_the_engines_refusal_ends_it_early(checkpoint: Path) -> None:
    with in_thread(checkpoint, "--oom-token", str(ord("!"))) as live:
        response = live.complete("!" + LONG)
        assert response.status_code == 500
        assert "memory" in response.json()["error"]["message"]
        live.wait_idle()
