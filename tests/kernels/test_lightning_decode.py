"""One token of lightning attention against the recurrence."""

from __future__ import annotations

import pytest
import torch

from kernels.language import HAVE_TRITON, expm1, jit, tl
from kernels.lightning_decode import lightning_decode
from kernels.lightning_reference import lightning_reference
from kernels.packing import ELSEWHERE, PADDING
from tests.kernels.cases import error, interleaved, pool

BOUND = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 4e-3}
SLOPES = [0.9, 4e-8, 0.0]


@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (96, 96), (128, 128), (256, 128), (24, 40)])
def test_a_batch_with_padding(device, dk, dv, dtype):
    H, S = 3, 7
    slots, starts = [4, -1, 0, 6, -1], [12, 3, 0, 1, 0]
    q, k, v = interleaved(len(slots), H, (dk, dk, dv), dtype, device)
    slopes = torch.tensor(SLOPES, device=device)
    (states,) = pool(S, (H, dk, dv), device=device)
    initial = torch.randn(S, H, dk, dv, device=device)
    states[[4, 6]] = initial[[4, 6]]  # slot 0 is fresh: NaN counts as zero
    o = lightning_decode(
        q,
        k,
        v,
        slopes,
        0.3,
        states,
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(starts, device=device),
    )
    assert o.dtype == dtype and o.is_contiguous()
    for n, (slot, start) in enumerate(zip(slots, starts, strict=True)):
        if slot < 0:
            assert (o[n] == 0).all()
            continue
        old = initial[slot] if start else None
        one = slice(n, n + 1)
        expected, state = lightning_reference(q[one], k[one], v[one], slopes, 0.3, old)
        assert error(o[one], expected) <= BOUND[dtype]
        assert error(states[slot], state) <= 1e-6
    assert states[[1, 2, 3, 5]].isnan().all()


def test_nothing_but_padding(device):
    q, k, v = interleaved(2, 3, (16, 16, 16), device=device)
    (states,) = pool(2, (3, 16, 16), device=device)
    slots = torch.tensor([PADDING, ELSEWHERE], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 5], device=device)
    slopes = torch.tensor(SLOPES, device=device)
    o = torch.full_like(v, 3.0)
    lightning_decode(q, k, v, slopes, 1.0, states, slots, starts, out=o)
    assert (o[0] == 0).all() and (o[1] == 3).all() and states.isnan().all()


def test_bfloat16_state(device):
    H, d = 3, 32
    q, k, v = interleaved(1, H, (d, d, d), device=device)
    slopes = torch.tensor(SLOPES, device=device)
    (states,) = pool(1, (H, d, d), dtype=torch.bfloat16, device=device)
    states[0] = torch.randn(H, d, d, device=device)
    old = states[0].clone()
    slot, start = torch.zeros(1, dtype=torch.int32, device=device), torch.ones(1, device=device)
    o = lightning_decode(q, k, v, slopes, 1.0, states, slot, start.long())
    expected, state = lightning_reference(q, k, v, slopes, 1.0, old)
    assert error(o, expected) <= 1e-6  # the output sees the state before it is rounded
    assert error(states[0], state) <= 4e-3


@jit
def _expm1_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, expm1(tl.load(x_ptr + offsets)))


@pytest.mark.skipif(not HAVE_TRITON, reason="a Triton function")
def test_expm1_has_no_cancellation():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = -torch.logspace(-9, 2, 256, dtype=torch.float64).float().to(device)
    y = torch.empty_like(x)
    _expm1_kernel[(1,)](x, y, BLOCK=256)
    expected = torch.expm1(x.double())
    assert ((y - expected).abs() <= 1e-6 * expected.abs()).all()


@pytest.mark.parametrize("device", ["torch"], indirect=True)
def test_a_small_slope_does_not_drift(device):
    """Multiplied by a rounded decay, the state would be off by 1e-4 after so many steps."""
    drift(device, 10_000)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="long for the interpreter")
@pytest.mark.parametrize("device", ["triton"], indirect=True)
def test_a_small_slope_does_not_drift_on_the_device(device):
    drift(device, 10_000)


def drift(device, n):
    """Fold n tokens one by one; the state is a sum that float64 takes at once."""
    H, d = len(SLOPES), 16
    slopes = torch.tensor(SLOPES, device=device)
    (states,) = pool(1, (H, d, d), device=device)
    q, k, v = interleaved(n, H, (d, d, d), device=device)
    slot = torch.zeros(1, dtype=torch.int32, device=device)
    starts = torch.arange(n, device=device)
    for t in range(n):
        one = slice(t, t + 1)
        lightning_decode(q[one], k[one], v[one], slopes, 1.0, states, slot, starts[one])
    age = torch.arange(n - 1, -1, -1, dtype=torch.float64, device=device)
    decay = torch.exp(-age[:, None] * slopes.double())
    expected = torch.einsum("thk,thv->hkv", k.double() * decay[..., None], v.double())
    for h in range(H):
        assert error(states[0, h], expected[h]) <= 1e-5, f"slope {SLOPES[h]}"
