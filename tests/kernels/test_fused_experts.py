"""The kernels of a mixture, a row at a time and in tiles, on ugly shapes, against float64."""

from dataclasses import astuple

import pytest
import torch

from kernels import experts, routing, tuning
from kernels.experts import moe, moe_reference
from kernels.join import join
from kernels.quantize import Quantized
from kernels.routing import Choice, route_reference
from kernels.tuning import MixtureTuning, ProductTuning, RouteTuning
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
    "bulk": MixtureTuning(
        ProductTuning(32, 32, 32, 4, 3, True), ProductTuning(64, 64, 32, 4, 3, True)
    ),
}
BOUND = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture
def device():
    """The GPU, or the interpreter's CPU: there is no path but Triton's here."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fused_moe(*args):
    """With the rows of a token's experts added up."""
    return join(experts.fused_moe(*args))


def usual(device, stand_in=torch.float32):
    """What the kernels serve, and what stands in where the interpreter is at a loss."""
    return torch.bfloat16 if device.type == "cuda" else stand_in


def mixture(E, D, width, dtype, device):
    gate_up = torch.randn(E, 2 * width, D, device=device) * D**-0.5
    down = torch.randn(E, D, width, device=device) * width**-0.5
    return gate_up.to(dtype), down.to(dtype)


def routed(T, E, K, device):
    """Different experts for each token, and weights that do not add up to 1."""
    ids = torch.rand(T, E, device=device).topk(K, dim=1).indices.int()
    return ids, torch.rand(T, K, device=device)


def check(x, gate_up, down, ids, weights, how):
    y = fused_moe(x, gate_up, down, ids, weights, how)
    assert y.dtype == x.dtype
    assert error(y, moe_reference(x, gate_up, down, ids, weights)) <= BOUND[x.dtype]
    if y.is_cuda:  # one program after another is the same again whatever they do
        assert torch.equal(y, fused_moe(x, gate_up, down, ids, weights, how))


@pytest.mark.parametrize("name", TUNINGS)
@pytest.mark.parametrize(
    ("T", "E", "K", "D", "width", "whole"),
    [(1, 8, 2, 64, 32, True), (3, 60, 8, 33, 19, False), (17, 2, 1, 72, 40, True)],
)
def test_mixture(device, name, T, E, K, D, width, whole):
    dtype = usual(device, torch.float32 if whole else torch.float16)
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
        ("bulk", 257, 8, 2),
    ],
)
def test_many_rows(device, name, T, E, K):
    x = torch.randn(T, 32, device=device).to(usual(device))
    check(x, *mixture(E, 32, 16, x.dtype, device), *routed(T, E, K, device), TUNINGS[name])


@pytest.mark.parametrize("name", TUNINGS)
def test_all_rows_to_one_expert(device, name):
    """The others have none. Then every second row to the first, and the rest to the last."""
    x = torch.randn(36, 32, device=device).to(usual(device))
    weights = mixture(9, 32, 16, x.dtype, device)
    for ids in ([4] * 36, [0, 8] * 18):
        ids = torch.tensor(ids, device=device)[:, None]
        check(x, *weights, ids, torch.rand(36, 1, device=device), TUNINGS[name])


