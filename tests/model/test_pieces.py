"""Steps recorded in pieces, attention between them: what they fold is what whole steps fold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import experts
from model import pieces
from model.batch import Batch
from model.chunk import Chunk
from model.families import added, forward
from model.graphs import ladder
from model.pieces import APART, PiecewiseGraphs
from model.runner import ModelRunner
from tests.model.checkpoints import KINDS
from tests.model.harness import Sequence, load, prompt

CUDA = torch.cuda.is_available()
MOST = 80  # rows of a step here


class Recorded(TorchDispatchMode):
    """A CUDA graph's part on the CPU: it keeps operations as they run, and runs them again on the
    memory that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def capture_begin(self, pool: object) -> None:
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

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


@pytest.mark.parametrize("most", [16, 17, 80, 2048, 8192])
def test_the_ladder_ends_where_it_must(most: int) -> None:
    sizes = ladder(most, (APART,), APART)
    assert sizes == sorted(set(sizes)) and sizes[0] == 16 and sizes[-1] == most
    assert all(b - a <= max(16, a // 4) for a, b in pairwise(sizes))


@pytest.fixture(scope="module", params=KINDS)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    path = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](path)
    return load(path, ring=5 if request.param.endswith("ring") else 0)


@torch.inference_mode()
def steps(runner: ModelRunner, graphs: PiecewiseGraphs | None) -> list[torch.Tensor]:
    """Logits of steps of all kinds: prompts alone and beside tokens, one that goes on, tokens."""
    long, short, other = (Sequence(runner, prompt(90, i), slot=i) for i in (1, 2, 4))
    logits = []
    for taken in (
        [(long, 37)],
        [(short, 2), (other, 29)],
        [(short, 1), (other, 1), (long, 16)],
        [(short, 1), (long, 1)],
        [(other, 33), (long, 31), (short, 16)],
    ):
        chunks: list[Chunk] = [sequence.chunk(n) for sequence, n in taken]
        runner.sequences.keep(chunks)
        batch = Batch.pack(chunks, runner.sequences)
        if graphs is None:
            logits.append(added(forward(runner.model, batch, runner.store)).cpu())
        else:
            assert graphs.serve(batch)
            folded = graphs.fold(batch)
            assert len(folded[0]) == len(batch.ids)
            logits.append(added(runner.model.finish(*batch.sampled(*folded))).cpu())
    return logits


@pytest.mark.skipif(CUDA, reason="the kernels there are no operations of PyTorch")
def test_what_pieces_record_folds_what_whole_steps_fold(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(pieces, "alias", lambda x: x)
    monkeypatch.setattr(experts, "_looped", experts._masked)  # what is recorded asks for no numbers
    expected = steps(runner, None)
    graphs = PiecewiseGraphs(runner.model, runner.store, runner.sequences, MOST)
    with torch.inference_mode():
        for size in reversed(graphs.sizes):
            graphs._chains[size] = graphs._record(graphs._padded(size), (0, 0))
    runner.store.slots.poison()
    graphs._ids.fill_(3)  # rows of padding hold anything
    for got, want in zip(steps(runner, graphs), expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs")
def test_pieces_fold_what_whole_steps_fold(runner: ModelRunner) -> None:
    expected = steps(runner, None)
    graphs = PiecewiseGraphs(runner.model, runner.store, runner.sequences, MOST)
    graphs.capture()
    runner.store.slots.poison()
    free = [slot for slot in range(runner.capacity.slots) if slot not in (1, 2, 4)]
    for _ in range(2):
        for got, want in zip(steps(runner, graphs), expected, strict=True):
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    for field in runner.store.slots.views.values():
        if field.is_floating_point():
            assert field[free].isnan().all()


@pytest.mark.skipif(not CUDA, reason="CUDA graphs")
def test_a_runner_has_pieces_for_every_step(runner: ModelRunner) -> None:
    assert runner.pieces is not None
    assert runner.pieces.sizes[-1] == runner.max_step_tokens
