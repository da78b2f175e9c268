"""Rotary positions."""

import math

import pytest
import torch

from kernels.rotary import norm_rotary, rotary, rotary_angles, rotary_reference
from tests.kernels.cases import error

BOUND = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 3e-3}


def frequencies(half, device="cpu"):
    return 10_000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)


@pytest.mark.parametrize(("H", "d", "r"), [(1, 16, 16), (3, 96, 64), (5, 64, 2), (2, 128, 128)])
def test_partial_and_whole(device, H, d, r, dtype):
    positions = torch.tensor([0, 1, 63, 1000, 4_000_000], device=device)
    cos, sin = rotary_angles(positions, frequencies(r // 2, device))
    x, _ = torch.randn(5, 2 * H, d, device=device).to(dtype).split(H, dim=1)
    y = rotary(x, cos, sin)
    assert y.dtype == dtype and y.is_contiguous()
    assert error(y, rotary_reference(x, cos, sin)) <= BOUND[dtype]
    assert torch.equal(y[..., r:], x[..., r:])
    assert torch.equal(y[0], x[0])  # position 0 does not turn


@pytest.mark.parametrize(("H", "d", "r"), [(1, 16, 16), (3, 96, 64), (5, 64, 2), (33, 128, 64)])
def test_with_a_norm_of_each_head(device, H, d, r, dtype):
    positions = torch.tensor([0, 1, 63, 1000, 4_000_000], device=device)
    cos, sin = rotary_angles(positions, frequencies(r // 2, device))
    x, _ = torch.randn(5, 2 * H, d, device=device).to(dtype).split(H, dim=1)
    x *= torch.linspace(0.5, 9, H, device=device)[:, None].to(dtype)  # heads of unequal size
    weight = (torch.rand(d, device=device) + 0.5).to(dtype)
    y = norm_rotary(x, cos, sin, weight, 1e-6)
    assert y.dtype == dtype and y.is_contiguous()
    assert error(y, rotary_reference(x, cos, sin, weight, 1e-6)) <= BOUND[dtype]


def test_angles_are_right_at_millions():
    position = 3_999_999
    cos, sin = rotary_angles(torch.tensor([position]), frequencies(8))
    for i, frequency in enumerate(frequencies(8).tolist()):
        assert cos[0, i].item() == pytest.approx(math.cos(position * frequency), abs=1e-6)
        assert sin[0, i].item() == pytest.approx(math.sin(position * frequency), abs=1e-6)
