"""Attention over pages, chunk by chunk, against the whole at once."""

from itertools import pairwise

import pytest
import torch

from kernels import paged_decode, pieces
from kernels.paged_attention import paged_attention, paged_attention_reference
from tests.kernels.cases import error, pack, pool

BOUND = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 6e-3}


def check(steps, page, *, H, Hkv, d, dtype, device, singles_first=True):
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
    shapes = (page, Hkv, d), (page, Hkv, d)
    others = 2 * Hkv * d if page == 64 else 8  # whole rows of all heads, as a store has, or not
    pages = pool(len(free), *shapes, dtype=dtype, device=device, others=others)
    done, rows = [0] * N, [[] for _ in range(N)]
    for step in steps:
        order = sorted(
            (j for j in range(N) if step[j]), key=lambda j: (step[j] > 1) == singles_first
        )
        lengths = [step[j] for j in order]
        parts = [
            torch.cat([inputs[j][part][done[j] : done[j] + step[j]] for j in order])
            for part in range(3)
        ]
        q, k, v = torch.cat(parts, dim=1).split((H, Hkv, Hkv), dim=1)
        packing = pack(lengths, order, [done[j] for j in order], device)
        o = paged_attention(q, k, v, *pages, table.to(device), packing, 0.4)
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


@pytest.mark.parametrize("d", [64, 96, 128])
@pytest.mark.parametrize("G", [1, 2, 8])
def test_groups(device, G, d, dtype):
    check([[1, 130, 63], [100, 1, 1]], 64, H=G, Hkv=1, d=d, dtype=dtype, device=device)


def test_single_tokens_behind_chunks(device, dtype):
    shape = {"H": 4, "Hkv": 2, "d": 64, "dtype": dtype, "device": device}
    check(STEPS, 64, **shape, singles_first=False)


def test_a_single_token_goes_on_where_a_chunk_ends(device, dtype):
    """Both in one call: keys that the chunk brings are there when the token looks for them."""
    n, H, Hkv, d, page = 130, 4, 2, 64, 64
    q, k, v = torch.randn(n, H + 2 * Hkv, d, device=device).to(dtype).split((H, Hkv, Hkv), dim=1)
    pages = pool(3, (page, Hkv, d), (page, Hkv, d), dtype=dtype, device=device)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=device)
    order = torch.tensor([n - 1, *range(n - 1)], device=device)
    packing = pack([1, n - 1], [0, 0], [n - 1, 0], device)
    o = paged_attention(q[order], k[order], v[order], *pages, table, packing, 0.4)
    assert error(o, paged_attention_reference(q, k, v, 0.4)[order]) <= BOUND[dtype]


@pytest.mark.parametrize("page", [64, 48])
@pytest.mark.parametrize("G", [1, 3])
def test_keys_in_pieces(device, page, G, monkeypatch):
    """Spans of 32 keys for single tokens, most of them empty for the short; pieces of chunks."""
    monkeypatch.setattr(paged_decode, "LEAST", 32)
    monkeypatch.setattr(paged_decode, "MOST", 32)
    monkeypatch.setattr(pieces, "LEAST", 1)
    steps = [[257, 63, 1], [70, 1, 1], [1, 1, 2]]
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    check(steps, page, H=2 * G, Hkv=2, d=64, dtype=dtype, device=device)


def test_more_single_tokens_than_a_launch_takes(device, monkeypatch):
    monkeypatch.setattr(paged_decode, "SEQUENCES", (1, 2))
    steps = [[90, 5, 63, 1], [1, 1, 1, 1], [1, 0, 1, 1]]
    check(steps, 64, H=4, Hkv=2, d=64, dtype=torch.float32, device=device)


def test_pieces_cover_every_tile_once():
    packing = pack([1, 300, 2, 781], [0, 1, 2, 3], [9, 20_000, 131_072, 0])
    for programs in (1, 16, 4096):
        work = pieces.plan(packing, 1, 4, 2, 128, programs)
        joins = {(i, pair): (first, count) for i, pair, first, count, _ in work.joins.tolist()}
        found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for i, pair, begin, end, part in work.items.tolist():
            found.setdefault((i, pair), []).append((begin, end, part))
        for i, n in ((1, 300), (2, 2), (3, 781)):
            for pair in range(0, n * 4, 128):
                ranges = sorted(found.pop((i, pair)))
                last = packing.past[i] + min((pair + 127) // 4, n - 1)
                assert ranges[0][0] == 0 and ranges[-1][1] == last + 1
                for (_, end, _), (begin, _, _) in pairwise(ranges):
                    assert begin == end and end % pieces.KEYS == 0
                first, count = joins.pop((i, pair), (-1, 1))
                assert [part for _, _, part in ranges] == [*range(first, first + count)]
        assert not found and not joins
        assert (work.parts > 0) == (programs > 1)


def test_padding_touches_nothing(device, dtype):
    q, k, v = (torch.randn(3, H, 64, device=device).to(dtype) for H in (4, 2, 2))
    pages = pool(2, (64, 2, 64), (64, 2, 64), dtype=dtype, device=device)
    tables = torch.tensor([[-1], [1], [-1]], dtype=torch.int32, device=device)
    packing = pack([1, 1, 1], [-1, 1, -1], [0, 0, 40], device)
    o = paged_attention(q, k, v, *pages, tables, packing, 0.4)
    assert (o[0] == 0).all() and (o[2] == 0).all()
    assert error(o[1], v[1].repeat_interleave(2, 0)) <= BOUND[dtype]
    for part, new in zip(pages, (k, v), strict=True):
        assert torch.equal(part[1, 0], new[1])
        assert part.isnan().sum() == part.numel() - new[1].numel()
