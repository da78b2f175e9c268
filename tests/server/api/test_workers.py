"""Several API processes behind one port, as one server: requests, counts, bounds, ends."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest

from server.api.ledger import REQUESTS, RUNNING, TOKENS, Ledger
from server.cli.serve import _listeners
from server.protocol import worker_of
from tests.server.api.live import PATIENCE, Live, Process, children, eventually, stopped

Launch = Callable[..., Process]
STEPS = "iteration_tokens_total_sum"
FOREVER = {"prompt": "abc", "max_tokens": 1_000_000, "ignore_eos": True, "stream": True}


def processes(server: Process) -> list[int]:
    """API processes, in order, by their command lines."""
    found = []
    for pid in children(server.process.pid):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"server.api" in line:
            found.append((int(line[line.index(b"--worker") + 1]), pid))
    return [pid for _, pid in sorted(found)]


@pytest.fixture(scope="module")
def pair(checkpoint: Path) -> Iterator[Process]:
    """Two, around an engine that repeats prompts."""
    process = Process(checkpoint, "--echo", "--slots", "8", api_workers=2)
    try:
        process.live.wait_ready()
        yield process
    finally:
        process.close()


@pytest.fixture
def pair_of(checkpoint: Path) -> Iterator[Launch]:
    with ExitStack() as stack:

        def start(*engine: str, **settings: object) -> Process:
            process = Process(checkpoint, *engine, api_workers=2, **settings)
            stack.callback(process.close)
            process.live.wait_ready()
            return process

        yield start


def on_each(url: str, pids: list[int]) -> list[httpx.Client]:
    """A connection to each API process: the system spreads them, so try until all are had."""
    found: dict[int, httpx.Client] = {}
    for _ in range(200):
        client = httpx.Client(base_url=url, timeout=PATIENCE)
        stream = client.get("/health").extensions["network_stream"]
        port = stream.get_extra_info("client_addr")[1]
        owner = owner_of(port, pids)
        if owner in found:
            client.close()
        else:
            found[owner] = client
        if len(found) == len(pids):
            return [found[pid] for pid in pids]
    raise AssertionError(f"only {list(found)} of {pids} were reached")


def owner_of(client_port: int, pids: list[int]) -> int:
    """Which process holds the server's end of a connection."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[2].split(":")[1], 16) == client_port:
            inodes.add(f"socket:[{fields[9]}]")
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(link) in inodes:
                return pid
    raise AssertionError(f"nobody has {inodes}")


def test_the_real_client_against_both(pair: Process) -> None:
    """Many streams at once, over both processes; every answer is its own prompt's."""
    before = pair.live.metrics()

    def ask(number: int) -> str:
        with openai.OpenAI(base_url=pair.live.url + "/v1", api_key="none") as client:
            prompt = f"number {number} of a hundred"
            stream = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=100, stream=True, n=1 + number % 2
            )
            texts: dict[int, str] = {}
            for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] = texts.get(choice.index, "") + choice.text
            assert set(texts.values()) == {prompt}
            return prompt

    with ThreadPoolExecutor(16) as pool:
        prompts = list(pool.map(ask, range(48)))
    tokens = sum(len(prompt) * (1 + number % 2) for number, prompt in enumerate(prompts))
    for client in on_each(pair.live.url, processes(pair)):  # whichever is scraped
        live = Live(pair.live.url, "tiny")
        live.http = client
        eventually(partial(caught_up, live, before.get(STEPS, 0) + 2 * tokens))
        after = live.metrics()
        grew = {name: after[name] - before.get(name, 0) for name in after}
        assert grew["prompt_tokens_total"] == tokens
        assert grew["generation_tokens_total"] == tokens + 72  # and an end each
        assert grew['request_success_total{finished_reason="stop"}'] == 72
        assert grew["time_to_first_token_seconds_count"] == 72
        assert grew["prefix_cache_queries_total"] == tokens
        assert after["state_slots_total"] == 8
        text = client.get("/metrics").text
        assert "Multiprocess" not in text and "pid=" not in text
        client.close()


