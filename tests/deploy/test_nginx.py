"""The real nginx with deploy/nginx.conf in front of a server."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.server.api.checkpoint import write_checkpoint
from tests.server.api.live import PATIENCE, Live, eventually, in_thread, stopped

ROOT = Path(__file__).parents[2]
NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed: make test-deploy")


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server that reads 64 tokens and generates one in 20 ms."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    with in_thread(checkpoint, "--step-seconds", "0.02", keepalive_seconds=0.2) as live:
        yield live


@pytest.fixture(scope="module")
def proxy(origin: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("nginx")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    site = (ROOT / "deploy" / "nginx.conf").read_text()
    site = site.replace("127.0.0.1:8000", origin.url.removeprefix("http://"))
    (folder / "site.conf").write_text(site.replace("listen 80;", f"listen 127.0.0.1:{port};"))
    temporary = "".join(
        f"    {kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\npid {folder}/pid;\nevents {{}}\n"
        f"http {{\n    access_log off;\n{temporary}    include {folder}/site.conf;\n}}\n"
    )
    command = [str(NGINX), "-p", str(folder), "-e", f"{folder}/error.log", "-c", "nginx.conf"]
    command[-1] = str(folder / "nginx.conf")
    process = subprocess.Popen(command)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:

            def answers() -> bool:
                assert process.poll() is None, (folder / "error.log").read_text()
                try:
                    return client.get("/health").status_code == 200
                except httpx.TransportError:
                    return False

            eventually(answers)
            yield client
    finally:
        process.terminate()
        process.wait(PATIENCE)


def test_tokens_come_as_they_are_made(proxy: httpx.Client, origin: Live) -> None:
    made = origin.metrics()["generation_tokens_total"]
    body = {"prompt": "abc", "max_tokens": 50, "ignore_eos": True, "stream": True}
    engine = origin.service.client.pid
    with proxy.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()
        eventually(lambda: origin.metrics()["generation_tokens_total"] > made)
        with stopped(engine):  # what was made comes, though no more is
            assert next(lines).startswith("data: {")
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_comments_pass_through_the_silence(proxy: httpx.Client, origin: Live) -> None:
    body = {"prompt": "a" * 320, "max_tokens": 1, "stream": True}
    with ExitStack() as stack:
        with stopped(origin.service.client.pid):
            response = stack.enter_context(proxy.stream("POST", "/v1/completions", json=body))
            lines = response.iter_lines()
            for _ in range(2):
                assert next(line for line in lines if line).startswith(":")
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_large_bodies_pass(proxy: httpx.Client) -> None:
    tokenized = proxy.post("/tokenize", json={"prompt": "a" * 5_000_000})
    assert tokenized.status_code == 200 and tokenized.json()["count"] == 5_000_000


def test_a_client_that_leaves_frees_its_slot(proxy: httpx.Client, origin: Live) -> None:
    origin.wait_idle()
    body = {"prompt": "abc", "max_tokens": 1_000_000, "ignore_eos": True, "stream": True}
    with proxy.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: an iterator that is dropped closes the connection
        next(lines)
        eventually(lambda: origin.service.client.running == 1)
    origin.wait_idle()


def test_errors_and_ids_pass_and_metrics_do_not(proxy: httpx.Client, origin: Live) -> None:
    answer = proxy.post("/v1/completions", json={}, headers={"x-request-id": "mine"})
    assert answer.status_code == 400 and answer.headers["x-request-id"] == "mine"
    assert json.loads(answer.text)["error"]["param"] == "prompt"
    assert proxy.get("/metrics").status_code == 404
    assert origin.http.get("/metrics").status_code == 200
