"""Mixture of experts against the sum over each token's experts."""

import pytest
import torch

from kernels import experts
from kernels.experts import _grouped, _looped, _masked, moe_reference
from kernels.join import join
from kernels.quantize import Quantized
from tests.kernels.cases import error


def moe(*args):
    """With the rows of a token's experts added up."""
    return join(experts.moe(*args))


def case(T, E, K, D, width, dtype, device):
    x = torch.randn(T, D, device=device).to(dtype)
    gate_up = (torch.randn(E, 2 * width, D, device=device) * D**-0.5).to(dtype)
    down = (torch.randn(E, D, width, device=device) * width**-0.5).to(dtype)
    scores = torch.randn(T, E, device=device)
    scores[:, 1] -= 100.0  # an expert without tokens
    weights, ids = scores.softmax(-1).topk(K, dim=-1)
    return x, gate_up, down, ids, weights


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize(("T", "E", "K"), [(1, 4, 1), (63, 8, 2), (100, 5, 3)])
def test_routed(device, T, E, K, dtype, bound):
    args = case(T, E, K, 64, 48, dtype, device)
    y = moe(*args)
    assert y.dtype == dtype
    assert error(y, moe_reference(*args)) <= bound
    assert torch.equal(y, moe(*args))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str
)
def test_one_expert_is_not_routed(device, dtype, bound):
    x, gate_up, down, _, _ = case(7, 2, 1, 64, 48, dtype, device)
    ids, weights = torch.zeros(7, 1, dtype=torch.int64), torch.ones(7, 1)
    y = moe(x, gate_up[:1], down[:1], None, None)
    assert error(y, moe_reference(x, gate_up[:1], down[:1], ids, weights)) <= bound


def test_a_token_does_not_depend_on_its_company(device):
    x, gate_up, down, ids, weights = case(40, 4, 2, 32, 16, torch.float32, device)
    alone = torch.cat(
        [moe(x[t : t + 1], gate_up, down, ids[t : t + 1], weights[t : t + 1]) for t in range(40)]
    )
    assert error(alone, moe(x, gate_up, down, ids, weights)) <= 1e-6


def quantised(w, codes):
    """Experts as a checkpoint's matrices fill them, one after the other."""
    q = Quantized.empty(tuple(w.shape), codes, w.device)
    for e, matrix in enumerate(w):
        q[e].copy_(matrix)
    return q


@pytest.mark.parametrize(("codes", "bound"), [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.08)])
@pytest.mark.parametrize(("T", "E", "K"), [(1, 4, 1), (23, 5, 3)])
def test_quantised(device, T, E, K, codes, bound):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, gate_up, down, ids, weights = case(T, E, K, 64, 48, dtype, device)
    q_gate_up, q_down = quantised(gate_up, codes), quantised(down, codes)
    y = moe(x, q_gate_up, q_down, ids, weights)
    assert y.dtype == dtype and torch.equal(y, moe(x, q_gate_up, q_down, ids, weights))
    assert error(y, moe_reference(x, gate_up, down, ids, weights)) <= bound
    if codes == torch.int8:  # rows stay what they are: only the codes are off
        exact = moe_reference(x, q_gate_up, q_down, ids, weights)
        assert error(y, exact) <= (1e-2 if device.type == "cuda" else 1e-5)
    alone = moe(x, q_gate_up[2:3], q_down[2:3], None, None)
    only = torch.zeros(T, 1, dtype=torch.int64), torch.ones(T, 1)
    assert error(alone, moe_reference(x, gate_up[2:3], down[2:3], *only)) <= bound


def test_grouped_products_equal_those_of_a_loop():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, gate_up, _, _, _ = case(30, 4, 1, 64, 48, torch.bfloat16, device)
    ends = torch.tensor([7, 7, 8, 30], dtype=torch.int32, device=device)
    args = x, gate_up, ends
    assert error(_grouped(*args), _looped(*args)) <= 1e-2
    assert error(_masked(*args), _looped(*args)) <= 1e-2
