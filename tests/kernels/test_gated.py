"""silu, alone and as a gate, and products without it."""

import pytest
import torch

from kernels.gated import (
    mul,
    mul_reference,
    silu_,
    silu_mul,
    silu_mul_reference,
    silu_reference,
)
from tests.kernels.cases import error

BOUND = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 3e-3}


@pytest.mark.parametrize(("T", "D"), [(1, 1), (3, 100), (2, 2500)])
def test_silu_mul_of_two_halves(device, T, D, dtype):
    a, b = (3 * torch.randn(T, 2 * D, device=device)).to(dtype).chunk(2, dim=1)
    y = silu_mul(a, b)
    assert y.dtype == dtype and y.is_contiguous()
    assert error(y, silu_mul_reference(a, b)) <= BOUND[dtype]


@pytest.mark.parametrize(("T", "D"), [(1, 1), (3, 100), (2, 2500), (63, 257), (2, 5632)])
def test_mul_of_two_halves_rounds_once(device, T, D, dtype):
    a, b = (3 * torch.randn(T, 2 * D, device=device)).to(dtype).chunk(2, dim=1)
    y = mul(a, b)
    assert y.dtype == dtype and y.is_contiguous()
    assert torch.equal(y, mul_reference(a, b).to(dtype)) and torch.equal(y, a * b)


def test_mul_keeps_rows_apart(device, dtype):
    """Rows wider than what is multiplied, at unequal distances, and one that is no number."""
    a, b = (torch.full((5, wide), torch.nan, device=device).to(dtype) for wide in (1300, 1111))
    a, b = a[:, :1100], b[:, 11:]
    for x in (a, b):
        x.copy_(torch.randn(5, 1100, device=device))
    b[3] = torch.nan
    y = mul(a, b)
    want = mul_reference(a, b).to(dtype)
    assert y[3].isnan().all() and torch.equal(y[[0, 1, 2, 4]], want[[0, 1, 2, 4]])


@pytest.mark.parametrize("product", [silu_mul, mul])
def test_no_rows_at_all(device, product):
    a, b = torch.empty(0, 200, device=device).chunk(2, dim=1)
    assert product(a, b).shape == (0, 100)


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
