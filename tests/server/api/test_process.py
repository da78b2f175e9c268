"""The command as a process: its flags, its end by signal, its end by the engine's death."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from server import __version__
from server.api.draining import DrainingServer
from server.api.launch import python
from server.api.service import Service
from server.cli import main
from server.cli.flags import settings_of
from server.settings import Settings
from tests.server.api.live import PATIENCE, ROOT, Process, eventually, stopped

Launch = Callable[..., Process]
FOREVER = {"prompt": "abc", "max_tokens": 1_000_000, "ignore_eos": True}


def post(process: Process, **body: object) -> httpx.Response:
    with httpx.Client(base_url=process.live.url, timeout=PATIENCE) as client:
        return client.post("/v1/completions", json={**FOREVER, **body})


def test_from_start_to_sigterm(launch: Launch, tmp_path: Path) -> None:
    process = launch("--load-when", str(tmp_path / "now"))
    starting = process.live.http.get("/health")
    assert starting.status_code == 503 and starting.json()["status"] == "starting"
    assert process.live.metrics()['server_state{state="starting"}'] == 1
    refused = process.live.complete("a")
    assert refused.status_code == 503 and "loading" in refused.json()["error"]["message"]
    (tmp_path / "now").touch()
    process.live.wait_ready()

    with ThreadPoolExecutor(1) as pool:
        with stopped(process.engine):
            running = pool.submit(post, process, max_tokens=150)
            eventually(lambda: process.live.metrics()["num_requests_waiting"] == 1)
            process.terminate()
            eventually(lambda: process.live.http.get("/health").status_code == 503)
            assert process.live.http.get("/health").json()["status"] == "draining"
            assert process.live.metrics()['server_state{state="draining"}'] == 1
            refused = process.live.complete("a")
            assert refused.status_code == 503 and refused.headers["retry-after"]
        assert running.result().json()["usage"]["completion_tokens"] == 150
    assert process.wait() == 0
    assert not any('"path":"/health"' in line for line in process.log)
    lines = [json.loads(line) for line in process.log if "completion_tokens" in line]
    assert lines[0]["completion_tokens"] == 150 and lines[0]["status"] == 200
    assert lines[0]["first_token_seconds"] <= lines[0]["seconds"]
    assert process.process.stdout is not None
    (line,) = process.process.stdout.read().splitlines()
    assert process.live.url in line and "tiny" in line and "cpu" in line
    assert re.search(r"ready after \d+\.\d s \(load \d+\.\d\)", line)


def test_what_was_loaded_is_not_walked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full collection holds up every stream, so the server collects once, when it is ready."""
    done: list[str] = []
    for name in ("collect", "freeze"):
        monkeypatch.setattr(gc, name, partial(done.append, name))
    service = Service(Settings(model="recall"))
    server = DrainingServer(service, "http://127.0.0.1", announce=False)
    for state, expected in (("starting", 0), ("ready", 2), ("ready", 2)):
        service.state = state  # type: ignore[assignment]
        assert not asyncio.run(server.on_tick(1))
        assert done == ["collect", "freeze"][:expected]


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM] * 2])
def test_draining_ends_with_words_to_all(launch: Launch, signals: list[signal.Signals]) -> None:
    """After drain_seconds, or at a second signal."""
    process = launch("--step-seconds", "0.01", drain_seconds=60 if len(signals) > 1 else 0.5)
    process.live.wait_ready()
    with ThreadPoolExecutor(3) as pool:
        streams = [pool.submit(post, process, stream=True, n=n) for n in (1, 2)]
        whole = pool.submit(post, process)
        eventually(lambda: process.live.metrics()["state_slots_used"] == 4)
        made = process.live.metrics()["generation_tokens_total"]
        eventually(lambda: process.live.metrics()["generation_tokens_total"] >= made + 40)
        for number in signals:
            process.process.send_signal(number)
            eventually(lambda: not process.healthy)
        for stream in streams:
            frames = stream.result().text.strip().split("\n\n")
            assert len(frames) > 2 and frames[-1] == "data: [DONE]"
            error = json.loads(frames[-2].removeprefix("data: "))["error"]
            assert error["code"] == "engine_unavailable" and "shutting down" in error["message"]
        response = whole.result()
        assert response.status_code == 503 and response.headers["retry-after"]
        assert "shutting down" in response.json()["error"]["message"]
    assert process.wait() == 0
    assert not any("Traceback" in line for line in process.log)


def test_a_body_that_never_ends_does_not_hold_up_the_end(launch: Launch) -> None:
    process = launch(drain_seconds=0.1)
    process.live.wait_ready()
    host, port = process.live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n"
            b"expect: 100-continue\r\n\r\n"
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")  # it waits for the body
        connection.sendall(b"{")
        process.terminate()
        assert process.wait() == 0
        assert connection.recv(65536).startswith(b"HTTP/1.1 503 ")


def test_the_death_of_the_engine_ends_everything(launch: Launch) -> None:
    process = launch("--step-seconds", "0.01")
    process.live.wait_ready()
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(post, process)
        streamed = pool.submit(post, process, stream=True)
        eventually(lambda: process.live.metrics()["state_slots_used"] == 2)
        os.kill(process.engine, signal.SIGKILL)
        response = whole.result()
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
        frames = streamed.result().text.strip().split("\n\n")
        assert frames[-1] == "data: [DONE]"
        assert json.loads(frames[-2][6:])["error"]["code"] == "engine_unavailable"
    assert process.wait() == 1
    assert any("engine process" in line for line in process.log)


