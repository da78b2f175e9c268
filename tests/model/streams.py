"""The stream on which states leave, on the CPU: what is launched there happens late."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.store import Store


class Stream:
    """Work that waits until somebody does for it."""

    def __init__(self) -> None:
        self.work: list[Callable[[], Any]] = []
        self.done = 0  # pieces of it
        self.rows: set[int] = set()  # addresses of memory that stays, whoever has it

    def run(self, count: int) -> None:
        """All up to a piece of work, in order."""
        with torch.inference_mode():
            while self.done < count:
                self.done += 1
                self.work[self.done - 1]()

    def wait_stream(self, other: Stream) -> None:
        other.run(len(other.work))

    def wait_event(self, event: Event) -> None:
        event.synchronize()


class Event:
    """A place in a stream's work."""

    def __init__(self) -> None:
        self.stream, self.count = Stream(), 0

    def record(self, stream: Stream) -> None:
        self.stream, self.count = stream, len(stream.work)

    def synchronize(self) -> None:
        self.stream.run(self.count)


class Launched(TorchDispatchMode):
    """Copies are launched on a stream."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        target = _seen(args[0]) if args[0].data_ptr() in self.stream.rows else args[0]
        rest = args[1:]
        self.stream.work.append(lambda: func(target, *rest))
        return args[0]


def _seen(row: torch.Tensor) -> torch.Tensor:
    """The memory of a row of bytes, which is not kept from being given to another."""
    memory = (ctypes.c_ubyte * len(row)).from_address(row.data_ptr())
    return torch.from_numpy(np.frombuffer(memory, dtype=np.uint8))


def apart(store: Store, rows: int, monkeypatch: pytest.MonkeyPatch) -> Stream:
    """States of a store on the CPU leave as beside a GPU: for so many rows pinned before, then for
    other memory. The stream on which they do."""
    main, leaving = Stream(), Stream()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", Launched)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(store, "_leaving", leaving)
    if not store.blocks.bytes:
        store._rows.add(rows)
        leaving.rows = {chunk.ctypes.data + first for chunk, first in store._rows._free}
    monkeypatch.setattr(store._rows, "_pinned", True)
    return leaving
