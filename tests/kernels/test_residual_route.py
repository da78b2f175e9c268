"""A residual, its norm and the choice of experts in one, against float64."""

import pytest
import torch

from kernels import residual_route as module
from kernels import routing
from kernels.fused_linear import Residual
from kernels.join import Parts
from kernels.residual_rmsnorm import residual_rmsnorm_reference
from kernels.residual_route import residual_route
from kernels.routing import Choice, route_reference
from kernels.tuning import RouteTuning
from tests.kernels.cases import error

ALPHA, BETA, EPS = 3.5, 0.7, 1e-5
CASES = [  # T, E, K, D
    (1, 8, 2, 2048),
    (3, 8, 2, 64),
    (63, 5, 4, 100),
    (3, 1, 1, 33),
    (2, 60, 8, 300),
]


@pytest.fixture
def device():
    """The GPU, or the interpreter's CPU: there is no path but Triton's here."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(T, E, D, dtype, device):
    """x and f amid NaN, and of different distances."""
    wide = torch.full((T, 2 * D + 40), torch.nan, device=device)
    wide[:, 8 : D + 8], wide[:, D + 16 : 2 * D + 16] = torch.randn(2, T, D, device=device).unbind()
    x, f = wide.to(dtype)[:, 8 : D + 8], wide[:, : 2 * D + 24].to(dtype)[:, D + 16 : 2 * D + 16]
    weight = torch.randn(D, device=device).to(dtype)
    router = torch.randn(E, D, device=device) * D**-0.5
    return x, f, weight, router


def of(x, f, weight, router, top):
    return module._triton(x, f, ALPHA, BETA, weight, EPS, router, top)


@pytest.mark.parametrize("router_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "E", "K", "D"), CASES)
def test_norm_and_choice(device, T, E, K, D, dtype, router_dtype):
    """The choice is made of rows as they are rounded, by logits as they are."""
    x, f, weight, router = inputs(T, E, D, dtype, device)
    router = router.to(router_dtype)
    h, ids, weights = of(x, f, weight, router, K)
    want = residual_rmsnorm_reference(x, f, ALPHA, BETA, weight, EPS)
    assert h.dtype == dtype and ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert error(h, want) <= (2e-6 if dtype == torch.float32 else 4e-3)
    logits = h.double() @ router.double().t()
    want_ids, want = route_reference(logits.to(router_dtype), None, Choice(K))
    assert error(weights, want) <= (1e-5 if router_dtype == torch.float32 else 2e-2)
    if router_dtype == torch.float32:
        assert torch.equal(ids.long(), want_ids)
    for t in {0, T // 2, T - 1}:  # alone as among others
        one = slice(t, t + 1)
        for alone, among in zip(
            of(x[one], f[one], weight, router, K), (h, ids, weights), strict=True
        ):
            assert torch.equal(alone, among[one])


def test_it_chooses_as_the_kernel_that_only_chooses(device):
    x, f, weight, router = inputs(40, 8, 64, torch.bfloat16, device)
    h, ids, weights = of(x, f, weight, router, 3)
    same, theirs = routing._triton(h, None, Choice(3), router)
    assert torch.equal(ids, same) and error(weights, theirs) <= 1e-6


def test_ties_go_to_the_lowest_id(device):
    x, f, weight, router = inputs(9, 8, 64, torch.bfloat16, device)
    _, ids, weights = of(x, f, weight, router[:1].expand(8, 64).contiguous(), 3)
    assert (ids == torch.arange(3, device=device)).all()
    assert error(weights, torch.full_like(weights, 1 / 3)) <= 1e-6


def test_what_is_no_number_stays_in_its_row(device):
    """Ids are different ones below E whatever comes, and the other rows are what they were."""
    x, f, weight, router = inputs(9, 5, 100, torch.float32, device)
    clean = of(x, f, weight, router, 2)
    x[0], x[1, 7], f[2, 99], x[3] = torch.nan, torch.nan, torch.inf, 0.0
    f[3] = 0.0
    h, ids, weights = of(x, f, weight, router, 2)
    assert (ids >= 0).all() and (ids < 5).all() and (ids[:, 0] != ids[:, 1]).all()
    assert h[:2].isnan().all() and weights[:3].isnan().all()
    assert ids[3].tolist() == [0, 1] and weights[3].tolist() == [0.5, 0.5]
    for found, sure in zip((h, ids, weights), clean, strict=True):
        assert torch.equal(found[4:], sure[4:])
    router[3] = torch.nan
    _, ids, weights = of(x, f, weight, router, 2)
    assert weights.isnan().all() and (ids[4:, 0] == 3).all()


@pytest.mark.parametrize("T", [0, 1, 7])
def test_where_it_serves(device, T, monkeypatch):
    """What routing has measured decides; parts and rows without a weight take two kernels."""
    x, f, weight, router = inputs(T, 8, 64, torch.float32, device)
    one_launch, asked = module._triton, []

    def counted(*args):
        asked.append(args)
        return one_launch(*args)

    monkeypatch.setattr(module, "_triton", counted)
    monkeypatch.setattr(routing, "fused", lambda h, router: True)
    parts = Parts(f.contiguous(), torch.ones(T, 1, device=device))

    def residual(f, weight):
        return Residual(x, f, weight, EPS, ALPHA, BETA, post=True)

    fused = residual_route(residual(f, weight), router, Choice(2))
    assert len(asked) == 1
    monkeypatch.setattr(routing, "route_tuning", lambda device, E: RouteTuning(4, False))
    for added, weighted in ((parts, weight), (f, None), (None, weight)):
        residual_route(residual(added, weighted), router, Choice(2))
    monkeypatch.setattr(routing, "MOST_BYTES", router.nbytes - 1)
    residual_route(residual(f, weight), router, Choice(2))
    monkeypatch.undo()
    assert len(asked) == 1
    monkeypatch.setattr(routing, "fused", lambda h, router: False)
    apart = residual_route(residual(f, weight), router, Choice(2))
    for ours, theirs in zip(fused, apart, strict=True):
        assert ours.shape == theirs.shape
        assert T == 0 or error(ours, theirs) <= 1e-5
