"""Attention over pages, chunk by chunk, against the whole at once."""

import pytest
import torch

from kernels.paged_attention import paged_attention, paged_attention_reference
from tests.kernels.cases import error, pack, pool

BOUND = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 6e-3}


def check(steps, page, *, H, Hkv, d, dtype, device):
    """steps[i][j]: how many tokens sequence j gives in step i; 0 for none. Pages begin as NaN."""
    N = len(steps[0])
    totals = [sum(step[j] for step in steps) for j in range(N)]
    inputs = [
        torch.randn(n, H + 2 * Hkv, d, device=device).to(dtype).split((H, Hkv, Hkv), dim=1)
        for n in totals
    ]
    blocks = [-(-n // page) for n in totals]
    free = torch.randperm(sum(blocks) + 3)
    table = torch.full((N, max(blocks) + 1), -1, dtype=torch.int32)
    for j, block in enumerate(free[: sum(blocks)].split(blocks)):
        table[j, : blocks[j]] = block
    pages = pool(len(free), (page, Hkv, d), (page, Hkv, d), dtype=dtype, device=device)
    done, rows = [0] * N, [[] for _ in range(N)]
    for step in steps:
        order = sorted((j for j in range(N) if step[j]), key=lambda j: step[j] > 1)
        lengths = [step[j] for j in order]
        parts = [
            torch.cat([inputs[j][part][done[j] : done[j] + step[j]] for j in order])
            for part in range(3)
        ]
        q, k, v = torch.cat(parts, dim=1).split((H, Hkv, Hkv), dim=1)
        packing = pack(lengths, list(range(len(order))), [done[j] for j in order], device)
        tables = table[order].to(device)
        o = paged_attention(q, k, v, *pages, tables, packing, 0.4)
        assert o.dtype == dtype
        for j, part in zip(order, o.split(lengths), strict=True):
            rows[j].append(part)
            done[j] += step[j]
    for j in range(N):
        expected = paged_attention_reference(*inputs[j], 0.4)
        assert error(torch.cat(rows[j]), expected) <= BOUND[dtype]
    unused = sum(blocks) * page - sum(totals) + 3 * page
    assert all(part.isnan().sum() == unused * Hkv * d for part in pages)


STEPS = [[63, 0, 5, 1], [64, 100, 1, 1], [1, 1, 1, 1], [7, 181, 0, 70], [1, 1, 1, 1]]


def test_mixed_steps(device, dtype):
    check(STEPS, 64, H=2, Hkv=2, d=16, dtype=dtype, device=device)


@pytest.mark.parametrize("page", [1, 16, 48])
def test_page_sizes(device, page):
    check(STEPS[:3], page, H=2, Hkv=1, d=16, dtype=torch.float32, device=device)


@pytest.mark.parametrize(("H", "Hkv", "d"), [(6, 2, 64), (4, 4, 96), (8, 1, 128), (1, 1, 256)])
def test_heads(device, H, Hkv, d, dtype):
    check([[1, 70], [9, 1], [1, 1]], 16, H=H, Hkv=Hkv, d=d, dtype=dtype, device=device)


def test_longer_than_one_go(device):
    check([[781], [600]], 64, H=1, Hkv=1, d=16, dtype=torch.float32, device=device)
