"""The kernels of a mixture, a row at a time and in tiles, on ugly shapes, against float64."""

import pytest
import torch

from kernels.experts import fused_moe, moe_reference
from kernels.quantize import Quantized
from kernels.tuning import MixtureTuning, ProductTuning
from tests.kernels.cases import error

ROW = ProductTuning(1, 4, 64, 4, 1)
ROW_STAGED = ProductTuning(1, 8, 32, 2, 3)
TILE = ProductTuning(16, 32, 32, 4, 3)
TUNINGS = {
    "rows": MixtureTuning(ROW, ROW_STAGED),
    "rows-then-tiles": MixtureTuning(ROW_STAGED, TILE),
    "tiles-then-rows": MixtureTuning(TILE, ROW),
    "tiles": MixtureTuning(TILE, ProductTuning(64, 64, 32, 4, 2)),
    "large-tiles": MixtureTuning(ProductTuning(64, 64, 64, 4, 3), ProductTuning(128, 128, 64, 8, 3)),
}
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture
def device():
    """The GPU, or the interpreter's CPU: there is no path but Triton's here."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float32, "half"], ids=str)
def dtype(request, device):
    """float16 stands in where the interpreter is at a loss: it multiplies no bfloat16."""
    if request.param == "half":
        return torch.bfloat16 if device.type == "cuda" else torch.float16
    return request.param


def mixture(E, D, width, dtype, device):
    gate_up = torch.randn(E, 2 * width, D, device=device) * D**-0.5
    down = torch.randn(E, D, width, device=device) * width**-0.5
    return gate_up.to(dtype), down.to(dtype)


def routed(T, E, K, device):
    """Different experts for each token, and weights that do not add up to 1."""
    ids = torch.rand(T, E, device=device).topk(K, dim=1).indices.int()
    return ids, torch.rand(T, K, device=device)


def check(x, gate_up, down, ids, weights, tuning):
    y = fused_moe(x, gate_up, down, ids, weights, tuning)
    assert y.dtype == x.dtype
    assert error(y, moe_reference(x, gate_up, down, ids, weights)) <= BOUND[x.dtype]
    assert torch.equal(y, fused_moe(x, gate_up, down, ids, weights, tuning))


@pytest.mark.parametrize("name", TUNINGS)
@pytest.mark.parametrize(("D", "width"), [(64, 32), (72, 40), (33, 19)])
@pytest.mark.parametrize(("T", "E", "K"), [(1, 8, 2), (3, 60, 8), (23, 2, 1)])
def test_mixture(device, dtype, name, D, width, T, E, K):
    x = torch.randn(T, D, device=device).to(dtype)
    check(x, *mixture(E, D, width, dtype, device), *routed(T, E, K, device), TUNINGS[name])


@pytest.mark.parametrize("name", ["tiles", "rows"])
@pytest.mark.parametrize(("T", "E", "K"), [(63, 8, 2), (100, 256, 8), (257, 8, 2), (257, 1, 1)])
def test_many_rows(device, name, T, E, K):
    if device.type == "cpu" and name == "rows" and T * K > 126:
        pytest.skip("slow when interpreted")
    x = torch.randn(T, 32, device=device)
    check(x, *mixture(E, 32, 16, torch.float32, device), *routed(T, E, K, device), TUNINGS[name])


@pytest.mark.parametrize("name", TUNINGS)
def test_all_rows_to_one_expert(device, dtype, name):
    """The others have none. Then every second row to the first, and the rest to the last."""
    x = torch.randn(70, 32, device=device).to(dtype)
    weights = mixture(9, 32, 16, dtype, device)
    for ids in ([4] * 70, [0, 8] * 35):
        ids = torch.tensor(ids, device=device)[:, None]
        check(x, *weights, ids, torch.rand(70, 1, device=device), TUNINGS[name])


@pytest.mark.parametrize("name", TUNINGS)
def test_int8(device, name):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(23, 72, device=device).to(dtype)
    small = []
    for w in mixture(5, 72, 40, dtype, device):
        w = w * torch.linspace(0.5, 2, w.shape[1], device=device)[:, None]
        q = Quantized.empty(tuple(w.shape), torch.int8, w.device)
        for e, matrix in enumerate(w):
            q[e].copy_(matrix)
        small.append(q)
    check(x, *small, *routed(23, 5, 3, device), TUNINGS[name])


@pytest.mark.parametrize("name", TUNINGS)
def test_a_row_does_not_depend_on_its_company(device, dtype, name):
    """Bit for bit, alone or among others; and NaN in a row stays there, as one in its weight does."""
    x = torch.randn(40, 40, device=device).to(dtype)
    weights, (ids, shares) = mixture(6, 40, 24, dtype, device), routed(40, 6, 2, device)
    y = fused_moe(x, *weights, ids, shares, TUNINGS[name])
    for t in (0, 17, 39):
        one = slice(t, t + 1)
        alone = fused_moe(x[one], *weights, ids[one], shares[one], TUNINGS[name])
        assert torch.equal(alone, y[one])
    x[7], x[20:24], shares[30] = torch.nan, torch.inf, torch.nan
    broken = fused_moe(x, *weights, ids, shares, TUNINGS[name])
    bad = torch.zeros(40, dtype=torch.bool, device=device)
    bad[7], bad[20:24], bad[30] = True, True, True
    assert broken[bad].isnan().all()
    assert torch.equal(broken[~bad], y[~bad])


@pytest.mark.parametrize("name", ["rows", "tiles"])
def test_rows_of_any_distance_beside_nan(device, name):
    wide = torch.full((20, 100), torch.nan, device=device)
    wide[:, 11:51] = torch.randn(20, 40, device=device)
    weights = mixture(6, 40, 24, torch.float32, device)
    check(wide[:, 11:51], *weights, *routed(20, 6, 2, device), TUNINGS[name])
