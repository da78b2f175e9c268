"""What a short step is about, as lightning attention reads it on the device."""

from __future__ import annotations

import pytest
import torch

from kernels.packing import ELSEWHERE, PADDING
from model.batch import Batch
from model.chunk import PENDING, Chunk, Sampling
from model.metadata import TAILS, Metadata
from model.sequences import Sequences

CPU = torch.device("cpu")
ROWS, MOST = 48, 40
ASKS = Sampling(temperature=0.0)


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("lengths", [(), (1,), (1, 1, 1), (5,), (1, 1, 2, 9), (1,) * 12 + (4,)])
def test_a_step_is_laid_out_as_a_batch_is(size: int, lengths: tuple[int, ...]) -> None:
    """Whatever stood where it is said: fewer rows than slots, more, and rows of padding."""
    sequences = Sequences(MOST, 0, CPU)
    sequences.latest[:] = torch.arange(500, 501 + MOST)
    metadata = Metadata(ROWS, MOST, sequences)
    metadata._staging._said.fill_(7)
    chunks = [
        Chunk(
            tokens=[PENDING] if n == 1 else range(10 * i, 10 * i + n),
            start=3 + i,
            slot=(7 * i + 2) % MOST,
            sampling=ASKS if i % 2 == 0 else None,
        )
        for i, n in enumerate(lengths)
    ]
    metadata.say(chunks, size)
    views = metadata.take(size)
    metadata.launched()
    T, ones = sum(lengths), sum(n == 1 for n in lengths)
    batch = Batch.pack(chunks or [Chunk(tokens=[0, 0], start=0, slot=0)], sequences)
    placed = metadata.of(batch, views)
    n = min(size, MOST)
    rest = [0] * (size - T)
    ids = batch.ids.tolist() if chunks else []
    positions = batch.positions.tolist() if chunks else []
    assert placed.ids.tolist() == [*ids, *rest]
    assert placed.positions.tolist() == [*positions, *rest]
    assert ids[:ones] == [501 + chunk.slot for chunk in chunks[:ones]]

    slots = [chunk.slot for chunk in chunks]
    elsewhere = [ELSEWHERE] * (min(T, n) - ones)
    assert placed.singles == n and placed.tail_row == 0
    assert placed.packing.slots.tolist() == [
        *slots[:ones],
        *elsewhere,
        *[PADDING] * (n - min(T, n)),
    ]
    assert placed.packing.starts.tolist() == placed.positions[:n].tolist()

    tail, tails = placed.tail, chunks[ones:]
    assert tail is not None and tail.items is not None and placed.ends is not None
    none = TAILS - len(tails)
    assert tail.slots.tolist() == [*slots[ones:], *[PADDING] * none]
    assert tail.starts.tolist() == [*[chunk.start for chunk in tails], *[0] * none]
    ends = [chunk.start + len(chunk.tokens) for chunk in tails]
    assert placed.ends[: len(tails)].tolist() == ends
    items = tail.items.tolist()
    assert [item[1] for item in items] == sorted((item[1] for item in items), reverse=True)
    rows = [sum(lengths[:i]) for i in range(len(lengths))]
    cut = [[rows[ones + i], len(chunk.tokens), i, 1] for i, chunk in enumerate(tails)]
    assert sorted(item for item in items if item[1]) == sorted(cut)

    asking = [row + n - 1 for row, n in zip(rows, lengths, strict=True)][::2]
    folded = torch.arange(size, dtype=torch.float32)[:, None]
    out = torch.full((MOST, 1), -7.0)
    metadata.gather(folded, views, out)
    assert out[: len(asking), 0].tolist() == asking and (out[n:] == -7).all()