TILES = [
    ProductTuning(128, 64, 32, 4, 3),
    ProductTuning(128, 128, 32, 8, 4, True),
]
TILES += [
    ProductTuning(64, 64, 32, 4, 4),
    ProductTuning(128, 128, 32, 8, 4),
    ProductTuning(256, 64, 32, 8, 3),
    ProductTuning(64, 64, 32, 4, 4, True),
    ProductTuning(256, 64, 32, 8, 3, True),
] * torch.cuda.is_available()  # long for the interpreter


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "x".join(map(str, astuple(tile))))
@pytest.mark.parametrize("D", [64, 40])
def test_tiles_that_are_full_or_hold_half_or_one_more(device, tile, D):
    """Tiles of half as many rows take the place of those that are half empty: bit for bit on a GPU
    a row's sums are the same in either, and NaN beside a tile's rows stays there."""
    counts = [0, tile.rows, tile.rows + 1, tile.rows // 2, 0, tile.rows // 2 + 1, 1, 0]
    ids = torch.arange(8).repeat_interleave(torch.tensor(counts))
    ids = ids[torch.randperm(len(ids)).cpu()].to(device)[:, None]
    x = torch.randn(len(ids), D, device=device).to(usual(device))
    weights, shares = mixture(8, D, 24, x.dtype, device), torch.rand(len(ids), 1, device=device)
    how = MixtureTuning(tile, tile)
    check(x, *weights, ids, shares, how)
    y = fused_moe(x, *weights, ids, shares, how)
    for e in (2, 5):
        some = (ids[:, 0] == e).nonzero()[: tile.rows // 2 - 3, 0]
        alone = fused_moe(x[some], *weights, ids[some], shares[some], how)
        assert error(alone, y[some]) <= (0 if device.type == "cuda" else 1e-6)
    x[ids[:, 0] != 2] = torch.nan
    assert torch.equal(fused_moe(x, *weights, ids, shares, how)[ids[:, 0] == 2], y[ids[:, 0] == 2])


@pytest.mark.parametrize("name", TUNINGS)
def test_int8(device, name):
    dtype = usual(device)
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
    dtype = usual(device)
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
    wide = torch.full((20, 100), torch.nan, device=device, dtype=usual(device))
    wide[:, 11:51] = torch.randn(20, 40, device=device)
    weights = mixture(6, 40, 24, wide.dtype, device)
    check(wide[:, 11:51], *weights, *routed(20, 6, 2, device), TUNINGS[name])


class OnCard:
    """What `_tuning` looks at of rows on a card."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, dtype=torch.bfloat16):
        self.dtype = dtype


def test_kernels_serve_where_they_were_measured_faster(monkeypatch):
    """By weights, rows and experts; never where rows would have to be quantised, nor in float32."""
    row = {"outputs": 4, "inputs": 512, "warps": 4, "stages": 1}
    up, down = {"rows": 1, **row}, {"rows": 16, **row}
    table = {"2x16x8": {"up": up, "down": down}, "2x32x8": None, "1x16x8": {"up": up, "down": up}}
    monkeypatch.setattr(tuning, "measured", lambda capability: {"moe": table})
    monkeypatch.setattr(tuning, "card", lambda device: (9, 0))
    tuning.mixture_tuning.cache_clear()
    w = torch.empty(8, 4, 2, dtype=torch.bfloat16)
    int8 = Quantized.empty((8, 4, 2), torch.int8, w.device)
    fp8 = Quantized.empty((8, 4, 2), torch.float8_e4m3fn, w.device)
    whole = MixtureTuning(ProductTuning(**up), ProductTuning(**down))
    assert experts._tuning(OnCard(), w, 16) == experts._tuning(OnCard(), w, 9) == whole
    assert experts._tuning(OnCard(), int8, 12) == MixtureTuning(whole.up, whole.up)
    nothing = [(w, 17), (w, 8), (w, 33), (w, 0), (w[:4], 16), (int8, 17), (fp8, 16)]
    assert all(experts._tuning(OnCard(), each, rows) is None for each, rows in nothing)
    assert experts._tuning(OnCard(torch.float32), w, 16) is None
    assert experts._tuning(torch.empty(8, 2, dtype=torch.bfloat16), w, 16) is None
    tuning.mixture_tuning.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
@pytest.mark.parametrize("name", TUNINGS)
def test_a_captured_mixture_follows_its_tokens(name, monkeypatch):
    """Router, choice, sort and products in a graph that is replayed with other tokens, and NaN."""
    monkeypatch.setattr(routing, "route_tuning", lambda device, E: RouteTuning(4, True))
    monkeypatch.setattr(experts, "mixture_tuning", lambda *_: TUNINGS[name])
    device, dtype = torch.device("cuda"), torch.bfloat16
    weights, router = mixture(8, 64, 32, dtype, device), torch.randn(8, 64, device=device)
    h = torch.zeros(24, 64, device=device, dtype=dtype)

    def step():
        return join(moe(h, *weights, *routing.route(h, router, None, Choice(2))))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for rows in (24, 5):
        h.fill_(torch.nan)
        h[:rows].normal_()
        graph.replay()
        ids, shares = route_reference(h[:rows].float() @ router.t(), None, Choice(2))
        want = moe_reference(h[:rows], *weights, ids, shares)
        assert error(y[:rows], want) <= BOUND[dtype] and y[rows:].isnan().all()
