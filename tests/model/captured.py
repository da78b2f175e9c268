"""Steps as CUDA graphs, on the CPU: what is recorded there is run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import experts
from model import pieces
from model.chunk import Chunk
from model.graphs import DecodeGraphs, EndGraphs, Graphs, Replayed
from model.lightning import Lightning
from model.pieces import PiecewiseGraphs
from model.runner import ModelRunner


class Recorded(TorchDispatchMode):
    """A CUDA graph's part on the CPU: it keeps operations as they run, and runs them again on the
    memory that they read and wrote."""

    current: Recorded | None = None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    @classmethod
    def whole(cls, call: Callable[..., None]) -> Callable[..., None]:
        """A call that is kept as one operation: what it does depends on numbers."""

        def kept(*args: Any) -> None:
            if cls.current is None:
                call(*args)
            else:
                cls.current.calls.append((call, args, {}, None))

        return kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def capture_begin(self, pool: object) -> None:
        Recorded.current = self
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        Recorded.current = None

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)


def eager(graphs: Graphs) -> Callable[..., Replayed]:
    """What is captured, run instead."""

    def replay(chunks: Sequence[Chunk], size: int) -> Replayed:
        graphs._exchange.say(chunks, size)
        terms = graphs._step(size)
        return Replayed(graphs._exchange.heard()[: len(chunks)], terms[:, : len(chunks)])

    return replay


def recorded(runner: ModelRunner, most: int, monkeypatch: pytest.MonkeyPatch) -> PiecewiseGraphs:
    """The chains of steps of up to so many rows."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(pieces, "alias", lambda x: x)
    monkeypatch.setattr(experts, "_looped", experts._masked)  # what is recorded asks for no numbers
    graphs = PiecewiseGraphs(runner.model, runner.store, runner.sequences, most)
    with torch.inference_mode():
        graphs.prepare()
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(Lightning, "__call__", Recorded.whole(Lightning.__call__))
        for size in reversed(graphs.sizes):
            if size <= pieces.SHORT:
                graphs._metadata.say((), size)  # what is recorded is run as well
            graphs.record(size, (0, 0))
            if size <= pieces.SHORT:
                graphs._metadata.launched()
    return graphs


def captured(runner: ModelRunner, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a runner serve its steps, of up to so many rows, as it does beside a GPU."""
    slots, of = runner.capacity.slots, (runner.model, runner.store, runner.sequences)
    chains = recorded(runner, most, monkeypatch)
    graphs = DecodeGraphs(*of, slots)
    ends = EndGraphs(runner.model, graphs.wishes, runner.sequences, chains.asked)
    monkeypatch.setattr(graphs, "_replay", eager(graphs))
    monkeypatch.setattr(ends, "_replay", eager(ends))
    monkeypatch.setattr(runner, "pieces", chains)
    monkeypatch.setattr(runner, "graphs", graphs)
    monkeypatch.setattr(runner, "ends", ends)
