"""Sliding-window attention, chunk by chunk through the ring, against the whole at once."""

import pytest
import torch

from kernels.window_attention import window_attention, window_attention_reference
from tests.kernels.cases import error, pack, pool

BOUND = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 6e-3}


def project(T, H, Hkv, d, dtype, device):
    """q, k, v as views into one projection [T, H + 2 Hkv, d]."""
    qkv = torch.randn(T, H + 2 * Hkv, d, device=device).to(dtype)
    return qkv.split((H, Hkv, Hkv), dim=1)


def check(steps, window, *, H, Hkv, d, dtype, device):
    """steps[i][j]: how many tokens sequence j gives in step i; 0 for none. Rings begin as NaN."""
    N = len(steps[0])
    totals = [sum(step[j] for step in steps) for j in range(N)]
    inputs = [project(n, H, Hkv, d, dtype, device) for n in totals]
    slots = torch.randperm(2 * N)[:N].tolist()
    shape = (window, Hkv, d)
    rings = pool(2 * N, shape, shape, dtype=dtype, device=device)
    done, rows = [0] * N, [[] for _ in range(N)]
    for step in steps:
        order = sorted((j for j in range(N) if step[j]), key=lambda j: step[j] > 1)
        lengths = [step[j] for j in order]
        qkv = [
            torch.cat([inputs[j][part][done[j] : done[j] + step[j]] for j in order])
            for part in range(3)
        ]
        wide = torch.cat(qkv, dim=1)  # views again, not the copies
        q, k, v = wide.split((H, Hkv, Hkv), dim=1)
        packing = pack(lengths, [slots[j] for j in order], [done[j] for j in order], device)
        o = window_attention(q, k, v, *rings, packing, window, 0.4)
        assert o.dtype == dtype
        for j, part in zip(order, o.split(lengths), strict=True):
            rows[j].append(part)
            done[j] += step[j]
    for j in range(N):
        expected = window_attention_reference(*inputs[j], window, 0.4)
        assert error(torch.cat(rows[j]), expected) <= BOUND[dtype]
        kept = min(totals[j], window)
        positions = torch.arange(totals[j] - kept, totals[j], device=device)
        for ring, values in zip(rings, inputs[j][1:], strict=True):
            assert torch.equal(ring[slots[j], positions % window], values[-kept:])
            assert ring[slots[j]].isnan().sum() == (window - kept) * Hkv * d
    untouched = [i for i in range(2 * N) if i not in slots]
    assert all(ring[untouched].isnan().all() for ring in rings)


STEPS = [[63, 0, 5, 1], [64, 100, 1, 1], [1, 1, 1, 1], [7, 257, 0, 70], [1, 1, 1, 1]]


def test_mixed_steps(device, dtype):
    check(STEPS, 64, H=2, Hkv=2, d=16, dtype=dtype, device=device)


@pytest.mark.parametrize("window", [1, 7, 33])
def test_narrow_windows(device, window):
    check(STEPS, window, H=2, Hkv=1, d=16, dtype=torch.float32, device=device)


@pytest.mark.parametrize(("H", "Hkv", "d"), [(6, 2, 64), (4, 4, 96), (8, 1, 128), (1, 1, 256)])
def test_heads(device, H, Hkv, d, dtype):
    check([[1, 20], [9, 1], [1, 1]], 16, H=H, Hkv=Hkv, d=d, dtype=dtype, device=device)


def test_longer_than_one_go(device):
    check([[3000], [781]], 64, H=1, Hkv=1, d=16, dtype=torch.float32, device=device)


def test_token_by_token(device):
    check([[1, 1]] * 20, 8, H=2, Hkv=2, d=16, dtype=torch.float32, device=device)


def test_padding_rows_touch_nothing(device):
    H, d, window = 2, 16, 8
    q, k, v = project(3, H, H, d, torch.float32, device)
    rings = pool(3, (window, H, d), (window, H, d), device=device)
    packing = pack([1, 1, 1], [-1, 2, -1], [4, 0, 0], device)
    o = window_attention(q, k, v, *rings, packing, window, 0.4)
    assert (o[[0, 2]] == 0).all()
    assert error(o[1], v[1]) <= 1e-6  # it sees itself alone
    assert all(ring[:2].isnan().all() for ring in rings)


def test_a_recycled_ring_does_not_leak(device):
    """The slot's former owner left a full ring: from start 0 on, none of it is seen."""
    H, d, window = 1, 16, 8
    rings = pool(1, (window, H, d), (window, H, d), device=device)
    for ring in rings:
        ring[:] = 1e4
    q, k, v = project(5, H, H, d, torch.float32, device)
    parts = [
        window_attention(q[a:b], k[a:b], v[a:b], *rings, pack([b - a], [0], [a], device), window, 1)
        for a, b in ((0, 3), (3, 4), (4, 5))
    ]
    assert error(torch.cat(parts), window_attention_reference(q, k, v, window, 1.0)) <= 1e-5
