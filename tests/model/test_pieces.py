"""Steps recorded in pieces, attention between them: what they fold is what whole steps fold."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
import torch

from model import batch, metadata
from model.batch import Batch
from model.chunk import PENDING, Chunk, OutOfDeviceMemory, Sampling
from model.families import added, forward
from model.graphs import EndGraphs, ladder
from model.lightning import Lightning
from model.metadata import TAILS
from model.pieces import APART, PiecewiseGraphs
from model.runner import ModelRunner
from model.sampling import Wishes
from model.staging import IN_FLIGHT
from tests.model.captured import Recorded, captured, eager, recorded
from tests.model.checkpoints import KINDS
from tests.model.harness import GREEDY, Sequence, load, prompt

CUDA = torch.cuda.is_available()
MOST = 80  # rows of a step here


@pytest.mark.parametrize("most", [16, 17, 80, 2048, 8192])
def test_the_ladder_ends_where_it_must(most: int) -> None:
    sizes = ladder(most, (APART,), APART)
    assert sizes == sorted(set(sizes)) and sizes[0] == 16 and sizes[-1] == most
    assert all(b - a <= max(16, a // 8) for a, b in pairwise(sizes))
    assert {1 << i for i in range(4, 14) if 1 << i <= most} <= {*sizes}


@pytest.fixture(scope="module", params=KINDS)
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    path = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](path)
    return load(path, ring=5 if request.param.endswith("ring") else 0)


@torch.inference_mode()
def steps(runner: ModelRunner, graphs: PiecewiseGraphs | None) -> list[torch.Tensor]:
    """Logits of steps of all kinds: prompts alone and beside tokens, one that goes on, tokens, and
    prompts of which the last token is apart."""
    long, short, other = (Sequence(runner, prompt(99, i), slot=i) for i in (1, 2, 4))
    logits = []
    for taken in (
        [(long, 37)],
        [(short, 2), (other, 29)],
        [(short, 1), (other, 1), (long, 16)],
        [(short, 1), (long, 1)],
        [(other, 33), (long, 31), (short, 16)],
        [(short, 1), (other, -9), (long, -3)],
    ):
        chunks: list[Chunk] = []
        for sequence, n in taken:
            chunk = sequence.chunk(abs(n))
            chunk.apart = n < 0
            chunks += chunk.parts
        chunks.sort(key=lambda chunk: len(chunk.tokens) > 1)
        runner.sequences.keep(chunks)
        packed = Batch.pack(chunks, runner.sequences)
        if graphs is None:
            logits.append(added(forward(runner.model, packed, runner.store)).cpu())
        else:
            assert graphs.serve(packed)
            if graphs.short(chunks):
                graphs.fold_short(chunks)
                asking = sum(chunk.sampling is not None for chunk in chunks)
                folded = tuple(x[:asking] for x in graphs.asked)
            else:
                whole = graphs.fold(packed)
                assert len(whole[0]) == len(packed.ids)
                folded = packed.sampled(*whole)
            logits.append(added(runner.model.finish(*folded)).cpu())
    return logits


@pytest.fixture(params=[TAILS, 1], ids=["inside", "between"])
def tails(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Whether lightning attention is a part of the graphs: with one long sequence at most, all but
    one of the steps that have one are recorded around it."""
    monkeypatch.setattr(metadata, "TAILS", request.param)
    return int(request.param)


