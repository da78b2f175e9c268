from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server.api.checkpoint import write_checkpoint
from tests.server.api.live import Live, Process, in_thread


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def echo(checkpoint: Path) -> Iterator[Live]:
    """A server whose model repeats its prompt."""
    with in_thread(checkpoint, "--echo", served_model_name="org/tiny") as live:
        yield live


@pytest.fixture(scope="session")
def slow(checkpoint: Path) -> Iterator[Live]:
    """A server with one slot that takes 10 ms a step and reads 8 tokens in one."""
    options = ("--slots", "1", "--step-seconds", "0.01", "--max-step-tokens", "8")
    with in_thread(checkpoint, *options, max_queue_requests=2, keepalive_seconds=0.05) as live:
        yield live


@pytest.fixture
def launch(checkpoint: Path) -> Iterator[Callable[..., Process]]:
    """Starts the command; what still runs is killed at the end of the test."""
    with ExitStack() as stack:

        def start(*engine: str, **settings: object) -> Process:
            process = Process(checkpoint, *engine, **settings)
            stack.callback(process.close)
            return process

        yield start
