"""A state that leaves for the host: what it was, in pinned memory, while steps go on."""

from __future__ import annotations

import pytest
import torch

from model.store import PIECE_BYTES, Field, Saved, Store

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
    before = store.slots.memory.clone(), store.blocks.memory.clone()
    seen = torch.arange(100, device="cuda")
    store.save(1, (6, 1, 3, 0, 7), seen).wait()  # the allocators have what they need
    assert store._leaving is not None and store._leaving != torch.cuda.current_stream()
    with torch.cuda.stream(store._leaving):
        torch.cuda._sleep(SLEEP)
    saved = store.save(1, (6, 1, 3, 0, 7), seen)
    assert saved.seen is not None and saved.done is not None
    assert saved.slot.is_pinned() and saved.blocks.is_pinned() and saved.seen.is_pinned()
    overwrite(store)
    seen.zero_()
    torch.cuda.current_stream().synchronize()
    assert not saved.done.query(), "the steps waited for the copies, or these for nobody"
    check(store, saved, before)
    assert torch.equal(saved.seen, torch.arange(100))
