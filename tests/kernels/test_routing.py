"""Choosing experts, against float64, with ties and with what is no number."""

import pytest
import torch

from kernels import routing
from kernels.routing import Choice, choose, route, route_reference
from kernels.tuning import RouteTuning
from tests.kernels.cases import error

# experts, and how many of them are chosen out of which groups
SOFTMAX = [(1, Choice(1)), (2, Choice(2)), (8, Choice(2)), (60, Choice(8)), (500, Choice(16))]
SIGMOID = [
    (8, Choice(2, normed=False, factor=2.5)),
    (60, Choice(8, 3, 2)),
    (256, Choice(8, 8, 4, factor=2.5)),
    (256, Choice(1, 8, 1, normed=False)),
    (14, Choice(4, 7, 2)),
]
CASES = [(E, choice, False) for E, choice in SOFTMAX] + [(E, choice, True) for E, choice in SIGMOID]


WARPS = (1, 2, 4) if torch.cuda.is_available() else (1,)


@pytest.fixture(autouse=True, params=WARPS, ids="{} warps".format)
def tuning(request, monkeypatch):
    """On a GPU the kernel is what is tested, measured or not."""
    monkeypatch.setattr(routing, "route_tuning", lambda device, E: RouteTuning(request.param, True))


def inputs(T, E, biased, device):
    bias = torch.randn(E, device=device) * 0.1 if biased else None
    return torch.randn(T, E, device=device), bias


@pytest.mark.parametrize(("E", "choice", "biased"), CASES, ids=str)
@pytest.mark.parametrize("T", [1, 63])
def test_best(device, T, E, choice, biased):
    logits, bias = inputs(T, E, biased, device)
    ids, weights = choose(logits, bias, choice)
    want_ids, want = route_reference(logits, bias, choice)
    assert torch.equal(ids.long(), want_ids)
    assert weights.dtype == torch.float32 and error(weights, want) <= 1e-6


def test_rows_of_any_distance_and_dtype(device):
    logits, _ = inputs(40, 40, False, device)
    part = logits[:, 9:29].to(torch.bfloat16).float()
    wide = torch.full_like(logits, torch.nan)
    wide[:, 9:29] = part
    want_ids, want = route_reference(part, None, Choice(3))
    for x in (wide, wide.to(torch.bfloat16)):
        ids, weights = choose(x[:, 9:29], None, Choice(3))
        assert error(weights, want) <= 1e-6
        assert torch.equal(part.gather(1, ids.long()), part.gather(1, want_ids))


def ours(device):
    """Whether the kernel computes: PyTorch's topk breaks ties as it likes."""
    return device.type == "cuda" or routing._torch is routing._triton


@pytest.mark.parametrize(("E", "choice", "biased"), CASES, ids=str)
def test_ties_go_to_the_lowest_id(device, E, choice, biased):
    if not ours(device):
        pytest.skip("PyTorch breaks ties as it likes")
    logits = torch.randint(-1, 2, (23, E), device=device).float()
    logits[:3] = torch.tensor([[-0.0], [1.0], [0.0]], device=device)
    logits[2, ::2] *= -1
    bias = torch.randint(0, 2, (E,), device=device) * 0.25 if biased else None
    ids, weights = choose(logits, bias, choice)
    want_ids, want = route_reference(logits, bias, choice)
    assert torch.equal(ids.long(), want_ids) and error(weights, want) <= 1e-6


@pytest.mark.parametrize(("E", "choice", "biased"), CASES, ids=str)
def test_what_is_no_number_stays_in_its_row(device, E, choice, biased):
    """Ids are different ones below E whatever comes, and the other rows are what they were."""
    logits, bias = inputs(9, E, biased, device)
    clean = choose(logits, bias, choice)
    broken = logits.clone()
    broken[0], broken[1], broken[2] = torch.nan, -torch.inf, torch.inf
    broken[3, E // 2] = -torch.nan
    broken[4, E - 1], broken[4, 0] = torch.inf, -torch.inf
    ids, weights = choose(broken, bias, choice)
    assert (ids >= 0).all() and (ids < E).all()
    assert all(len(set(row)) == choice.top for row in ids.tolist())
    for found, sure in zip((ids, weights), clean, strict=True):
        assert torch.equal(found[5:], sure[5:])
    assert weights[0].isnan().all() and weights[3].isnan().any()
    if choice.normed:
        assert weights[3].isnan().all()


def test_the_bias_chooses_and_does_not_weigh(device):
    """Scores 0.5 everywhere; the bias picks groups 1 and 2, then experts 2, 5 and 4."""
    bias = torch.tensor([0.1, 0.1, 0.3, 0.0, 0.2, 0.25, 0.0, 0.0], device=device)
    zeros = torch.zeros(1, 8, device=device)
    ids, weights = choose(zeros, bias, Choice(3, 4, 2, factor=2.5))
    assert ids.tolist() == [[2, 5, 4]]
    assert weights.tolist() == [pytest.approx([2.5 / 3] * 3)]
    _, weights = choose(zeros, bias, Choice(3, 4, 2, normed=False, factor=2.5))
    assert weights.tolist() == [[1.25] * 3]


def test_a_negative_bias_does_not_let_other_groups_in(device):
    bias = torch.tensor([-2.0, -2.0, -3.0, -9.0, -9.0, -9.0], device=device)
    ids, _ = choose(torch.zeros(1, 6, device=device), bias, Choice(2, 2, 1))
    assert sorted(ids[0].tolist()) == [0, 1]


def test_no_tokens(device):
    ids, weights = choose(torch.empty(0, 8, device=device), None, Choice(2))
    assert ids.shape == weights.shape == (0, 2)


@pytest.mark.parametrize("router_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("E", "K", "D"), [(1, 1, 64), (8, 2, 2048), (60, 8, 100), (32, 2, 781)])
def test_logits_and_choice_in_one(device, router_dtype, E, K, D):
    if not ours(device):
        pytest.skip("a product and a choice on the CPU")
    wide = torch.full((5, D + 9), torch.nan, device=device, dtype=torch.bfloat16)
    wide[:, 3:-6] = torch.randn(5, D, device=device)
    h, router = wide[:, 3:-6], torch.randn(E, D, device=device).to(router_dtype) * D**-0.5
    ids, weights = routing._triton(h, None, Choice(K), router)
    logits = h.double() @ router.double().t()
    want_ids, want = route_reference(logits.to(router_dtype), None, Choice(K))
    bound = 1e-5 if router_dtype == torch.float32 else 2e-2
    assert error(weights, want) <= bound
    if router_dtype == torch.float32:
        assert torch.equal(ids.long(), want_ids)


def test_route_is_a_product_and_a_choice(device):
    """In the router's dtype; NaN in a token stays there."""
    h = torch.randn(9, 64, device=device).to(torch.bfloat16)
    h[4] = torch.nan
    router, bias = torch.randn(8, 64, device=device), torch.randn(8, device=device)
    for given, choice in ((None, Choice(2)), (bias, Choice(2, 4, 2, factor=2.5))):
        ids, weights = route(h, router, given, choice)
        rows = torch.arange(9, device=device) != 4
        want_ids, want = route_reference(h[rows].float() @ router.t(), given, choice)
        assert torch.equal(ids[rows].long(), want_ids) and error(weights[rows], want) <= 1e-5
        assert weights[4].isnan().all() and (ids < 8).all() and (ids >= 0).all()
