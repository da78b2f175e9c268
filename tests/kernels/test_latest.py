"""Ids that sequences drew last."""

import pytest
import torch

from kernels.latest import remember, resolved


@pytest.mark.parametrize("N", [0, 1, 63, 128, 257])
def test_ids_below_zero_are_those_drawn_last(device, N):
    S = 300
    known = torch.randint(0, 1 << 40, (S,), device=device)
    rows = torch.randperm(S, device=device)[:N]
    ids = torch.where(torch.rand(N, device=device) < 0.5, -1, torch.arange(N, device=device))
    before = known.clone()
    expected = [
        int(before[row]) if id < 0 else id
        for id, row in zip(ids.tolist(), rows.tolist(), strict=True)
    ]
    assert resolved(ids, rows, known).tolist() == expected
    assert torch.equal(known, before)


@pytest.mark.parametrize("N", [0, 1, 63, 128, 257])
def test_what_is_drawn_is_remembered(device, N):
    S = 300
    known = torch.randint(0, 1 << 40, (S,), device=device)
    rows = torch.randperm(S, device=device)[:N]
    ids = torch.randint(-1, 3, (N,), device=device)
    expected = known.tolist()
    for id, row in zip(ids.tolist(), rows.tolist(), strict=True):
        expected[row] = max(id, 0)
    remember(ids, rows, known)
    assert known.tolist() == expected


def test_a_part_of_more(device):
    """Views that begin anywhere, and padding: many rows that are one."""
    known = torch.arange(10, 20, device=device)
    ids = torch.tensor([9, -1, -1, 5, 7, 8], device=device)
    rows = torch.tensor([9, 2, 3, 0, 0, 0], device=device)
    assert resolved(ids[1:4], rows[1:4], known).tolist() == [12, 13, 5]
    remember(ids[3:], rows[3:], known)
    assert known[0] in (5, 7, 8) and known[1:].tolist() == list(range(11, 20))
