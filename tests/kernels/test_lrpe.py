"""LRPE: learned angles, positions in the millions, q and k together."""

import math

import pytest
import torch

from kernels.lrpe import lrpe, lrpe_reference
from tests.kernels.cases import error

BOUND = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 3e-3}


@pytest.mark.parametrize(("H", "d", "groups"), [(1, 16, 1), (5, 24, 2), (20, 128, 2), (3, 96, 3)])
def test_heads_and_groups(device, H, d, groups, dtype):
    positions = torch.tensor([0, 1, 63, 1000, 4_000_000], device=device)
    theta = torch.rand(H, d, device=device)
    x, _ = torch.randn(5, 2 * groups * H, d, device=device).to(dtype).chunk(2, dim=1)
    y = lrpe(x, theta, positions)
    assert y.dtype == dtype and y.is_contiguous()
    assert error(y, lrpe_reference(x, theta, positions)) <= BOUND[dtype]
    assert torch.equal(y[0, :, :d], x[0]) and (y[0, :, d:] == 0).all()  # position 0 does not turn


def test_angles_are_right_at_millions(device):
    position = 3_999_999
    theta = torch.tensor([[1.0, 0.7, 1e-3, 0.0]], device=device)
    ones = torch.ones(1, 1, 4, device=device)
    y = lrpe(ones, theta, torch.tensor([position], device=device))[0, 0].tolist()
    for i, angle in enumerate(theta[0].double().tolist()):
        assert y[i] == pytest.approx(math.cos(position * angle), abs=1e-6)
        assert y[4 + i] == pytest.approx(math.sin(position * angle), abs=1e-6)
