"""Keys, ids, errors, bounds, queues: what stands around every endpoint."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from server.api.schemas import CompletionBody
from tests.server.api.live import PATIENCE, Live, eventually, in_thread, stopped


@pytest.fixture(scope="module")
def guarded(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with keys, a small body bound, a maximum length and traps."""
    options = ("--max-model-len", "64", "--oom-token", "1", "--nan-token", "2", "--echo")
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("two\nfour\n")
    keys = {"api_key": "one", "api_key_file": file}
    with in_thread(checkpoint, *options, **keys, max_body_bytes=2048) as live:
        live.http.headers["authorization"] = "Bearer two"
        yield live


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer three"}, {"x-api-key": "on"}])
def test_a_key_on_every_route_but_health(guarded: Live, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=guarded.url, headers=headers) as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics", "/version", "/nope", "/health/", "/docs"):
            response = client.get(path)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer one"},
        {"authorization": "bearer two"},
        {"x-api-key": "one"},
        {"x-api-key": "four"},
    ],
)
def test_right_keys(guarded: Live, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=guarded.url, headers=headers) as client:
        for path in ("/v1/models", "/metrics", "/version"):
            assert client.get(path).status_code == 200


def test_request_ids_go_in_and_out(echo: Live) -> None:
    response = echo.complete("a", model=None)
    assert len(response.headers["x-request-id"]) == 32
    assert response.json()["id"] == "cmpl-" + response.headers["x-request-id"]
    given = {"x-request-id": "mine-1"}
    response = echo.http.post("/v1/completions", json={"prompt": "a"}, headers=given)
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "cmpl-mine-1"
    bad = echo.http.get("/nope", headers={"x-request-id": "a b"})
    assert bad.headers["x-request-id"] != "a b"
    response = echo.complete("a", request_id="own")
    assert response.json()["id"] == "cmpl-own"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/completions", 400),
        ("GET", "/v1/models/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
    ],
)
def test_every_error_has_four_keys(echo: Live, method: str, path: str, status: int) -> None:
    response = echo.http.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"type", "message", "param", "code"}
    assert response.headers["x-request-id"]


def test_an_unforeseen_error_has_four_keys_too(echo: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echo.service, "check_model", lambda name: 1 / 0)
    response = echo.complete("a")
    assert response.status_code == 500
    assert response.json()["error"] == {
        "type": "server_error",
        "message": "internal error",
        "param": None,
        "code": None,
    }


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size", [2049, 4000, 100_000])
def test_bodies_too_large(guarded: Live, chunked: bool, size: int) -> None:
    data = json.dumps({"prompt": "x" * size}).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(data), 1000):
            yield data[start : start + 1000]

    response = guarded.http.post("/v1/completions", content=pieces() if chunked else data)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert "2048" in response.json()["error"]["message"]


def test_a_body_of_just_the_bound(guarded: Live) -> None:
    data = b'{"prompt": "a"}'
    assert guarded.http.post("/v1/completions", content=data.ljust(2048)).status_code == 200


def test_large_bodies_are_read_in_a_thread(echo: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    parse = CompletionBody.parse

    def noted(data: bytes) -> CompletionBody:
        threads.append(threading.current_thread().name)
        return parse(data)

    monkeypatch.setattr(CompletionBody, "parse", noted)
    for data in (b'{"prompt": "a"}', b'{"prompt": "a"}'.ljust(300_000)):
        assert echo.http.post("/v1/completions", content=data).status_code == 200
    assert [name.startswith("tokenize") for name in threads] == [False, True]
    wrong = echo.http.post("/v1/completions", content=b'{"prompt": 1}'.ljust(300_000))
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "prompt"
    far = echo.complete([97] * 300_000 + [999], max_tokens=1)
    assert far.status_code == 400 and "999" in far.json()["error"]["message"]


def test_prompts_beyond_the_models_length(guarded: Live) -> None:
    assert guarded.complete("x" * 60, max_tokens=4).status_code == 200
    for prompt, bound in (("x" * 60, 5), ("x" * 64, 1), ("x" * 500, 1)):
        response = guarded.complete(prompt, max_tokens=bound)
        error = response.json()["error"]
        assert response.status_code == 400 and error["code"] == "context_length_exceeded"
        assert all(number in error["message"] for number in ("64", str(len(prompt)), str(bound)))
    assert guarded.chat("x" * 100).json()["error"]["param"] == "messages"
    body = guarded.chat("x" * 40).json()  # no bound named: what is left
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["total_tokens"] == 64


@pytest.mark.parametrize(("token", "why"), [(1, "memory"), (2, "finite")])
def test_a_request_may_fail_alone(guarded: Live, token: int, why: str) -> None:
    response = guarded.complete([97, token])
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "generation_failed"
    assert why in response.json()["error"]["message"]
    streamed = guarded.complete([97, token], stream=True)
    assert streamed.status_code == 200
    frames = [line for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert json.loads(frames[0][6:])["error"]["code"] == "generation_failed"
    assert frames[1:] == ["data: [DONE]"]
    assert guarded.complete("a").status_code == 200


def test_a_full_queue_says_when_to_come_again(slow: Live) -> None:
    slow.wait_idle()
    with httpx.Client(base_url=slow.url, timeout=PATIENCE) as client:
        body = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body):
            eventually(lambda: slow.service.client.stats.slots_used == 1)
            with client.stream("POST", "/v1/completions", json={**body, "n": 2}) as waiting:
                assert waiting.status_code == 200
                assert slow.service.client.waiting_requests == 2
                refused = slow.complete("a")
                assert refused.status_code == 429
                assert int(refused.headers["retry-after"]) >= 1
                assert refused.json()["error"]["type"] == "rate_limit_error"
    slow.wait_idle()


def test_requests_that_find_a_slot_are_no_queue(checkpoint: Path) -> None:
    options = ("--slots", "64", "--step-seconds", "0.05")  # time for all to come in one step
    with (
        in_thread(checkpoint, *options, max_queue_requests=2) as live,
        ThreadPoolExecutor(12) as pool,
    ):
        answers = list(pool.map(lambda _: live.complete("a", max_tokens=4), range(12)))
    assert [answer.status_code for answer in answers] == [200] * 12


def test_silence_is_filled_with_comments(slow: Live) -> None:
    slow.wait_idle()
    body = {"prompt": "a" * 400, "max_tokens": 1, "stream": True}
    with ExitStack() as stack:
        with stopped(slow.service.client.pid):
            response = stack.enter_context(slow.http.stream("POST", "/v1/completions", json=body))
            lines = response.iter_lines()
            for _ in range(3):
                assert next(line for line in lines if line).startswith(":")
        said = [line for line in lines if line and not line.startswith(":")]
    assert said[0].startswith("data: {") and said[-1] == "data: [DONE]"


def test_the_version(echo: Live) -> None:
    from server import __version__

    assert echo.http.get("/version").json() == {"version": __version__}
    assert echo.http.head("/health").status_code == 200
