"""Every family against its oracle, and against itself: chunked, batched, preempted."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from model import store
from model.chunk import Copy, Place
from model.runner import ModelRunner
from tests.model.checkpoints import KINDS
from tests.model.checkpoints.formulas import Oracle
from tests.model.harness import Sequence, load, logits_of, prompt

TEXT = prompt(257)


@dataclass(frozen=True)
class Pair:
    """A model, its oracle, and the oracle's logits after every token of TEXT."""

    runner: ModelRunner
    oracle: Oracle
    want: torch.Tensor


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    path = tmp_path_factory.mktemp(request.param)
    oracle = KINDS[request.param](path)
    runner = load(path, ring=5 if request.param.endswith("ring") else 0)
    return Pair(runner, oracle, oracle(TEXT).float())


@pytest.mark.parametrize("length", [1, 2, 63, 100, 257])
def test_logits_equal_the_oracles(pair: Pair, length: int) -> None:
    got = logits_of(pair.runner, [Sequence(pair.runner, TEXT, 3).chunk(length)])[0]
    torch.testing.assert_close(got, pair.want[length - 1], atol=1e-4, rtol=1e-4)


def test_decoding_equals_the_oracle_at_every_position(pair: Pair) -> None:
    sequence = Sequence(pair.runner, TEXT, 1)
    got = [logits_of(pair.runner, [sequence.chunk(40)])[0]]
    got += [logits_of(pair.runner, [sequence.chunk(1)])[0] for _ in range(40)]
    torch.testing.assert_close(torch.stack(got), pair.want[39:80], atol=1e-4, rtol=1e-4)


def test_every_split_equals_the_whole(pair: Pair) -> None:
    runner, ids = pair.runner, TEXT[:50]
    whole = logits_of(runner, [Sequence(runner, ids, 0).chunk(50)])[0]
    for cut in range(1, 50):
        sequence = Sequence(runner, ids, cut % 8)
        rows = [logits_of(runner, [sequence.chunk(n)])[0] for n in (cut, 50 - cut)]
        torch.testing.assert_close(rows[-1], whole, atol=2e-5, rtol=1e-4)


def test_chunks_of_any_sizes_equal_the_whole(pair: Pair) -> None:
    rng = random.Random(7)
    for slot in (2, 7, 0):
        sequence = Sequence(pair.runner, TEXT, slot)
        while sequence.done < len(TEXT):
            size = min(rng.choice((1, 1, 2, 17, 64, 90)), len(TEXT) - sequence.done)
            got = logits_of(pair.runner, [sequence.chunk(size)])[0]
            torch.testing.assert_close(got, pair.want[sequence.done - 1], atol=1e-4, rtol=1e-4)


def test_batch_equals_each_alone_in_both_orders(pair: Pair) -> None:
    """Decode rows, a one-token prompt, and prompt chunks of unequal length in one step."""
    runner = pair.runner
    texts = [prompt(n, seed=n) for n in (31, 90, 1, 65, 130)]
    heads = [30, 40, 0, 64, 0]
    alone = []
    for text, head in zip(texts, heads, strict=True):
        sequence = Sequence(runner, text, 5)
        if head:
            logits_of(runner, [sequence.chunk(head)])
        alone.append(logits_of(runner, [sequence.chunk(len(text) - head)])[0])
    for order in ([0, 3, 2, 1, 4], [2, 3, 0, 4, 1]):
        runner.store.slots.poison()
        sequences = [Sequence(runner, text, slot) for slot, text in enumerate(texts)]
        for sequence, head in zip(sequences, heads, strict=True):
            if head:
                logits_of(runner, [sequence.chunk(head)])
        chunks = [sequences[i].chunk(len(texts[i]) - heads[i]) for i in order]
        together = logits_of(runner, chunks)
        for row, i in enumerate(order):
            torch.testing.assert_close(together[row], alone[i], atol=2e-5, rtol=1e-4)


def test_a_last_token_that_is_computed_apart_can_be_taken_back(pair: Pair) -> None:
    """In front of a token of another sequence, or in the middle of a prompt; what goes on from one
    token less, by one or by several, has not seen it."""
    runner = pair.runner
    texts = [prompt(n, seed=n) for n in (50, 50, 90)]
    for text in texts[:2]:
        text[49] = (text[49] + 1) % 97  # what is taken back
    other = Sequence(runner, prompt(31), 5)
    logits_of(runner, [other.chunk(30)])
    sequences = [Sequence(runner, text, slot) for slot, text in enumerate(texts)]
    logits_of(runner, [sequences[2].chunk(40)])
    chunks = [sequence.chunk(50) for sequence in sequences]
    for chunk in chunks:
        chunk.apart = True
    parts = [part for chunk in [*chunks, other.chunk(1)] for part in chunk.parts]
    got = logits_of(runner, sorted(parts, key=lambda part: len(part.tokens) > 1))
    for row, text in enumerate([*texts, prompt(31)]):
        want = pair.oracle(text)[-1].float()
        torch.testing.assert_close(got[row], want, atol=1e-4, rtol=1e-4)
    if runner.capacity.rollback:
        for sequence, n in zip(sequences[:2], (1, 7), strict=True):
            sequence.ids = [*prompt(50, seed=50), *range(9)]
            sequence.done = 49
            row = logits_of(runner, [sequence.chunk(n)])[0]
            want = pair.oracle(sequence.ids[: sequence.done])[-1].float()
            torch.testing.assert_close(row, want, atol=1e-4, rtol=1e-4)
            row = logits_of(runner, [sequence.chunk(1)])[0]
            want = pair.oracle(sequence.ids[: sequence.done])[-1].float()
            torch.testing.assert_close(row, want, atol=1e-4, rtol=1e-4)


def test_saved_and_restored_bit_for_bit(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = pair.runner
    monkeypatch.setattr(store, "PIECE_BYTES", max(runner.capacity.block_bytes, 1))
    ids = prompt(90)
    undisturbed = Sequence(runner, ids, 0)
    logits_of(runner, [undisturbed.chunk(80)])
    want = [logits_of(runner, [undisturbed.chunk(5)]) for _ in range(2)]

    first, second = Sequence(runner, ids, 0), Sequence(runner, ids, 6)
    logits_of(runner, [first.chunk(80)])
    blocks = tuple(first.chunk(0).blocks) if runner.capacity.blocks else ()
    second.done = first.done
    targets = tuple(second.chunk(0).blocks) if runner.capacity.blocks else ()
    runner.copy([Copy(Place(slot=0, blocks=blocks, position=80), Place(key="a", position=80))])
    runner.store.slots.poison()
    runner.store.blocks.poison()
    runner.copy(
        [
            Copy(Place(key="a"), Place(slot=6, blocks=targets, position=80)),
            Copy(Place(key="a"), None),
        ]
    )
    assert runner.saved == {}
    got = [logits_of(runner, [second.chunk(5)]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_step_draws_greedily_and_keeps_the_order_of_the_chunks(pair: Pair) -> None:
    runner, oracle = pair.runner, pair.oracle
    long, short = prompt(33, seed=5), prompt(12, seed=6)
    one, two = Sequence(runner, long, 2), Sequence(runner, short, 4)
    logits_of(runner, [two.chunk(11)])
    silent = one.chunk(20)
    silent.sampling = None
    results = runner.step([silent, two.chunk(1)])
    assert results[0] is None and results[1] is not None
    assert results[1].token == int(oracle(short)[-1].argmax())
    results = runner.step([one.chunk(13)])
    assert results[0] is not None
    assert results[0].token == int(oracle(long)[-1].argmax())
