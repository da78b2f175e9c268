"""Linear layers of every kind of weight, by every way that a product takes."""

import pytest
import torch

from kernels import linear as module
from kernels.linear import linear, linear_reference
from kernels.quantize import LIMITS, quantized
from tests.kernels.cases import PRODUCTS, error, product_bound

KINDS = pytest.mark.parametrize("codes", [None, *LIMITS], ids=str)


@KINDS
@pytest.mark.parametrize(("T", "N", "K"), [(0, 8, 8), (1, 96, 64), (63, 50, 63), (70, 32, 64)])
def test_linear(device, codes, dtype, T, N, K):
    x = torch.randn(T, K, device=device).to(dtype)
    w = torch.randn(N, K, device=device).to(dtype)
    w = w if codes is None else quantized(w, codes)
    y = linear(x, w)
    assert y.dtype == dtype and y.shape == (T, N)
    assert T == 0 or error(y, linear_reference(x, w)) <= product_bound(dtype, codes, device)


@pytest.mark.parametrize("codes", LIMITS, ids=str)
def test_quantised_is_close_to_what_it_stands_for(device, codes):
    """int8 of normal numbers is about 1 % off, fp8 2.6 % in each factor."""
    x, w = torch.randn(20, 2048, device=device), torch.randn(60, 2048, device=device)
    off = error(linear(x, quantized(w, codes)), x.double() @ w.double().t())
    low, high = (0.004, 0.012) if codes == torch.int8 else (0.02, 0.05)
    assert low < off < high


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the CPU has one way")
@pytest.mark.parametrize("codes", LIMITS, ids=str)
@pytest.mark.parametrize("T", [1, 63, 257, module.ROWS - 1, module.ROWS, 781])
def test_ways_of_the_gpu(codes, T):
    """Few rows and many; sides that PyTorch's product of fp8 takes, and that it does not."""
    for N, K in ((256, 128), (250, 120)):
        x = torch.randn(T, K, device="cuda", dtype=torch.bfloat16)
        w = quantized(torch.randn(N, K, device="cuda"), codes)
        assert error(linear(x, w), linear_reference(x, w)) <= PRODUCTS[x.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_some_outputs_at_a_time(dtype, monkeypatch):
    """What many rows of int8 take on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(40, 48, device=device).to(dtype)
    w = quantized(torch.randn(700, 48, device=device), torch.int8)
    monkeypatch.setattr(module, "SLICE", 48 * 300)
    assert error(module._sliced(x, w), linear_reference(x, w)) <= PRODUCTS[dtype]
