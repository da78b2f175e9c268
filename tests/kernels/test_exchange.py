"""What the host says of a step, and what the step tells it, through memory that both reach."""

import pytest
import torch

from kernels.exchange import send, take, tell

TURNS, SLOTS = 3, 90
MOST = 5000  # words of a turn


def pinned(x):
    return x.pin_memory() if torch.cuda.is_available() else x


def said_of(words, N, at):
    """What the host says in all turns: about half of N ids are pending, whose slots, others in each
    turn, begin at a word; at the end of them comes anything."""
    said = torch.randint(-(1 << 62), 1 << 62, (TURNS, words))
    said[:, :N] = torch.where(torch.rand(TURNS, N) < 0.5, -1, torch.arange(N))
    for turn in said:
        turn[at:].view(torch.int32)[:N] = torch.randperm(SLOTS)[:N]
    return pinned(said)


def memory_of(device, words):
    """latest, turn, memory, which does not end with the words."""
    latest = torch.arange(1000, 1000 + SLOTS + 1, device=device)
    memory = torch.full((words + 9,), -7, device=device)
    return latest, torch.zeros(1, dtype=torch.int64, device=device), memory


def slots_in(memory, at, N):
    return memory[at:].view(torch.int32)[:N]


@pytest.mark.parametrize(
    ("N", "at", "words"), [(1, 1, 2), (1, 4, 9), (63, 200, 781), (70, 70, 105), (70, 4965, MOST)]
)
def test_a_step_takes_what_is_said_of_its_turn(device, N, at, words):
    """The first words of as many as there are; nothing behind them is touched."""
    said = said_of(words + 5, N, at)
    latest, turn, memory = memory_of(device, words)
    for step in range(2 * TURNS + 1):
        take(said, turn, latest, memory[:words], slots_in(memory, at, N))
        assert turn.item() == step + 1
        now = said[step % TURNS, :words]
        slots = slots_in(now, at, N).tolist()
        ids = [1001 + slots[n] if id < 0 else id for n, id in enumerate(now[:N].tolist())]
        assert memory[:N].tolist() == ids
        assert torch.equal(memory[N:words].cpu(), now[N:])
    assert (memory[words:] == -7).all()
    assert latest.tolist() == list(range(1000, 1001 + SLOTS))


@pytest.mark.parametrize("N", [1, 63, 70])
def test_a_step_tells_what_it_drew_in_its_turn(device, N):
    said = said_of(110, N, 70)
    latest, turn, memory = memory_of(device, 110)
    told = pinned(torch.full((TURNS, 75), -7))
    expected, known = told.clone(), latest.tolist()
    for step in range(TURNS + 2):
        slots = slots_in(memory, 70, N)
        take(said, turn, latest, memory[:110], slots)
        ids = torch.randint(-1, 5, (N,), device=device)
        tell(ids, slots, latest, turn, told)
        if device.type == "cuda":
            torch.cuda.synchronize()
        expected[step % TURNS, :N] = ids.cpu()
        for slot, id in zip(
            slots_in(said[step % TURNS], 70, N).tolist(), ids.tolist(), strict=True
        ):
            known[slot + 1] = max(id, 0)
        assert torch.equal(told, expected) and latest.tolist() == known


def test_padding_is_nobodys(device):
    """Nor is a row that is elsewhere, whatever its id."""
    said = pinned(torch.tensor([[-1, 0, 0, -1, 9, -1, -1, 0, 0, 0, 0, 0]]))
    slots_in(said[0], 8, 7)[:] = torch.tensor([5, -1, -1, 8, -2, -2, -1])
    latest, turn, memory = memory_of(device, 12)
    slots = slots_in(memory, 8, 7)
    take(said, turn, latest, memory[:12], slots)
    assert memory[:7].tolist() == [1006, 0, 0, 1009, 9, 1000, 1000]
    told = pinned(torch.zeros(1, 5, dtype=torch.int64))
    tell(torch.tensor([1, 2, 2, 3], device=device), slots[:4], latest, turn, told)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert told.tolist() == [[1, 2, 2, 3, 0]]
    assert latest[[0, 6, 9]].tolist() == [2, 1, 3] and latest[1:6].tolist() == [*range(1001, 1006)]


@pytest.mark.parametrize("shape", [(0, 2), (1, 2), (3,), (257, 12)])
@pytest.mark.parametrize("kind", [torch.int64, torch.float64])
def test_anything_is_sent(device, shape, kind):
    x = (torch.randn(shape, device=device) * 1000).to(kind)
    host = pinned(torch.zeros(shape, dtype=kind))
    send(x, host)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(host, x.cpu())