def caught_up(live: Live, tokens: float) -> bool:
    """Steps are counted by one of the processes, which may lag behind the other's answers."""
    metrics = live.metrics()
    return metrics["num_requests_running"] == 0 and metrics.get(STEPS, 0) >= tokens


def test_long_prompts_and_conversations(pair: Process) -> None:
    text = "A long way to go. " * 5000
    for client in on_each(pair.live.url, processes(pair)):
        answer = client.post("/v1/completions", json={"prompt": text, "max_tokens": 6}).json()
        assert answer["choices"][0]["text"] == "A long"
        assert answer["usage"]["prompt_tokens"] == len(text)
        client.close()


def test_contexts_are_of_all_where_they_are_files(pair: Process, tmp_path: Path) -> None:
    refused = pair.live.http.post("/v1/contexts", json={"text": "abc"})
    assert refused.status_code == 400 and "context_directory" in refused.text
    directory = str(tmp_path / "kept")
    process = Process(pair.checkpoint, "--echo", api_workers=2, context_directory=directory)
    try:
        process.live.wait_ready()
        one, other = on_each(process.live.url, processes(process))
        made = one.post("/v1/contexts", json={"text": "All work and no play. " * 40})
        assert made.status_code in (200, 201), made.text
        body = {"context": made.json()["id"], "prompt": "Jack", "max_tokens": 3}
        for client in (other, one):
            answer = client.post("/v1/completions", json=body).json()
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 870, answer
        path = "/v1/contexts/" + made.json()["id"]
        assert other.delete(path).status_code == 200
        assert one.get(path).status_code == 404
        one.close()
        other.close()
    finally:
        process.close()


def test_gauges_and_bounds_are_of_all(pair_of: Launch) -> None:
    """One process is full, so the other one refuses; and it knows when there is room again."""
    process = pair_of("--slots", "2", "--step-seconds", "0.005", max_queue_requests=1)
    one, other = on_each(process.live.url, processes(process))
    with ExitStack() as stack:
        streams = [
            stack.enter_context(one.stream("POST", "/v1/completions", json=FOREVER))
            for _ in range(3)  # on connections of their own, most likely of other processes
        ]
        assert [stream.status_code for stream in streams] == [200] * 3

        def gauges() -> list[float]:
            live = Live(process.live.url, "tiny")
            live.http = other
            metrics = live.metrics()
            return [
                metrics[name]
                for name in ("num_requests_running", "num_requests_waiting", "state_slots_used")
            ]

        eventually(lambda: gauges() == [2, 1, 2])
        refused = other.post("/v1/completions", json={"prompt": "a"})
        assert refused.status_code == 429 and "1 requests wait" in refused.text
    eventually(lambda: gauges() == [0, 0, 0])
    assert other.post("/v1/completions", json={"prompt": "a"}).status_code == 200
    one.close()
    other.close()


def post(process: Process, **body: object) -> httpx.Response:
    with httpx.Client(base_url=process.live.url, timeout=PATIENCE) as client:
        return client.post("/v1/completions", json={**FOREVER, **body})


def test_sigterm_drains_all(pair_of: Launch) -> None:
    process = pair_of("--slots", "8", "--step-seconds", "0.01")
    with ThreadPoolExecutor(8) as pool:
        with stopped(process.engine):
            running = [pool.submit(post, process, max_tokens=50, stream=False) for _ in range(8)]
            eventually(lambda: process.live.metrics()["num_requests_waiting"] == 8)
            process.terminate()
            eventually(lambda: not process.healthy)
        answers = [answer.result() for answer in running]
    assert [a.json()["usage"]["completion_tokens"] for a in answers] == [50] * 8
    assert process.wait() == 0
    assert not any("Traceback" in line for line in process.log)
    assert process.process.stdout is not None
    (line,) = process.process.stdout.read().splitlines()  # said once
    assert process.live.url in line


