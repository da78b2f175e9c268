"""The engine process as its client sees it: real sockets, a runner without arithmetic."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from model.chunk import Sampling
from server.api.client import EngineClient, EngineStream, merge
from server.errors import EngineDeadError
from server.protocol import Generate, Output, State, TokenLogprob, pack_tokens, unpack_tokens
from server.settings import Settings
from tests.server.fake_engine import next_token

ROOT = Path(__file__).parent.parent.parent
PATIENCE = 90.0  # seconds; what has not come by then will not come: a machine may be slow
FAKE = [sys.executable, "-m", "tests.server.fake_engine"]


def generate(id: str, prompt: list[int], max_tokens: int = 5, **fields: Any) -> Generate:
    sampling = Sampling(temperature=0.0, logprobs=fields.pop("logprobs", None))
    return Generate(
        id=id, tokens=pack_tokens(prompt), sampling=sampling, max_tokens=max_tokens, **fields
    )


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, 256))
    return tokens[len(prompt) :]


@asynccontextmanager
async def engine(*options: object, ready: bool = True) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(Settings(), [*FAKE, *map(str, options)])
    try:
        if ready:
            await client.ready()
        yield client
    finally:
        await client.close()


def within(seconds: float, test: Callable[..., Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), seconds))


async def until(client: EngineClient, condition: Callable[[], bool]) -> None:
    """Return once a Step message has made the condition true."""
    news = asyncio.Event()
    client.observers.append(lambda step: news.set())
    while not condition():
        await news.wait()
        news.clear()
    client.observers.pop()


async def collect(client: EngineClient, message: Generate) -> tuple[list[int], str | None]:
    ids: list[int] = []
    finish = None
    async with client.submit(message) as stream:
        async for output in stream:
            assert finish is None
            ids += unpack_tokens(output.tokens)
            finish = output.finish
    return ids, finish


def test_many_at_once_each_its_own_tokens():
    async def test() -> None:
        async with engine("--slots", 8) as client:
            assert client.is_ready and client.capacity.slots == 8
            assert client.seconds == {"load": 0.0} and client.stats.slots_total == 8
            messages = {
                f"r{n}": generate(f"r{n}", [n, n + 1, *range(n % 50)], 3 + n % 20)
                for n in range(100)
            }
            results = await asyncio.gather(*(collect(client, m) for m in messages.values()))
            for message, result in zip(messages.values(), results, strict=True):
                prompt = list(unpack_tokens(message.tokens))
                assert result == (expected(prompt, message.max_tokens), "length")
            assert client.stats.slots_used == 0
            assert (client.running, client.waiting_requests, client.waiting_tokens) == (0, 0, 0)

    within(PATIENCE, test)


def test_a_slow_consumer_misses_frames_but_no_token():
    async def test() -> None:
        async with engine() as client:
            stream = client.submit(generate("slow", [1, 2, 3], 200, logprobs=1))
            await until(client, lambda: stream.ended)
            outputs = [output async for output in stream]
            assert len(outputs) == 1
            assert list(unpack_tokens(outputs[0].tokens)) == expected([1, 2, 3], 200)
            assert len(outputs[0].logprobs) == 200 and outputs[0].started is not None
            assert outputs[0].finish == "length"

    within(PATIENCE, test)


def test_states_that_nobody_takes_are_let_go():
    """A client leaves when its context was just made."""

    class Client:
        def __init__(self) -> None:
            self.pins: list[tuple[str, int]] = []

        def pin(self, key: str, change: int) -> None:
            self.pins.append((key, change))

        def forget(self, stream: EngineStream) -> None:
            pass

        def check_alive(self) -> None:
            pass

    def stream() -> tuple[Client, EngineStream]:
        client = Client()
        return client, EngineStream(client, "r", 1)  # type: ignore[arg-type]

    made = Output(id="r", finish="stop", state=State(key="k", count=1, bytes=1, salt=""))
    client, late = stream()
    late.close()
    assert client.pins == []
    late.push(made)
    assert client.pins == [("k", -1)]
    client, untaken = stream()
    untaken.push(made)
    untaken.close()
    assert client.pins == [("k", -1)]
    client, taken = stream()
    taken.push(made)
    assert asyncio.run(anext(taken)) is made
    taken.close()
    assert client.pins == []


def test_merging():
    entry = TokenLogprob(-1.0, [])
    outputs = [
        Output(id="a", computed=10, started=2.5),
        Output(id="a", computed=20, tokens=b"\1\0\0\0", logprobs=[entry]),
        Output(id="a", computed=20, tokens=b"\2\0\0\0", logprobs=[entry], finish="stop", cached=4),
    ]
    assert merge(outputs) == Output(
        id="a", tokens=b"\1\0\0\0\2\0\0\0", logprobs=[entry, entry], finish="stop",
        computed=20, cached=4, started=2.5,
    )  # fmt: skip
    assert merge(outputs[:1]) is outputs[0]
    assert merge([Output(id="a"), Output(id="a")]).logprobs is None


def test_waiting_counts_those_without_a_slot():
    async def test() -> None:
        async with engine("--slots", 1) as client:
            first = client.submit(generate("first", [1] * 10, 1_000_000))
            await anext(first)
            assert (client.running, client.waiting_requests, client.waiting_tokens) == (1, 0, 0)
            second = client.submit(generate("second", [1] * 20, 5))
            third = client.submit(generate("third", [1] * 30, 5))
            assert (client.running, client.waiting_requests, client.waiting_tokens) == (1, 2, 50)
            third.close()
            assert (client.running, client.waiting_requests, client.waiting_tokens) == (1, 1, 20)
            first.close()
            async for output in second:
                last = output
            assert last.finish == "length"
            assert (client.running, client.waiting_requests, client.waiting_tokens) == (0, 0, 0)

    within(PATIENCE, test)


@pytest.mark.parametrize("situation", ["generating", "reading", "queued"])
def test_closing_returns_the_slot_within_a_step(situation: str):
    async def test() -> None:
        async with engine("--slots", 1, "--step-seconds", 0.002) as client:
            if situation == "queued":
                blocker = client.submit(generate("blocker", [1], 1_000_000))
                await anext(blocker)
            prompt = [3] * (100_000 if situation == "reading" else 3)
            stream = client.submit(generate("x", prompt, 1_000_000))
            if situation != "queued":
                await anext(stream)
                assert client.stats.slots_used == 1
            ends: list[Output] = []
            client.observers.append(
                lambda step: ends.extend(o for o in step.outputs if o.id == "x" and o.finish)
            )
            stream.close()
            stream.close()
            assert [output async for output in stream] == []
            if situation == "queued":
                blocker.close()
            await until(client, lambda: bool(ends) and client.stats.slots_used == 0)
            assert [output.finish for output in ends] == ["abort"]
            assert client.stats.running == client.stats.waiting == 0
            assert await collect(client, generate("x", [5], 3)) == (expected([5], 3), "length")

    within(PATIENCE, test)


def test_leaving_the_context_or_being_cancelled_closes():
    async def test() -> None:
        async with engine("--slots", 2) as client:
            task = asyncio.create_task(collect(client, generate("a", [1], 1_000_000)))
            await until(client, lambda: client.stats.running == 1)
            task.cancel()
            await until(client, lambda: client.stats.slots_used == 0)
            assert task.cancelled()

    within(PATIENCE, test)


def test_an_id_is_used_once_at_a_time():
    async def test() -> None:
        async with engine() as client:
            stream = client.submit(generate("a", [1], 1_000_000))
            with pytest.raises(ValueError, match="'a' is under way"):
                client.submit(generate("a", [2], 2))
            await anext(stream)
            stream.close()
            with pytest.raises(ValueError, match="'a' is under way"):
                client.submit(generate("a", [2], 2))  # until the engine has confirmed
            await until(client, lambda: client.stats.running == 0)
            assert await collect(client, generate("a", [2], 2)) == (expected([2], 2), "length")

    within(PATIENCE, test)


def test_failures_of_one_request():
    async def test() -> None:
        async with engine("--oom-token", 7, "--nan-token", 8) as client:
            for prompt, error in (
                ([7], "device memory"), ([8], "not finite"), ([], "empty"), ([999], "999"),
            ):  # fmt: skip
                async with client.submit(generate("bad", prompt)) as stream:
                    [output] = [output async for output in stream]
                    assert output.finish == "error" and error in output.error
            assert await collect(client, generate("a", [3], 3)) == (expected([3], 3), "length")
            assert not client.is_dead

    within(PATIENCE, test)


@pytest.mark.parametrize("option, code", [(("--crash-after", 20), 70), (("--bug-token", 9), 1)])
def test_the_engines_death_reaches_every_stream(option: tuple[str, int], code: int):
    async def test() -> None:
        async with engine("--slots", 3, *option) as client:
            results = [
                asyncio.create_task(collect(client, generate(f"r{n}", [1], 1_000_000)))
                for n in range(2)
            ]
            if "--bug-token" in option:
                await until(client, lambda: client.stats.running == 2)
                client.submit(generate("bug", [9], 2))
            for result in results:
                with pytest.raises(EngineDeadError, match=f"exit code {code}"):
                    await result
            await client.died.wait()
            assert client.is_dead and not client.is_ready
            with pytest.raises(EngineDeadError):
                client.submit(generate("late", [1]))
            with pytest.raises(EngineDeadError):
                await client.ready()
            assert (client.running, client.waiting_requests) == (0, 0)

    within(PATIENCE, test)


def test_killed_from_outside():
    async def test() -> None:
        async with engine() as client:
            stream = client.submit(generate("a", [1], 1_000_000))
            await anext(stream)
            os.kill(client.pid, 9)
            with pytest.raises(EngineDeadError, match="exit code -9"):
                async for _ in stream:
                    pass

    within(PATIENCE, test)


def test_death_before_ready():
    async def test() -> None:
        async with engine("--fail-load", ready=False) as client:
            with pytest.raises(EngineDeadError, match="has not loaded"):
                _ = client.capacity
            with pytest.raises(EngineDeadError, match="exit code 1"):
                await client.ready()
        client = await EngineClient.start(Settings(), ["false"])
        with pytest.raises(EngineDeadError, match="exit code 1"):
            await client.ready()
        await client.close()
        with pytest.raises(FileNotFoundError):
            await EngineClient.start(Settings(), ["/no/such/engine"])

    within(PATIENCE, test)


def test_close_ends_the_process_and_leaves_nothing():
    async def test() -> None:
        async with engine() as client:
            stream = client.submit(generate("a", [1], 1_000_000))
            await anext(stream)
            directory = client._directory
            assert directory.stat().st_mode & 0o777 == 0o700
        assert client.is_dead and not client.died.is_set()  # it was told to
        assert not directory.exists()
        with pytest.raises(ProcessLookupError):
            os.kill(client.pid, 0)
        with pytest.raises(EngineDeadError, match="shutting down"):
            async for _ in stream:
                pass
        await client.close()  # twice is no error

    within(PATIENCE, test)


def test_a_long_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))

    async def test() -> None:
        async with engine() as client:
            assert client._directory.parent == Path("/tmp")
            assert await collect(client, generate("a", [2], 3)) == (expected([2], 3), "length")

    within(PATIENCE, test)


def test_a_client_that_cannot_be_made_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("server.api.client.address", lambda directory, name: "nonsense://")
    with pytest.raises(zmq.ZMQError):
        asyncio.run(EngineClient.start(Settings(), FAKE))
    assert not list(tmp_path.iterdir())


def test_an_engine_that_hears_no_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("server.api.launch.TERM_SECONDS", 0.2)

    async def test() -> None:
        deaf = "import signal, sys; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True);"
        client = await EngineClient.start(
            Settings(), [sys.executable, "-c", deaf + "signal.pause()"]
        )
        await client.close()
        assert client.is_dead

    within(PATIENCE, test)


def test_a_failing_observer_harms_nobody():
    async def test() -> None:
        async with engine() as client:
            client.observers.append(lambda step: 1 / 0)
            assert await collect(client, generate("a", [2], 3)) == (expected([2], 3), "length")

    within(PATIENCE, test)


def test_ctrl_c_leaves_the_engine_to_its_parent():
    async def test() -> None:
        async with engine() as client:
            os.kill(client.pid, 2)
            assert await collect(client, generate("a", [2], 3)) == (expected([2], 3), "length")

    within(PATIENCE, test)


def test_the_engine_ends_with_its_parent():
    parent = f"""
import asyncio, os, signal
from server.api.client import EngineClient
from server.settings import Settings
async def main():
    client = await EngineClient.start(Settings(), {FAKE!r})
    await client.ready()
    print(client._directory, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    # the engine inherits stdout: it reaches its end only when both processes have
    done = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, stdout=-1, timeout=PATIENCE)
    assert done.returncode == -9 and b"steadystate-" in done.stdout
    assert not Path(done.stdout.decode().strip()).exists()


def test_what_has_piled_up_comes_in_few_frames():
    """A process that is too slow for every step sheds frames, and no token."""

    async def test() -> None:
        async with engine("--slots", 4) as client:
            streams = [client.submit(generate(f"r{n}", [n], 600)) for n in range(4)]

            async def slowly(stream: EngineStream) -> tuple[int, list[int]]:
                frames, ids = 0, []
                async for output in stream:
                    frames += 1
                    ids += unpack_tokens(output.tokens)
                    time.sleep(0.01)  # what is to be done for a frame
                return frames, ids

            results = await asyncio.gather(*map(slowly, streams))
            for n, (frames, ids) in enumerate(results):
                assert ids == expected([n], 600)
                assert frames < 300

    within(PATIENCE, test)