def test_an_engine_that_cannot_load(launch: Launch) -> None:
    process = launch("--fail-load")
    assert process.wait() == 1
    lines = [json.loads(line) for line in process.log]
    assert any(line["level"] == "critical" for line in lines)
    (failure,) = [line for line in lines if line["message"].startswith("the engine failed: ")]
    assert "tensors are missing" in failure["message"] and "Traceback" in failure["exception"]


@pytest.mark.parametrize("module", ["server.engine", "server.api", "server.hub"])
def test_the_working_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """Whatever lies where a user starts the server: a queue.py, say, or a folder named model."""
    for name in ("queue.py", "server.py", "model.py"):
        (tmp_path / name).write_text("raise SystemExit('not mine')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    done = subprocess.run(
        [*python(), "-c", f"import {module}, model.chunk, queue"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(ROOT)
    assert python() == [sys.executable]


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    async def fail() -> str | None:
        service = Service(Settings(model=str(tmp_path / "none")))
        service.start()
        while service.failure is None:
            await asyncio.sleep(0)
        await service.close()
        return service.failure

    assert "no checkpoint directory" in (asyncio.run(fail()) or "")


def test_the_console_script() -> None:
    for arguments, expected in (
        (["--version"], __version__),
        (["--help"], "serve"),
        (["serve", "--help"], "--max-queue-requests"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "server", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and expected in done.stdout


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        (["--port", "99999"], "port"),
        (["--device", "abacus"], "device"),
        (["a", "--model", "b"], "MODEL"),
        (["--no-such-flag"], "no-such-flag"),
        (["--memory-fraction", "nan"], "memory_fraction"),
        (["--api-key", ""], "api_key"),
        (["--api-key", " ", "--api-key", ","], "api_key"),
        (["--api-key-file", "/no/such/file"], "api_key_file: Value error, cannot be read"),
        (["--api-key-file", "/"], "api_key_file: Value error, cannot be read"),
        (["--api-key-file", "/dev/null"], "api_key_file: Value error, no key"),
    ],
)
def test_flags_that_make_no_sense(
    arguments: list[str], mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", *arguments])
    assert end.value.code == 2
    assert mistake in capsys.readouterr().err


@pytest.mark.parametrize("value", ["", ",", " , "])
def test_a_variable_without_a_key_opens_nothing(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEADYSTATE_API_KEY", value)
    with pytest.raises(SystemExit) as end:
        main(["serve"])
    assert end.value.code == 2 and "api_key" in capsys.readouterr().err
    settings = Settings(api_key="a")
    data = settings.keyless.model_dump_json()
    assert Settings.model_validate_json(data).api_key == ()  # as the engine reads them


@pytest.mark.parametrize(
    ("content", "mistake"),
    [(b"", "no key"), (b" \n\n", "no key"), (b"sec\xff", "UTF-8"), (b"a\nsec cret\n", "line 2")],
)
def test_a_key_file_without_keys(
    content: bytes, mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(SystemExit) as end:
        main(["serve", "--api-key-file", str(file)])
    words = capsys.readouterr().err.partition("error: ")[2]
    assert end.value.code == 2 and "api_key_file" in words and mistake in words
    assert "sec" not in words


def test_keys_come_from_both_and_go_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text(" one\n\ntwo,still-two\n")
    monkeypatch.setenv("STEADYSTATE_API_KEY_FILE", str(file))
    monkeypatch.setenv("STEADYSTATE_NO_SUCH_SETTING", "1")  # another program's, say
    settings = Settings(api_key="three")
    assert settings.keys == ("three", "one", "two,still-two")
    file.unlink()
    monkeypatch.delenv("STEADYSTATE_API_KEY_FILE")
    engine = Settings.model_validate_json(settings.keyless.model_dump_json())
    assert engine.keys == () and "three" not in settings.keyless.model_dump_json()


def test_a_mistake_of_several_fields_tells_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--revision", "v1", "--api-key", "hush-1", "--hub-token", "hush-2"])
    words = capsys.readouterr().err
    assert "revision is for models on the hub" in words and "hush" not in words


def test_flags_win_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr("server.cli.serve.run", lambda settings: seen.append(settings) or 0)
    monkeypatch.setenv("STEADYSTATE_PORT", "7000")
    monkeypatch.setenv("STEADYSTATE_MAX_N", "9")
    monkeypatch.setenv("STEADYSTATE_API_KEY", "x,y")
    keys = ["--api-key", "a", "--api-key", "b,c"]
    assert main(["serve", "path/to/model", "--port", "7001", *keys]) == 0
    assert main(["serve"]) == 0
    first, second = seen
    assert (first.model, first.port, first.max_n) == ("path/to/model", 7001, 9)
    assert first.api_key == ("a", "b", "c")
    assert (second.model, second.port, second.api_key) == ("recall", 7000, ("x", "y"))
    assert settings_of.__doc__
