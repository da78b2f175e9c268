"""Rows of experts joined into those of tokens."""

import pytest
import torch

from kernels.join import Parts, join, join_reference
from tests.kernels.cases import error

BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@pytest.mark.parametrize(("T", "K", "D"), [(0, 2, 8), (1, 1, 1), (3, 2, 63), (70, 8, 1500)])
@pytest.mark.parametrize("placed", [False, True])
def test_join(device, dtype, T, K, D, placed):
    z = torch.randn(T * K, D, device=device).to(dtype)
    weights = torch.rand(T, K, device=device)
    place = torch.randperm(T * K, device=device) if placed else None
    parts = Parts(z, weights, place)
    y = join(parts)
    assert y.dtype == dtype and y.shape == parts.shape == (T, D)
    assert T == 0 or error(y, join_reference(parts)) <= BOUND[dtype]
    assert join(y) is y


def test_what_is_no_number_stays_in_its_token(device):
    z = torch.ones(6, 5, device=device)
    z[3] = torch.nan
    place = torch.tensor([0, 1, 2, 3, 4, 5], device=device)
    y = join(Parts(z, torch.ones(3, 2, device=device), place))
    assert y[1].isnan().all() and (y[[0, 2]] == 2).all()
