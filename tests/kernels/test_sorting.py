"""Rows by expert, against a stable sort of Python's."""

import pytest
import torch

from kernels import sorting
from kernels.sorting import by_expert, by_expert_reference


@pytest.mark.parametrize("R", [1, 2, 63, 100, 257, 781, 4096])
@pytest.mark.parametrize("E", [1, 2, 8, 60, 256])
def test_orders(device, R, E):
    if E > 8 and R > 781 and device.type == "cpu":
        pytest.skip("slow when interpreted")
    ids = torch.randint(0, E, (R,), device=device, dtype=torch.int32)
    for each in (ids, ids.long(), torch.full_like(ids, E - 1), torch.zeros_like(ids)):
        order, ends = by_expert(each, E, counted=True)
        want_order, want_ends = by_expert_reference(each, E)
        assert order.tolist() == want_order and ends.tolist() == want_ends
        assert ends.dtype == torch.int32


def test_more_than_a_program_holds(device):
    ids = torch.randint(0, 3, (sorting.MOST + 1,), device=device)
    order, ends = by_expert(ids, 3, counted=True)
    assert (order.tolist(), ends.tolist()) == by_expert_reference(ids, 3)


def test_none(device):
    order, ends = by_expert(torch.empty(0, dtype=torch.int64, device=device), 5, counted=True)
    assert order.shape == (0,) and ends.tolist() == [0] * 5
