"""Rows as codes and scales: against their definition, piece by piece, and what is not finite."""

import pytest
import torch

from kernels import quantize
from kernels.quantize import LIMITS, Quantized, quantize_reference, quantize_rows, quantized
from tests.kernels.cases import error


@pytest.fixture(params=LIMITS, ids=str)
def codes(request, device, monkeypatch):
    """Other tests quantise by the torch path where this one is interpreted: the interpreter forgets
    the carry where rounding to fp8 makes a power of two."""
    if "triton" in request.node.name and device.type == "cpu":
        if request.param != torch.int8:
            pytest.skip("Triton's interpreter rounds wrongly to fp8")
        monkeypatch.setattr(quantize, "_torch", quantize._triton)
    return request.param


def rows(R, K, dtype, device):
    """Rows of sizes from 1e-6 to 1e6 that lie in a wider tensor."""
    sizes = 10.0 ** torch.linspace(-6, 6, R, device=device)[:, None]
    wide = torch.randn(R, K + 3, device=device) * sizes.clamp(max=1e4)
    return wide.to(dtype)[:, :K]


@pytest.mark.parametrize(("R", "K"), [(1, 1), (3, 63), (7, 100), (2, 781), (5, 5000)])
def test_codes_are_the_nearest(device, dtype, codes, R, K):
    x = rows(R, K, dtype, device)
    x[R // 2] = 0
    q = quantized(x, codes)
    exact, scales = quantize_reference(x, codes)
    assert q.codes.dtype == codes and q.scales.dtype == torch.float32
    assert error(q.scales, scales) <= 1e-6
    off = (q.codes.double() - exact).abs()
    if codes == torch.int8:
        assert off.max() <= 0.5 + 1e-4 and q.codes.int().abs().max() <= 127
    else:  # three bits of mantissa, of which half a unit; below 2^-6 units of 2^-9
        assert (off <= exact.abs().clamp(min=2.0**-6) * (2.0**-4 + 1e-5)).all()
    assert (q.codes[R // 2].float() == 0).all()


def test_ties_go_to_even(device, codes):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]], device=device)
    if codes == torch.int8:
        assert quantized(x, codes).codes.tolist() == [[127, 0, 2, 2, 0, -2, 126]]
    else:
        ties = torch.tensor([[448.0, 17.0, 19.0, -17.0, 1.0625, 1.1875]], device=device)
        codes_of = quantized(ties, codes).codes.float().tolist()
        assert codes_of == [[448.0, 16.0, 20.0, -16.0, 1.0, 1.25]]


def test_pieces_equal_the_whole(device, codes):
    """Parts of a matrix that are filled by themselves, from other dtypes too."""
    x = rows(100, 96, torch.bfloat16, device) if device.type == "cuda" else torch.randn(100, 96)
    whole = quantized(x, codes)
    parts = Quantized.empty((2, 50, 96), codes, device)
    parts[1].copy_(x[50:].double())
    first, second = parts[0].split([13, 37])
    second[5:].copy_(x[18:50].cpu())
    second[:5].copy_(x[13:18].float())
    first.copy_(x[:13])
    assert torch.equal(parts.codes.view(torch.uint8).view(100, 96), whole.codes.view(torch.uint8))
    assert torch.equal(parts.scales.view(100), whole.scales)


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_lost(device, codes, bad):
    x = torch.randn(3, 300, device=device)
    x[1, 200] = bad
    q = quantized(x, codes)
    assert q.scales.isfinite().tolist() == [True, False, True]
    assert error(q[::2].double(), x[::2]) < 0.05


def test_no_rows(device):
    codes, scales = torch.empty(0, 8, dtype=torch.int8, device=device), torch.empty(0)
    quantize_rows(torch.empty(0, 8, device=device), codes, scales.to(device))
