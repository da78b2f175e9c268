"""RMSNorm and what is fused with it."""

import pytest
import torch

from kernels import residual_rmsnorm as module
from kernels.join import Parts, join
from kernels.residual_rmsnorm import add_rmsnorm_, residual_rmsnorm, residual_rmsnorm_reference
from kernels.rmsnorm import rmsnorm, rmsnorm_reference
from kernels.rmsnorm_gate import rmsnorm_gate, rmsnorm_gate_reference
from tests.kernels.cases import error

# one number of bfloat16 is off by up to 2^-8 of itself
BOUND = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 4e-3}
WIDTHS = pytest.mark.parametrize(("T", "D"), [(1, 1), (3, 100), (7, 781), (2, 3072)])


def rows(T, D, dtype, device):
    """[T, D] as the middle columns of a wider tensor."""
    return torch.randn(T, D + 24, device=device).to(dtype)[:, 8 : D + 8]


@WIDTHS
def test_rmsnorm(device, T, D, dtype):
    x = rows(T, D, dtype, device)
    weight = torch.randn(D, device=device).to(dtype)
    y = rmsnorm(x, weight, 1e-5)
    assert y.dtype == dtype and y.is_contiguous()
    assert error(y, rmsnorm_reference(x, weight, 1e-5)) <= BOUND[dtype]
    y = rmsnorm(x, None, 1e-5, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    assert error(y, rmsnorm_reference(x, None, 1e-5)) <= 2e-6


def test_rmsnorm_of_each_head(device, dtype):
    q, _ = torch.randn(5, 3, 2, 48, device=device).to(dtype).unbind(2)
    weight = torch.randn(48, device=device).to(dtype)
    assert error(rmsnorm(q, weight, 1e-6), rmsnorm_reference(q, weight, 1e-6)) <= BOUND[dtype]


def test_rmsnorm_of_zeros(device):
    assert (rmsnorm(torch.zeros(2, 8, device=device), None, 1e-6) == 0).all()


@WIDTHS
def test_residual_rmsnorm(device, T, D, dtype):
    x, f = rows(T, D, dtype, device), rows(T, D, dtype, device)
    weight = torch.randn(D, device=device).to(dtype)
    expected = residual_rmsnorm_reference(x, f, 3.5, 0.7, weight, 1e-5)
    y = residual_rmsnorm(x, f, 3.5, 0.7, weight, 1e-5)
    assert y.dtype == dtype and y.is_contiguous()
    assert error(y, expected) <= BOUND[dtype]
    y = residual_rmsnorm(x, f, 3.5, 0.7, weight, 1e-5, out_dtype=torch.float32)
    assert y.dtype == torch.float32
    assert error(y, expected) <= 2e-6


def ours_serve(device):
    """Whether the kernel computes: PyTorch's sums depend on how many there are."""
    return device.type == "cuda" or module._torch is module._triton


@pytest.mark.parametrize(
    ("T", "D", "K"), [(1, 100, 1), (3, 64, 2), (63, 64, 4), (5, 781, 8), (2, 2048, 2)]
)
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_parts_are_added_up_on_the_way(device, T, D, K, placed, keep, dtype):
    """As by join before, bit for bit but for what compilers make of two kernels; and a row alone as
    among others."""
    x, z = rows(T, D, dtype, device), torch.randn(T * K, D, device=device).to(dtype)
    shares, weight = torch.rand(T, K, device=device), torch.randn(D, device=device).to(dtype)
    parts = Parts(z, shares, torch.randperm(T * K, device=device) if placed else None)

    def normed(x, f):
        x = torch.stack(x.unbind())  # a clone of one row would keep its distance from the next
        if keep:
            return add_rmsnorm_(x, f, weight, 1e-5), x
        return residual_rmsnorm(x, f, 3.5, 0.7, weight, 1e-5), x

    found = normed(x, parts)
    for ours, theirs in zip(found, normed(x, join(parts)), strict=True):
        assert error(ours, theirs) <= (BOUND[dtype] if device.type == "cuda" else 0)
    for t in {0, T // 2, T - 1}:
        where = parts.place[t * K : t * K + K] if placed else slice(t * K, t * K + K)
        alone = normed(x[t : t + 1], Parts(z[where].clone(), shares[t : t + 1].clone()))
        for ours, theirs in zip(alone, found, strict=True):
            same = ours_serve(device) and not (placed and device.type == "cuda")
            assert error(ours, theirs[t : t + 1]) <= (0 if same else BOUND[dtype])


@WIDTHS
def test_rmsnorm_gate(device, T, D, dtype):
    o, gate = rows(T, D, dtype, device), rows(T, D, dtype, device)
    weight = torch.randn(D, device=device).to(dtype)
    y = rmsnorm_gate(o, gate, weight, 1e-6)
    assert y.dtype == dtype and y.is_contiguous()
    assert error(y, rmsnorm_gate_reference(o, gate, weight, 1e-6)) <= BOUND[dtype]


@WIDTHS
@pytest.mark.parametrize("weighted", [True, False])
def test_add_rmsnorm_keeps_the_sum(device, T, D, dtype, weighted):
    wide = torch.randn(T, D + 24, device=device).to(dtype)
    before, f = wide.clone(), rows(T, D, dtype, device)
    x = wide[:, 8 : D + 8]
    weight = torch.randn(D, device=device).to(dtype) if weighted else None
    total = before[:, 8 : D + 8].double() + f.double()
    expected = residual_rmsnorm_reference(before[:, 8 : D + 8], f, 1.0, 1.0, weight, 1e-6)
    y = add_rmsnorm_(x, f, weight, 1e-6)
    assert y.dtype == dtype and y.is_contiguous()
    assert error(y, expected) <= BOUND[dtype]
    assert error(x, total) <= BOUND[dtype]
    assert torch.equal(wide[:, :8], before[:, :8])
    assert torch.equal(wide[:, D + 8 :], before[:, D + 8 :])


@pytest.mark.parametrize(("T", "D", "groups"), [(3, 100, 4), (7, 781, 1), (2, 2048, 4), (5, 96, 8)])
@pytest.mark.parametrize(("weighted", "sigmoid"), [(True, True), (False, False)])
def test_rmsnorm_gate_of_groups(device, T, D, groups, weighted, sigmoid, dtype):
    o, gate = rows(T, D, dtype, device), rows(T, D, dtype, device)
    o *= torch.linspace(1, 9, D, device=device).to(dtype)  # groups of unequal size
    weight = torch.randn(D, device=device).to(dtype) if weighted else None
    options = {"groups": groups, "sigmoid": sigmoid}
    y = rmsnorm_gate(o, gate, weight, 1e-6, **options)
    assert y.dtype == dtype and y.is_contiguous()
    assert error(y, rmsnorm_gate_reference(o, gate, weight, 1e-6, **options)) <= BOUND[dtype]
