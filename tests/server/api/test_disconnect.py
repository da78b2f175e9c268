"""A client that leaves takes its request with it, whatever stage that is in."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.server.api.live import Live, eventually

FOREVER = {"prompt": "abc", "max_tokens": 1_000_000, "ignore_eos": True}


@contextmanager
def posted(live: Live, path: str, body: dict[str, object]) -> Iterator[socket.socket]:
    """A request whose sender goes away at the end without a word."""
    data = json.dumps(body).encode()
    host, port = live.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + data)
        yield connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_while_decoding(echo: Live, stream: bool, n: int) -> None:
    echo.wait_idle()
    aborted = 'request_success_total{finished_reason="abort"}'
    before = echo.metrics()
    with posted(echo, "/v1/completions", {**FOREVER, "stream": stream, "n": n}):
        eventually(lambda: echo.service.client.stats.slots_used == n)
        eventually(
            lambda: (
                echo.metrics()["generation_tokens_total"] > before["generation_tokens_total"] + 10
            )
        )
    echo.wait_idle()
    eventually(lambda: echo.metrics()[aborted] == before[aborted] + n)
    assert echo.service.active == 0


@pytest.mark.parametrize("stream", [False, True])
def test_while_its_prompt_is_read(slow: Live, stream: bool) -> None:
    slow.wait_idle()
    before = slow.metrics()["generation_tokens_total"]
    body = {"prompt": "x" * 80_000, "stream": stream}  # 100 s of reading
    with posted(slow, "/v1/completions", body):
        eventually(lambda: slow.service.client.stats.slots_used == 1)
    slow.wait_idle()
    assert slow.metrics()["generation_tokens_total"] == before


@pytest.mark.parametrize("stream", [False, True])
def test_while_it_waits(slow: Live, stream: bool) -> None:
    slow.wait_idle()
    client = slow.service.client
    with posted(slow, "/v1/completions", FOREVER):
        eventually(lambda: client.stats.slots_used == 1)
        with posted(slow, "/v1/completions", {**FOREVER, "stream": stream}):
            eventually(lambda: client.waiting_requests == 1)
        eventually(lambda: client.waiting_requests == 0 and client.stats.waiting == 0)
        assert client.stats.slots_used == 1
    slow.wait_idle()


def test_in_the_middle_of_its_body(echo: Live) -> None:
    host, port = echo.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{"
        )
        eventually(lambda: echo.service.active == 1)
    eventually(lambda: echo.service.active == 0)


def test_a_stream_that_is_read_to_its_end_gives_the_slot_back(echo: Live) -> None:
    with posted(echo, "/v1/completions", {"prompt": "abc", "stream": True}) as connection:
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(65536)
        echo.wait_idle()
