"""A state that leaves for the host: what it was, in pinned memory, while steps go on."""

from __future__ import annotations

import pytest
import torch

from model.store import PIECE_BYTES, QUEUED_BYTES, Field, Saved, Store

CUDA = torch.cuda.is_available()
SLEEP = 2_000_000_000  # cycles, about a second


def store_on(device: str) -> Store:
    """Two slots and eight blocks, of which three are saved at a time, with numbers in them."""
    slot = [Field("state.0", (2, 16, 16), torch.float32), Field("keys.0", (3, 5), torch.bfloat16)]
    block = [Field("keys.1", (PIECE_BYTES // 3 // 4,), torch.float32, 0)]
    store = Store(slot, block, slots=2, blocks=8, device=torch.device(device))
    for memory in (store.slots.memory, store.blocks.memory):
        memory.random_(256)
    return store


def overwrite(store: Store) -> None:
    store.slots.memory.zero_()
    store.blocks.memory.zero_()


def check(store: Store, saved: Saved, before: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The bytes are those that were there, and come back into other places."""
    store.depart()
    saved.wait()
    slots, blocks = before
    assert torch.equal(saved.slot, slots[1].cpu())
    assert torch.equal(saved.blocks, blocks[[6, 1, 3, 0, 7]].cpu())
    store.restore(saved, 0, (2, 3, 4, 5, 6))
    assert torch.equal(store.slots.memory[0], slots[1])
    assert torch.equal(store.blocks.memory[2:7], blocks[[6, 1, 3, 0, 7]])


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not CUDA, reason="no GPU"))]
)
def test_what_was_saved_is_what_was_there(device: str) -> None:
    store = store_on(device)
    before = store.slots.memory.clone(), store.blocks.memory.clone()
    saved = store.save(1, (6, 1, 3, 0, 7), None)
    overwrite(store)
    check(store, saved, before)


@pytest.mark.skipif(not CUDA, reason="streams of a GPU")
def test_a_state_leaves_on_a_stream_of_its_own_for_pinned_memory() -> None:
    """Its copies are held up; steps go on, in the very slot and blocks."""
    store = store_on("cuda")
    seen = torch.arange(100, device="cuda")
    store.save(1, (6, 1, 3, 0, 7), seen)  # the allocators have what they need
    store.depart()
    overwrite(store)  # and kernels are loaded: for the first of a kind the device is waited for
    seen.zero_()
    for memory in (store.slots.memory, store.blocks.memory):
        memory.random_(256)
    seen += torch.arange(100, device="cuda")
    before = store.slots.memory.clone(), store.blocks.memory.clone()
    torch.cuda.synchronize()
    assert store._leaving is not None and store._leaving != torch.cuda.current_stream()
    with torch.cuda.stream(store._leaving):
        torch.cuda._sleep(SLEEP)
    saved = store.save(1, (6, 1, 3, 0, 7), seen)
    store.depart()
    assert saved.seen is not None and saved.crossing is not None
    assert saved.slot.is_pinned() and saved.blocks.is_pinned() and saved.seen.is_pinned()
    overwrite(store)
    seen.zero_()
    torch.cuda.current_stream().synchronize()
    assert not saved.crossing.done.query(), "the steps waited for the copies, or these for nobody"
    check(store, saved, before)
    assert torch.equal(saved.seen, torch.arange(100))


@pytest.mark.skipif(not CUDA, reason="streams of a GPU")
def test_states_that_were_saved_depart_together() -> None:
    """Until then nobody may wait for them; they are what they were when they were saved. One that
    comes back departs before, and so do more than the device shall keep a copy of."""
    store = Store([Field("state.0", (1 << 20,), torch.float32)], [], slots=3, blocks=0,
                  device=torch.device("cuda"))  # fmt: skip
    store.slots.memory.random_(256)
    before = store.slots.memory.clone()
    first, second = store.save(0, (), None), store.save(1, (), torch.arange(9, device="cuda"))
    store.slots.memory.zero_()
    with pytest.raises(RuntimeError, match="has not departed"):
        first.wait()
    store.depart()
    for slot, saved in enumerate((first, second)):
        saved.wait()
        assert torch.equal(saved.slot, before[slot].cpu())
    assert second.seen is not None and second.seen.tolist() == list(range(9))
    store.restore(store.save(0, (), None), 2, ())
    store.restore(first, 1, ())
    assert not store.slots.memory[2].any() and torch.equal(store.slots.memory[1], before[0])
    count = QUEUED_BYTES // store.slots.bytes + 1
    many = [store.save(1, (), None) for _ in range(count)]
    many[0].wait()
    assert torch.equal(many[-1].slot, before[0].cpu()) and not store._queued
