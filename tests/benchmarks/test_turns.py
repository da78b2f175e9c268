"""Servers by turns: who is stopped when, and what counts as a server's own time."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from benchmarks import turns
from benchmarks.load import Load, Reply
from benchmarks.turns import play, running

WORK = "import time\nwhile True: print(time.monotonic(), flush=True); time.sleep(0.002)"


@contextmanager
def working() -> Iterator[subprocess.Popen[str]]:
    """A process, in a group of its own, that tells when it runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK], stdout=subprocess.PIPE, text=True, process_group=0
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


class Clients:
    """Ends a load when its server has worked for a while."""

    def __init__(self, process: subprocess.Popen[str], times: int) -> None:
        self.process, self.times = process, times
        self.seen: list[float] = []

    def run(self, load: Load) -> list[Reply]:
        assert self.process.stdout is not None
        sent = time.monotonic()
        for line, _ in zip(self.process.stdout, range(self.times), strict=False):
            self.seen.append(float(line))
        return [Reply(sent, sent, [time.monotonic()])]


def test_one_server_runs_while_the_other_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SECONDS", 0.05)
    load = Load(url="", streams=1, requests=1, prompt=1, tokens=100, vocab=97)
    with working() as one, working() as other:
        clients: Any = [Clients(one, 300), Clients(other, 600)]
        for process in (one, other):
            assert process.stdout is not None and process.stdout.readline()  # it has begun
        rates = play([one.pid, other.pid], clients, [load] * 2)
        for process in (one, other):  # both run again
            process.stdout.readline()
    assert rates[0] > 1.3 * rates[1] > 0
    mixed = sorted((at, number) for number, own in enumerate(clients) for at in own.seen[20:])
    changes = sum(a[1] != b[1] for a, b in pairwise(mixed))
    assert 2 <= changes < len(mixed) / 4  # side by side they would change at every other one


def test_time_counts_from_the_first_request_to_the_last_answer() -> None:
    replies = [Reply(1.0, 1.5, [3.0]), Reply(1.0, 2.0, [2.5, 4.25])]
    own = [(0.0, 1.0), (1.25, 2.0), (3.0, 3.5), (4.0, 4.5), (5.0, 6.0)]
    assert running(own, replies) == pytest.approx(0.5 + 0.5 + 0.25)
