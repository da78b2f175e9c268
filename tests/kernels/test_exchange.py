"""What the host says of a step, and what the step tells it, through memory that both reach."""

import pytest
import torch

from kernels.exchange import fetch, send, take, tell

TURNS, MOST, SLOTS = 3, 70, 90


def pinned(x):
    return x.pin_memory() if torch.cuda.is_available() else x


@pytest.fixture
def host(device):
    """Words and numbers of all turns, as the host says them; slots are different ones in a turn."""
    torch.manual_seed(0)
    words = torch.randint(-(1 << 62), 1 << 62, (TURNS, 3, MOST))
    words[:, 0] = torch.where(torch.rand(TURNS, MOST) < 0.5, -1, torch.arange(MOST))
    numbers = torch.stack([torch.randperm(SLOTS)[:MOST].int() for _ in range(2 * TURNS)])
    return pinned(words), pinned(numbers.view(TURNS, 2, MOST))


def memory(device):
    """latest, turn, words, numbers."""
    latest = torch.arange(1000, 1000 + SLOTS + 1, device=device)
    turn = torch.zeros(1, dtype=torch.int64, device=device)
    words = torch.full((3, MOST), -7, device=device)
    return latest, turn, words, torch.full((2, MOST), -7, dtype=torch.int32, device=device)


@pytest.mark.parametrize("words", [1, 63, 781, 5000])
def test_a_step_fetches_what_is_said_of_its_turn(device, words):
    said = pinned(torch.randint(-(1 << 62), 1 << 62, (TURNS, words)))
    memory = torch.full((words + 9,), -7, device=device)
    turn = torch.zeros(1, dtype=torch.int64, device=device)
    for step in range(2 * TURNS + 1):
        fetch(said, turn, memory[:words])
        assert turn.item() == step + 1
        assert torch.equal(memory[:words].cpu(), said[step % TURNS])
    assert (memory[words:] == -7).all()


@pytest.mark.parametrize("N", [1, 63, 70])
def test_a_step_takes_what_is_said_of_its_turn(device, host, N):
    latest, turn, words, numbers = memory(device)
    for step in range(2 * TURNS + 1):
        take(*host, latest, turn, words, numbers, N)
        assert turn.item() == step + 1
        said, slots = host[0][step % TURNS], host[1][step % TURNS, 0].tolist()
        ids = [1001 + slots[n] if id < 0 else id for n, id in enumerate(said[0].tolist())]
        assert words[0, :N].tolist() == ids[:N]
        assert torch.equal(words[1:, :N].cpu(), said[1:, :N])
        assert torch.equal(numbers[:, :N].cpu(), host[1][step % TURNS, :, :N])
        assert (words[:, N:] == -7).all() and (numbers[:, N:] == -7).all()
    assert latest.tolist() == list(range(1000, 1001 + SLOTS))


@pytest.mark.parametrize("N", [1, 63, 70])
def test_a_step_tells_what_it_drew_in_its_turn(device, host, N):
    latest, turn, words, numbers = memory(device)
    told = pinned(torch.full((TURNS, MOST), -7))
    expected, known = told.clone(), latest.tolist()
    for step in range(TURNS + 2):
        take(*host, latest, turn, words, numbers, N)
        ids = torch.randint(-1, 5, (N,), device=device)
        tell(ids, numbers, latest, turn, told)
        if device.type == "cuda":
            torch.cuda.synchronize()
        expected[step % TURNS, :N] = ids.cpu()
        for slot, id in zip(host[1][step % TURNS, 0].tolist(), ids.tolist(), strict=False):
            known[slot + 1] = max(id, 0)
        assert torch.equal(told, expected) and latest.tolist() == known


def test_padding_is_nobodys(device, host):
    latest, turn, words, numbers = memory(device)
    host[0][0, 0, :4] = torch.tensor([-1, 0, 0, -1])
    host[1][0, 0, :4] = torch.tensor([5, -1, -1, 8])
    take(*host, latest, turn, words, numbers, 4)
    assert words[0, :4].tolist() == [1006, 0, 0, 1009]
    told = pinned(torch.zeros(TURNS, MOST, dtype=torch.int64))
    tell(torch.tensor([1, 2, 2, 3], device=device), numbers, latest, turn, told)
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
