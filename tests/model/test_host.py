"""Rows of host memory: given out once at a time, however their memory is looked at."""

from __future__ import annotations

import gc

import pytest
import torch

from model import host
from model.host import HostRows


@pytest.mark.parametrize("count", [1, 2, 7, 23])
@pytest.mark.parametrize("chunk", [1, 1000, 4096])
def test_rows_do_not_share_memory(count: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CHUNK_BYTES", chunk)
    rows = HostRows(300, pinned=False)
    rows.add(count)
    taken = [row for _ in range(count) if (row := rows.take()) is not None]
    assert len(taken) == count and rows.take() is None
    for number, row in enumerate(taken):
        assert row.shape == (300,) and row.dtype == torch.uint8
        row.fill_(number)
    assert all((row == number).all() for number, row in enumerate(taken))


def test_a_row_is_free_when_nobody_sees_it() -> None:
    """Whoever looks at a part of it by other means keeps all of it."""
    rows = HostRows(64, pinned=False)
    rows.add(1)
    row = rows.take()
    assert row is not None and not len(rows)
    data = row[8:16].view(torch.float32).numpy().data
    row.fill_(1)
    del row
    gc.collect()
    assert rows.take() is None and bytes(data) == bytes([1] * 8)
    del data
    assert len(rows) == 1 and rows.take() is not None
