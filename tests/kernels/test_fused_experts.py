"""The kernels of a mixture, a row at a time and in tiles, on ugly shapes, against float64."""

import pytest
import torch

from kernels.experts import fused_moe, moe_reference
from kernels.quantize import Quantized
from kernels.tuning import MixtureTuning, ProductTuning
from tests.kernels.cases import error

ROW = ProductTuning(1, 16, 64, 4, 1)
ROW_STAGED = ProductTuning(1, 32, 32, 2, 3)
TILE = ProductTuning(16, 32, 32, 4, 3)
TUNINGS = {
    "rows": MixtureTuning(ROW, ROW_STAGED),
    "rows-then-tiles": MixtureTuning(ROW_STAGED, TILE),
    "tiles-then-rows": MixtureTuning(TILE, ROW),
    "tiles": MixtureTuning(TILE, ProductTuning(64, 64, 32, 4, 2)),
    "large-tiles": MixtureTuning(
        ProductTuning(64, 64, 64, 4, 3), ProductTuning(128, 128, 64, 8, 3)
    ),
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
@pytest.mark.parametrize(
    ("T", "E", "K", "D", "width"), [(1, 8, 2, 64, 32), (3, 60, 8, 33, 19), (23, 2, 1, 72, 40)]
)
def test_mixture(device, dtype, name, T, E, K, D, width):
    x = torch.randn(T, D, device=device).to(dtype)
    check(x, *mixture(E, D, width, dtype, device), *routed(T, E, K, device), TUNINGS[name])


@pytest.mark.parametrize(
    ("name", "T", "E", "K"),
    [
        ("rows", 63, 8, 2),
        ("tiles", 63, 8, 2),
        ("large-tiles", 9, 256, 8),
        ("tiles", 257, 8, 2),
        ("large-tiles", 257, 1, 1),
    ],
)
def test_many_rows(device, name, T, E, K):
    x = torch.randn(T, 32, device=device)
    check(x, *mixture(E, 32, 16, torch.float32, device), *routed(T, E, K, device), TUNINGS[name])


@pytest.mark.parametrize("name", TUNINGS)
def test_all_rows_to_one_expert(device, name):
    """The others have none. Then every second row to the first, and the rest to the last."""
    x = torch.randn(36, 32, device=device)
    weights = mixture(9, 32, 16, torch.float32, device)
    for ids in ([4] * 36, [0, 8] * 18):
        ids = torch.tensor(ids, device=device)[:, None]
        check(x, *weights, ids, torch.rand(36, 1, device=device), TUNINGS[name])


@pytest.mark.parametrize("name", TUNINGS)
def test_int8(device, name):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(11, 72, device=device).to(dtype)
    small = []
    for w in mixture(5, 72, 40, dtype, device):
        w = w * torch.linspace(0.5, 2, w.shape[1], device=device)[:, None]
        q = Quantized.empty(tuple(w.shape), torch.int8, w.device)
        for e, matrix in enumerate(w):
            q[e].copy_(matrix)
        small.append(q)
    check(x, *small, *routed(11, 5, 3, device), TUNINGS[name])


@pytest.mark.parametrize("name", TUNINGS)
def test_a_row_does_not_depend_on_its_company(device, name):
    """Bit for bit on a GPU, alone or among others; NaN in a row or in its weight stays there."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(20, 40, device=device).to(dtype)
    weights, (ids, shares) = mixture(6, 40, 24, dtype, device), routed(20, 6, 2, device)
    y = fused_moe(x, *weights, ids, shares, TUNINGS[name])
    for t in (0, 7, 19):
        one = slice(t, t + 1)
        alone = fused_moe(x[one], *weights, ids[one], shares[one], TUNINGS[name])
        assert error(alone, y[one]) <= (0 if device.type == "cuda" else 1e-6)
    x[7], x[10:12], shares[15, 0] = torch.nan, torch.inf, torch.nan
    broken = fused_moe(x, *weights, ids, shares, TUNINGS[name])
    bad = torch.zeros(20, dtype=torch.bool, device=device)
    bad[7], bad[10:12], bad[15] = True, True, True
    assert broken[bad].isnan().all()
    assert torch.equal(broken[~bad], y[~bad])


@pytest.mark.parametrize("name", ["rows", "tiles"])
def test_rows_of_any_distance_beside_nan(device, name):
    wide = torch.full((20, 100), torch.nan, device=device)
    wide[:, 11:51] = torch.randn(20, 40, device=device)
    weights = mixture(6, 40, 24, torch.float32, device)
    check(wide[:, 11:51], *weights, *routed(20, 6, 2, device), TUNINGS[name])
