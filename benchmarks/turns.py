"""Servers under load by turns of a tenth of a second, while the processes of others are stopped.

A machine's speed changes by several percent within seconds, for reasons of its own. Servers that
take turns so short have the same of it, and what one does over the other can be told to a percent.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from benchmarks.load import Clients, Load, Reply

SECONDS = 0.1  # of a turn


def play(groups: Sequence[int], clients: Sequence[Clients], loads: Sequence[Load]) -> list[float]:
    """Tokens a second of each server under its load, by the time of its own turns. A server is
    known by the group of its processes."""
    turns: list[list[tuple[float, float]]] = [[] for _ in groups]
    with ThreadPoolExecutor(len(groups)) as pool, ExitStack() as stack:
        for group in groups:
            stack.callback(os.killpg, group, signal.SIGCONT)
            os.killpg(group, signal.SIGSTOP)
        answers = [pool.submit(own.run, load) for own, load in zip(clients, loads, strict=True)]
        while not all(answer.done() for answer in answers):
            for group, answer, own in zip(groups, answers, turns, strict=True):
                if not answer.done():
                    before = time.monotonic()
                    os.killpg(group, signal.SIGCONT)
                    time.sleep(SECONDS)
                    os.killpg(group, signal.SIGSTOP)
                    own.append((before, time.monotonic()))
    return [
        load.tokens * len(answer.result()) / running(own, answer.result())
        for load, answer, own in zip(loads, answers, turns, strict=True)
    ]


def running(turns: Sequence[tuple[float, float]], replies: Sequence[Reply]) -> float:
    """Seconds of turns between the first request and the end of the last answer."""
    begin = min(reply.sent for reply in replies)
    end = max(reply.frames[-1] for reply in replies)
    return sum(max(0.0, min(after, end) - max(before, begin)) for before, after in turns)