@pytest.mark.skipif(CUDA, reason="the kernels there are no operations of PyTorch")
def test_what_pieces_record_folds_what_whole_steps_fold(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, tails: int
) -> None:
    expected = steps(runner, None)
    graphs = recorded(runner, MOST, monkeypatch)
    attend = Lightning.__call__
    seen = []

    def attended(*args: Any) -> None:
        seen.append(args[2].tail is not None and args[2].tail.items is not None)
        attend(*args)

    monkeypatch.setattr(Lightning, "__call__", attended)
    runner.store.slots.poison()
    graphs._ids.fill_(3)  # rows of padding hold anything
    graphs._metadata._staging._said.fill_(7)
    for got, want in zip(steps(runner, graphs), expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert not any(seen) and bool(seen) == (tails == 1), "what is launched between is of the step"


@pytest.mark.skipif(not CUDA, reason="CUDA graphs")
def test_pieces_fold_what_whole_steps_fold(runner: ModelRunner, tails: int) -> None:
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


def drawn_by(runner: ModelRunner, *, known: bool, lost: int | None = None) -> list[int]:
    """Ids of steps of a prompt, its last token apart, beside every other slot, which goes on from
    what it drew last, whether the host knows that or not. lost: a step that runs out of memory."""
    slots = runner.capacity.slots
    sequences = [Sequence(runner, prompt(20, i), slot=i) for i in range(slots)]
    *others, last = sequences
    drawn = runner.step([sequence.chunk(5) for sequence in others])
    ids = []
    for turn in range(IN_FLIGHT + 2):
        tokens = [s.token for s in drawn if s is not None]
        chunks = []
        for sequence, token in zip(others, tokens, strict=False):
            sequence.ids[sequence.done] = token if known else PENDING
            chunks.append(sequence.chunk(1))
        last.done = 0
        chunks.append(last.chunk(9 + turn))
        chunks[-1].apart = True
        if turn == lost:
            with pytest.raises(OutOfDeviceMemory):
                runner.step(chunks)
            break
        drawn = runner.step(chunks)
        ids += [s.token for s in drawn if s is not None]
    return ids


def test_a_short_step_goes_on_from_ids_that_the_host_does_not_know(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In more steps than are under way at a time, and after one that was lost behind its graphs.
    Every slot has a part in them: that a last token is apart makes no sequence more."""
    if not CUDA:
        captured(runner, MOST, monkeypatch)
    graphs = runner.pieces
    assert graphs is not None
    with monkeypatch.context() as patch:
        for name in ("pieces", "graphs", "ends"):
            patch.setattr(runner, name, None)
        want = drawn_by(runner, known=True)
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "short", lambda chunks: False)
        assert drawn_by(runner, known=False) == want
    monkeypatch.setattr(graphs, "fold", None)  # all steps are short
    assert drawn_by(runner, known=False) == want
    with monkeypatch.context() as patch:
        fold, calls = graphs.fold_short, []

        def lost(chunks: list[Chunk]) -> None:
            fold(chunks)
            calls.append(chunks)
            if len(calls) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(graphs, "fold_short", lost)
        got = drawn_by(runner, known=False, lost=2)
        assert got == want[: len(got)] and len(calls) == 4
    assert drawn_by(runner, known=False) == want


@pytest.mark.skipif(CUDA, reason="what is recorded there cannot be watched")
def test_nothing_is_brought_to_the_device_by_what_is_recorded(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer, during = batch._transfer, []

    def watched(*args: Any) -> Any:
        during.append(Recorded.current is not None)
        return transfer(*args)

    monkeypatch.setattr(batch, "_transfer", watched)
    recorded(runner, MOST, monkeypatch)
    assert during == [False]


KINDS_OF_ROWS = {
    "plain": Sampling(temperature=0.8, seed=5),
    "filtered": Sampling(temperature=0.8, seed=5, top_k=3),
    "told": Sampling(temperature=0.0, logprobs=2),
}


@pytest.mark.parametrize("kind", KINDS_OF_ROWS)
def test_the_end_of_a_step_draws_what_it_draws_at_once(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Three rows of seven ask, beside one of padding, whatever stood where they are gathered."""
    sequences = [Sequence(runner, prompt(90, i), slot=i) for i in (1, 2, 4, 5)]
    asks = (KINDS_OF_ROWS[kind], None, GREEDY, Sampling(temperature=0.7, seed=6))
    chunks = [
        msgspec.structs.replace(sequence.chunk(n), sampling=sampling)
        for sequence, n, sampling in zip(sequences, (1, 2, 2, 2), asks, strict=True)
    ]
    monkeypatch.setattr(runner, "pieces", None)
    drawn = []
    for ended in (False, True):
        monkeypatch.setattr(runner, "ends", None)
        if ended:
            with torch.inference_mode():
                runner.sequences.keep(chunks)
                like = runner.model.fold(Batch.pack(chunks, runner.sequences), runner.store)
            wishes = Wishes(runner.capacity.slots)
            rows = tuple(x.new_zeros(4, *x.shape[1:]) for x in like)
            ends = EndGraphs(runner.model, wishes, runner.sequences, rows)
            if CUDA:
                ends.capture(torch.cuda.graph_pool_handle())
            else:
                monkeypatch.setattr(ends, "_replay", eager(ends))
            monkeypatch.setattr(runner, "ends", ends)
        drawn.append(runner.step(chunks))
        latest = runner.sequences.latest.tolist()
        tokens = [sampled.token for sampled in drawn[-1] if sampled is not None]
        assert [latest[1 + slot] for slot in (1, 4, 5)] == tokens
    at_once, ended_ = drawn
    assert ended_[1] is None and [s and s.token for s in ended_] == [s and s.token for s in at_once]
    told = ended_[0]
    assert told is not None and len(told.top) == (2 if kind == "told" else 0)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs")
def test_a_runner_has_pieces_for_every_step(runner: ModelRunner) -> None:
    assert runner.pieces is not None
    assert runner.pieces.sizes[-1] == runner.max_step_tokens
