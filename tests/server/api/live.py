"""Servers for tests: in a thread of this process, or the real command in a process of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import openai
import uvicorn

from server.api.app import create_app
from server.api.client import EngineClient
from server.api.service import Service
from server.settings import Settings
from tests.server.api.checkpoint import END_OF_TEXT, VOCAB

ROOT = Path(__file__).parents[3]
ENGINE = (
    *(sys.executable, "-m", "tests.server.fake_engine"),
    *("--vocab-size", str(VOCAB), "--end-token", str(END_OF_TEXT)),
)


def eventually(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.01)


class Live:
    """A server at `url`; `service` where it runs in this process."""

    def __init__(self, url: str, model: str, service: Service | None = None) -> None:
        self.url = url
        self.model = model
        self.http = httpx.Client(base_url=url, timeout=60)
        self.openai = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        self._service = service

    @property
    def service(self) -> Service:
        assert self._service is not None
        return self._service

    def wait_ready(self) -> None:
        eventually(lambda: self.http.get("/health").status_code == 200, 60)

    def metrics(self) -> dict[str, float]:
        """Samples by name and labels, the model's label left out."""
        samples = {}
        for line in self.http.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = re.sub(r'model_name="[^"]*",?', "", name).replace(",}", "}")
                samples[name.replace("{}", "").removeprefix("steadystate_")] = float(value)
        return samples

    def wait_idle(self) -> None:
        """Until every slot is back and nothing waits."""
        client = self.service.client
        eventually(lambda: client.stats.slots_used == 0 and client.waiting_requests == 0)

    def complete(self, prompt: object, **body: object) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": prompt, **body})

    def chat(self, content: object, **body: object) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self.http.post("/v1/chat/completions", json={"messages": messages, **body})

    def close(self) -> None:
        self.http.close()
        self.openai.close()


@contextmanager
def in_thread(checkpoint: Path, *engine: str, **settings: object) -> Iterator[Live]:
    """A server on a free port in a thread, with a fake engine process, once it is ready."""
    start = partial(EngineClient.start, command=[*ENGINE, *engine])
    with serving(Service(Settings(model=str(checkpoint), **settings), start)) as live:
        yield live


@contextmanager
def serving(service: Service) -> Iterator[Live]:
    """A service on a free port in a thread, once it is ready."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        create_app(service), log_config=None, lifespan="on", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    live = Live(f"http://127.0.0.1:{listener.getsockname()[1]}", service.model_id, service)
    try:
        live.wait_ready()
        yield live
    finally:
        live.close()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class Process:
    """`steadystate serve` as a process, with a fake engine in place of the real one."""

    def __init__(self, checkpoint: Path, *engine: str, **settings: object) -> None:
        self.checkpoint = checkpoint
        given = {"model": str(checkpoint), "port": 0, **settings}
        code = (
            "import sys; from server.settings import Settings; from server.cli.serve import run; "
            f"sys.exit(run(Settings(**{given!r}), command={[*ENGINE, *engine]!r}))"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        listening = re.compile(r'"url":"([^"]+)"')
        eventually(lambda: any(map(listening.search, self.log)) or not self.running, 60)
        found = next(filter(None, map(listening.search, self.log)))
        self.live = Live(found[1], checkpoint.name)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 60) -> int:
        """The exit code; everything logged is in `log` then."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def close(self) -> None:
        self.live.close()
        if self.running:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.log.append(line)
