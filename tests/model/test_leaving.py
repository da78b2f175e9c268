"""States leave for the host and come back bit for bit, even where no memory is left to do it in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from model.store import PIECE_BYTES, Field, Store
from tests.model.streams import apart

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="what a GPU does")
    ),
]
BLOCKS = 9
SLOT_FIELDS = [Field("state", (1 << 20,), torch.float32), Field("ends", (3,), torch.int64)]
BLOCK_FIELDS = [Field("keys", (PIECE_BYTES // 8,), torch.bfloat16)]  # four are a piece


def filled(device: str) -> Store:
    store = Store(SLOT_FIELDS, BLOCK_FIELDS, slots=3, blocks=BLOCKS, device=torch.device(device))
    generator = torch.Generator(device).manual_seed(1)
    for rows in (store.slots, store.blocks):
        rows.memory.random_(0, 256, generator=generator)
    return store


@contextmanager
def no_memory(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing as large as a state can be had on the device: on a GPU really, elsewhere said so."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        try:
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(PIECE_BYTES, dtype=torch.uint8, device=device)
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return

    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_aside", fail)
        patch.setattr(Store, "_pieces", fail)
        yield


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what a GPU does")
def test_memory_that_was_pinned_before_is_what_states_leave_for() -> None:
    store = Store(SLOT_FIELDS, [], slots=3, blocks=0, device=torch.device("cuda"))
    each = 1 << (store.slots.bytes - 1).bit_length()
    store.reserve(3 * each + 1)
    before = torch.cuda.host_memory_stats()["num_host_alloc"]
    kept = [store.save(slot, (), None) for slot in range(3)]
    assert all(saved.slot.is_pinned() for saved in kept)
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what a GPU does")
def test_states_that_leave_behind_one_another_take_the_same_memory() -> None:
    """All are forgotten but the last before any has left: nothing more is pinned for them, and the
    last is what it was."""
    store = Store(SLOT_FIELDS, [], slots=3, blocks=0, device=torch.device("cuda"))
    store.reserve(2 * store.slots.bytes)
    assert store._leaving is not None
    with torch.cuda.stream(store._leaving):
        torch.cuda._sleep(500_000_000)
    before = torch.cuda.host_memory_stats()["num_host_alloc"]
    kept = None
    for number in range(9):
        store.slots.memory[1].fill_(number)
        kept = store.save(1, (), None)
        store.depart()
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == before
    assert kept is not None
    kept.wait()
    assert (kept.slot == 8).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tight", [False, True])
def test_a_state_leaves_and_comes_back(
    device: str, tight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(device)
    seen = torch.arange(100, dtype=torch.int32, device=device)
    first, second = (0, 3, 5, 7, 8), (8, 2, 1, 4, 0)
    slot, blocks = store.slots.memory[0].clone(), store.blocks.memory[list(first)].clone()
    untouched = store.slots.memory[1].clone(), store.blocks.memory[6].clone()

    def leave_and_return() -> torch.Tensor:
        saved = store.save(0, first, seen)
        store.slots.memory[0].fill_(255)  # the next step is not waited for
        store.blocks.memory[list(first)] = 255
        seen.zero_()
        store.restore(saved, 2, second)
        saved.wait()
        assert saved.seen is not None
        return saved.seen

    if tight:
        with no_memory(device, monkeypatch):
            told = leave_and_return()
    else:
        told = leave_and_return()
    assert torch.equal(store.slots.memory[2], slot)
    assert torch.equal(store.blocks.memory[list(second)], blocks)
    assert torch.equal(store.slots.memory[1], untouched[0])
    assert torch.equal(store.blocks.memory[6], untouched[1])
    assert told.tolist() == list(range(100))


def test_the_host_writes_where_nothing_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose state was forgotten before it had got there; the next one to leave for it goes
    behind that."""
    store = Store(SLOT_FIELDS, [], slots=3, blocks=0, device=torch.device("cpu"))
    leaving = apart(store, 1, monkeypatch)
    with torch.inference_mode():
        store.slots.memory.fill_(1)
        store.save(0, (), None)
        store.depart()
        assert leaving.done < len(leaving.work)
        row, _ = store.host(0)
        row.fill_(2)
        leaving.run(len(leaving.work))
        assert (row == 2).all() and len(store._rows) == 0
        address = row.data_ptr()
        del row
        store.slots.memory.fill_(3)
        saved = store.save(0, (), None)
        assert saved.slot.data_ptr() == address
        with pytest.raises(RuntimeError, match="has not departed"):
            saved.wait()
        store.depart()
        saved.wait()
        assert (saved.slot == 3).all()