def test_a_second_signal_ends_with_words_to_all(pair_of: Launch) -> None:
    process = pair_of("--slots", "4", "--step-seconds", "0.01")
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(post, process) for _ in range(4)]
        eventually(lambda: process.live.metrics()["state_slots_used"] == 4)
        process.terminate()
        eventually(lambda: not process.healthy)
        process.terminate()
        for stream in streams:
            frames = stream.result().text.strip().split("\n\n")
            assert (
                "shutting down" in json.loads(frames[-2].removeprefix("data: "))["error"]["message"]
            )
            assert frames[-1] == "data: [DONE]"
    assert process.wait() == 0


@pytest.mark.parametrize("victim", ["an API process", "the engine"])
def test_the_death_of_one_ends_all(pair_of: Launch, victim: str) -> None:
    process = pair_of("--slots", "8", "--step-seconds", "0.01")
    workers = processes(process)
    engine = process.engine
    command = Path(f"/proc/{engine}/cmdline").read_bytes().split(b"\0")
    directory = Path(os.fsdecode(command[command.index(b"--directory") + 1]))
    assert {"ledger", "metrics", "inbox", "outbox-0", "outbox-1"} == set(os.listdir(directory))
    survivor, dying = on_each(process.live.url, workers)
    with survivor.stream("POST", "/v1/completions", json=FOREVER) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(workers[1] if victim == "an API process" else engine, signal.SIGKILL)
        frames = [line for line in lines if line]
    assert json.loads(frames[-2].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert frames[-1] == "data: [DONE]"
    assert process.wait() == 1
    expected = "API process 1 ended" if victim == "an API process" else "the engine process ended"
    assert any(expected in line and "critical" in line for line in process.log)
    for pid in (*workers, engine):
        assert not Path(f"/proc/{pid}").exists()
    assert not directory.exists()
    survivor.close()
    dying.close()


def test_without_their_supervisor_all_end(pair_of: Launch) -> None:
    process = pair_of()
    pids = children(process.process.pid)
    assert len(pids) == 3
    process.process.kill()
    eventually(lambda: not any(alive(pid) for pid in pids))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_engine_that_cannot_load(checkpoint: Path) -> None:
    process = Process(checkpoint, "--fail-load", api_workers=2)
    try:
        assert process.wait() == 1
    finally:
        process.close()


def test_a_port_that_is_taken_is_refused() -> None:
    taken = _listeners("127.0.0.1", 0, 2)
    port = taken[0].getsockname()[1]
    assert [listener.getsockname()[1] for listener in taken] == [port, port]
    for count in (1, 2):
        with pytest.raises(OSError):
            _listeners("127.0.0.1", port, count)
    for listener in taken:
        listener.close()


def test_a_ledger_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    Ledger.create(path, 3)
    ledgers = [Ledger(path, worker) for worker in range(3)]
    for number, ledger in enumerate(ledgers):
        assert not ledger.all_ready
        ledger.write(running=number, requests=10, tokens=2**40)
        ledger.ready()
    assert ledgers[0].all_ready
    assert [ledgers[1].total(n) for n in (RUNNING, REQUESTS, TOKENS)] == [3, 30, 3 * 2**40]
    held, order = threading.Event(), []

    def other() -> None:
        held.wait()
        with ledgers[1].lock():
            order.append("other")

    thread = threading.Thread(target=other)
    thread.start()
    with ledgers[0].lock():
        held.set()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]
    ledgers[2].close()
    assert ledgers[0].total(RUNNING) == 1
    for ledger in ledgers[:2]:
        ledger.close()


def test_ids_name_their_process() -> None:
    assert [worker_of(id, 3) for id in ("0.ab-1", "2.ab", "3.ab", "r1", "a.b", "")] == [
        0,
        2,
        0,
        0,
        0,
        0,
    ]
