"""silu, alone and as a gate."""

import pytest
import torch

from kernels.gated import silu_, silu_mul, silu_mul_reference, silu_reference
from tests.kernels.cases import error

BOUND = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 3e-3}


@pytest.mark.parametrize(("T", "D"), [(1, 1), (3, 100), (2, 2500)])
def test_silu_mul_of_two_halves(device, T, D, dtype):
    a, b = (3 * torch.randn(T, 2 * D, device=device)).to(dtype).chunk(2, dim=1)
    y = silu_mul(a, b)
    assert y.dtype == dtype and y.is_contiguous()
    assert error(y, silu_mul_reference(a, b)) <= BOUND[dtype]


def test_silu_in_place_leaves_the_neighbours_alone(device, dtype):
    wide = (3 * torch.randn(5, 1300, device=device)).to(dtype)
    before = wide.clone()
    x = wide[:, :1100]
    assert silu_(x) is x
    assert error(wide[:, :1100], silu_reference(before[:, :1100])) <= BOUND[dtype]
    assert torch.equal(wide[:, 1100:], before[:, 1100:])


def test_silu_far_from_zero(device):
    x = torch.tensor([[-200.0, 200.0]], device=device)
    assert silu_(x).tolist() == [[0.0, 200.0]]
