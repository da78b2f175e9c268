"""The head's product, as if it were float32."""

import pytest
import torch

from kernels.logits import logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_keeps_the_hidden_states_precision(dtype, rows):
    """A bfloat16 hidden state would be off by 2^-9 of its size, two terms by some 2^-17."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, 256, device=DEVICE) * 30
    weight = torch.randn(8200, 256, device=DEVICE).to(dtype)
    want = hidden.double() @ weight.double().t()
    terms = logits(hidden, weight)
    assert terms.dtype == torch.float32
    error = (terms.sum(0) - want).norm() / want.norm()
    assert error < 2e-5
    rounded = hidden.to(torch.bfloat16).double() @ weight.double().t()
    assert (rounded - want).norm() / want.norm() > 1e-3


def test_no_rows_give_no_logits():
    weight = torch.randn(16, 8, dtype=torch.bfloat16, device=DEVICE)
    assert logits(torch.empty(0, 8, device=DEVICE), weight).sum(0).shape == (0, 16)
