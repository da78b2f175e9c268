"""Rows by expert, against a stable sort of Python's."""

import pytest
import torch

from kernels import sorting
from kernels.sorting import by_expert, by_expert_reference

SHAPES = [(1, 1), (1, 8), (2, 256), (63, 2), (100, 60), (257, 8), (781, 60), (800, 256), (4096, 8)]


@pytest.mark.parametrize(("R", "E"), SHAPES)
def test_orders(device, R, E):
    ids = torch.randint(0, E, (R,), device=device, dtype=torch.int32)
    for each in (ids, torch.full_like(ids.long(), E - 1)):
        order, ends = by_expert(each, E)
        want_order, want_ends = by_expert_reference(each, E)
        assert order.tolist() == want_order and ends.tolist() == want_ends
        assert ends.dtype == torch.int32


def test_more_than_a_program_holds(device):
    ids = torch.randint(0, 3, (sorting.MOST + 1,), device=device)
    order, ends = by_expert(ids, 3)
    assert (order.tolist(), ends.tolist()) == by_expert_reference(ids, 3)


def test_none(device):
    order, ends = by_expert(torch.empty(0, dtype=torch.int64, device=device), 5)
    assert order.shape == (0,) and ends.tolist() == [0] * 5
