"""The attention of paged_prefill on Hopper: 16-bit inputs, heads of 64 or 128, pages of 64.

The same items, in Gluon, for who does what: one warp asks for keys and values by bulk copies, a
page at a time, while two groups of four warps take 64 rows each. A group multiplies its next
scores and the weighted values of the block before at once, and turns scores into weights while the
values are still being multiplied; the two groups drift apart, so that one's exponentials hide under
the other's products (FlashAttention-3, arXiv 2407.08608).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from kernels.language import HAVE_TRITON
from kernels.tuning import card

if HAVE_TRITON:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
else:
    gl: Any = None  # type: ignore[no-redef]

ROWS = 128  # pairs (token, head) per program
KEYS = 128  # at a time: two pages
PAGE = 64
STAGES = 2  # blocks of keys, and of values, in shared memory
DIMENSIONS = (64, 128)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
LOG2_E = 1.44269504
METADATA = [
    "tables_ptr",
    "slots_ptr",
    "cu_seqlens_ptr",
    "starts_ptr",
    "items_ptr",
]  # aligned now and then


def jit(**options: Any) -> Any:
    """gluon.jit, or the function as it is where Triton is not installed."""
    return gluon.jit(**options) if HAVE_TRITON else lambda function: function


@jit()
def _fetch(desc, page_0, page_1, column, pieces, stage, arrived):
    """Two pages of one head into a stage; its barrier in `arrived` turns when they are there.

    A tile of 16-bit elements lies in shared memory as panels 64 columns wide, a page fills half.
    """
    PANELS: gl.constexpr = pieces.shape[0] // (2 * arrived.shape[0])
    bar = arrived.index(stage)
    mbarrier.expect(bar, 2 * PANELS * desc.block_type.nbytes)
    for x in gl.static_range(PANELS):
        piece = pieces.index((stage * PANELS + x) * 2)
        tma.async_copy_global_to_shared(desc, [page_0, column + x * 64], bar, piece)
        piece = pieces.index((stage * PANELS + x) * 2 + 1)
        tma.async_copy_global_to_shared(desc, [page_1, column + x * 64], bar, piece)


@jit()
def _load(
    p_table,
    page_rows,
    column,
    first,
    blocks,
    last_page,
    descs,
    pieces,
    barriers,
):
    """Blocks of keys and values, the latest first, as soon as both groups have read a stage."""
    k_desc, v_desc = descs
    k_pieces, v_pieces = pieces
    k_arrived, v_arrived, k_read, v_read = barriers
    STAGES: gl.constexpr = k_arrived.shape[0]
    for i in range(blocks):
        stage = i % STAGES
        turn = (i // STAGES + 1) & 1
        page = (first + blocks - 1 - i) * 2
        row_0 = gl.load(p_table + page) * page_rows
        row_1 = gl.load(p_table + gl.minimum(page + 1, last_page)) * page_rows
        mbarrier.wait(k_read.index(stage), turn)
        _fetch(k_desc, row_0, row_1, column, k_pieces, stage, k_arrived)
        mbarrier.wait(v_read.index(stage), turn)
        _fetch(v_desc, row_0, row_1, column, v_pieces, stage, v_arrived)


@jit()
def _weigh(b_scores, b_max, b_sum, scale, o_p, u, MASKED: gl.constexpr):
    """Scores -> weights, factor of what came before, greatest score in base 2, sum of weights."""
    if MASKED:
        o_u = u + gl.arange(0, b_scores.shape[1], gl.SliceLayout(0, b_scores.type.layout))
        b_scores = gl.where(o_u[None, :] <= o_p[:, None], b_scores, -float("inf"))
    b_new = gl.maximum(b_max, gl.max(b_scores, 1) * scale)
    b_base = b_new
    if MASKED:
        b_base = gl.where(b_new == -float("inf"), 0.0, b_new)
    b_p = gl.exp2(b_scores * scale - b_base[:, None])
    b_rescale = gl.exp2(b_max - b_base)
    return b_p, b_rescale, b_new, b_sum * b_rescale + gl.sum(b_p, 1)


@jit()
def _advance(
    i,
    q_tile,
    tiles,
    barriers,
    b_p,
    b_o,
    b_max,
    b_sum,
    scale,
    o_p,
    u,
    MASKED: gl.constexpr,
):
    """Scores of block i beside the values of block i - 1."""
    _, k_tiles, v_tiles = tiles
    k_arrived, v_arrived, k_read, v_read = barriers
    STAGES: gl.constexpr = k_arrived.shape[0]
    HALF: gl.constexpr = q_tile.shape[0]
    KEYS: gl.constexpr = k_tiles.shape[1]
    mma: gl.constexpr = b_max.type.layout.parent
    mma_o: gl.constexpr = b_o.type.layout
    stage, before = i % STAGES, (i - 1) % STAGES
    zeros = gl.zeros([HALF, KEYS], gl.float32, mma)
    mbarrier.wait(k_arrived.index(stage), (i // STAGES) & 1)
    k = k_tiles.index(stage).permute((1, 0))
    scores = warpgroup_mma(q_tile, k, zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_arrived.index(before), ((i - 1) // STAGES) & 1)
    o = warpgroup_mma(b_p, v_tiles.index(before), b_o, is_async=True)
    b_scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_read.index(stage), count=1)
    b_w, b_rescale, b_max, b_sum = _weigh(b_scores, b_max, b_sum, scale, o_p, u, MASKED)
    b_o, b_p = warpgroup_mma_wait(0, deps=(o, b_p))
    mbarrier.arrive(v_read.index(before), count=1)
    b_o = b_o * gl.convert_layout(b_rescale, gl.SliceLayout(1, mma_o))[:, None]
    b_p = gl.convert_layout(b_w.to(q_tile.dtype), gl.DotOperandLayout(0, mma_o, 2))
    return b_p, b_o, b_max, b_sum


@jit()
def _attend(
    GROUP: gl.constexpr,
    inputs,
    item,
    tiles,
    barriers,
):
    """64 rows of the item: softmax over its blocks, the latest first."""
    q_ptr, o_ptr, parts_ptr, lses_ptr, scale, q_row_stride, q_head_stride = inputs
    begin, n, start, pair, first, blocks, part, H, G, i_h = item
    q_tiles, k_tiles, v_tiles = tiles
    k_arrived, v_arrived, k_read, _ = barriers
    D: gl.constexpr = q_tiles.shape[2]
    KEYS: gl.constexpr = k_tiles.shape[1]
    HALF: gl.constexpr = q_tiles.shape[1]
    dtype: gl.constexpr = q_tiles.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])

    o_m = pair + GROUP * HALF + gl.arange(0, HALF, gl.SliceLayout(1, rows))
    o_d = gl.arange(0, D, gl.SliceLayout(0, rows))
    o_t = o_m // G
    o_h = i_h * G + o_m % G
    m_t = (o_t < n)[:, None]
    o_row = begin.to(gl.int64) + o_t
    p_q = q_ptr + (o_row * q_row_stride + o_h * q_head_stride)[:, None] + o_d[None, :]
    q_tile = q_tiles.index(GROUP)
    q_tile.store(gl.load(p_q, mask=m_t, other=0.0))
    fence_async_shared()

    o_r = pair + GROUP * HALF + gl.arange(0, HALF, gl.SliceLayout(1, mma))
    end = start + n
    o_p = gl.minimum(start + o_r // G, end - 1)  # positions
    least = start + (pair + GROUP * HALF) // G
    # blocks that some row does not see whole
    partial = first + blocks - gl.minimum(gl.maximum((least + 1) // KEYS, first), first + blocks)

    mbarrier.wait(k_arrived.index(0), 0)
    zeros = gl.zeros([HALF, KEYS], gl.float32, mma)
    k = k_tiles.index(0).permute((1, 0))
    scores = warpgroup_mma(q_tile, k, zeros, use_acc=False, is_async=True)
    b_max = gl.full([HALF], -float("inf"), gl.float32, gl.SliceLayout(1, mma))
    b_sum = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, mma))
    b_scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_read.index(0), count=1)
    u = (first + blocks - 1) * KEYS
    if u + KEYS > end:  # what follows was written by nobody, and may hold NaN
        mbarrier.wait(v_arrived.index(0), 0)
        o_v = u + gl.arange(0, KEYS, gl.SliceLayout(1, rows))
        v = v_tiles.index(0)
        v.store(gl.where((o_v < end)[:, None], v.load(rows), 0.0))
        fence_async_shared()
    b_w, _, b_max, b_sum = _weigh(b_scores, b_max, b_sum, scale, o_p, u, True)
    b_p = gl.convert_layout(b_w.to(dtype), gl.DotOperandLayout(0, mma_o, 2))
    b_o = gl.zeros([HALF, D], gl.float32, mma_o)
    for i in range(1, partial):
        u = (first + blocks - 1 - i) * KEYS
        b_p, b_o, b_max, b_sum = _advance(
            i, q_tile, tiles, barriers, b_p, b_o, b_max, b_sum, scale, o_p, u, True
        )
    for i in range(gl.maximum(partial, 1), blocks):
        b_p, b_o, b_max, b_sum = _advance(
            i, q_tile, tiles, barriers, b_p, b_o, b_max, b_sum, scale, o_p, 0, False
        )
    last = blocks - 1
    mbarrier.wait(v_arrived.index(last % v_arrived.shape[0]), (last // v_arrived.shape[0]) & 1)
    o = warpgroup_mma(b_p, v_tiles.index(last % v_arrived.shape[0]), b_o, is_async=True)
    b_o, b_p = warpgroup_mma_wait(0, deps=(o, b_p))

    b_safe = gl.convert_layout(gl.where(b_sum > 0.0, b_sum, 1.0), gl.SliceLayout(1, mma_o))
    b_o = b_o / b_safe[:, None]
    if part < 0:
        p_o = o_ptr + ((o_row * H + o_h) * D)[:, None] + o_d[None, :]
        gl.store(p_o, gl.convert_layout(b_o.to(dtype), rows), mask=m_t)
    else:
        o_part = (part.to(gl.int64) * (H // G) + i_h) * (2 * HALF) + GROUP * HALF
        o_i = gl.arange(0, HALF, gl.SliceLayout(1, rows))
        p_part = parts_ptr + o_part * D + o_i[:, None] * D + o_d[None, :]
        gl.store(p_part, gl.convert_layout(b_o, rows), mask=m_t)
        b_lse = gl.where(b_sum > 0.0, b_max + gl.log2(b_sum), -float("inf"))
        gl.store(lses_ptr + o_part + gl.arange(0, HALF, gl.SliceLayout(1, mma)), b_lse)


@jit(do_not_specialize=["tables_stride", "page_rows"], do_not_specialize_on_alignment=METADATA)
def _attend_kernel(
    q_ptr,
    k_desc,
    v_desc,
    o_ptr,
    parts_ptr,
    lses_ptr,
    items_ptr,
    tables_ptr,
    slots_ptr,
    cu_seqlens_ptr,
    starts_ptr,
    tables_stride,
    page_rows,
    scale,
    q_row_stride,
    q_head_stride,
    H,
    G,
    D: gl.constexpr,
    ROWS: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    q_layout: gl.constexpr,
    tiles_layout: gl.constexpr,
):
    """One item, one key-value head with its G heads."""
    dtype: gl.constexpr = k_desc.dtype
    PIECES: gl.constexpr = STAGES * (D // 64) * 2
    HALF: gl.constexpr = ROWS // 2
    i_h = gl.program_id(1)
    p_item = items_ptr + gl.program_id(0) * 5
    i_n = gl.load(p_item)
    pair = gl.load(p_item + 1)
    first = gl.load(p_item + 2) // KEYS
    blocks = (gl.load(p_item + 3) + KEYS - 1) // KEYS - first
    part = gl.load(p_item + 4)
    begin = gl.load(cu_seqlens_ptr + i_n)
    n = gl.load(cu_seqlens_ptr + i_n + 1) - begin
    start = gl.load(starts_ptr + i_n).to(gl.int32)
    p_table = tables_ptr + gl.load(slots_ptr + i_n).to(gl.int64) * tables_stride
    last_page = (start + n - 1) // 64

    q_tiles = gl.allocate_shared_memory(dtype, [2, HALF, D], q_layout)
    k_pieces = gl.allocate_shared_memory(dtype, [PIECES, 64, 64], k_desc.layout)
    v_pieces = gl.allocate_shared_memory(dtype, [PIECES, 64, 64], v_desc.layout)
    k_tiles = k_pieces._reinterpret(dtype, [STAGES, KEYS, D], tiles_layout)
    v_tiles = v_pieces._reinterpret(dtype, [STAGES, KEYS, D], tiles_layout)
    k_arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_arrived.index(i), count=1)
        mbarrier.init(v_arrived.index(i), count=1)
        mbarrier.init(k_read.index(i), count=2)
        mbarrier.init(v_read.index(i), count=2)
    fence_async_shared()

    item = (begin, n, start, pair, first, blocks, part, H, G, i_h)
    inputs = (q_ptr, o_ptr, parts_ptr, lses_ptr, scale, q_row_stride, q_head_stride)
    tiles = (q_tiles, k_tiles, v_tiles)
    barriers = (k_arrived, v_arrived, k_read, v_read)
    pieces = (k_pieces, v_pieces)
    descs = (k_desc, v_desc)
    gl.warp_specialize(
        [
            (_attend, (0, inputs, item, tiles, barriers)),
            (_attend, (1, inputs, item, tiles, barriers)),
            (
                _load,
                (p_table, page_rows, i_h * D, first, blocks, last_page, descs, pieces, barriers),
            ),
        ],
        [4, 1],
        [240, 24],
    )


def serves(q: torch.Tensor, pages_k: torch.Tensor, pages_v: torch.Tensor) -> bool:
    """Whether card, types and sizes are the kernel's, and the strides those of bulk copies."""
    if card(q.device) != (9, 0) or q.dtype not in DTYPES or q.shape[-1] not in DIMENSIONS:
        return False
    if pages_k.shape[1] != PAGE or pages_k.stride(0) != pages_v.stride(0):
        return False
    return pages_k.stride(0) % pages_k.stride(1) == 0 and all(
        x.data_ptr() % 16 == 0 for x in (q, pages_k, pages_v)
    )


@lru_cache(maxsize=8)
def _layout(dtype: torch.dtype, rows: int, columns: int) -> Any:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], gl.dtype(DTYPES[dtype]))


def _descriptor(pages: torch.Tensor) -> Any:
    """Pages as a matrix with a row of all heads for each position, and for what lies between."""
    blocks, _, _, _ = pages.shape
    pitch = pages.stride(1)
    shape = [(blocks - 1) * (pages.stride(0) // pitch) + PAGE, pitch]
    return TensorDescriptor(pages, shape, [pitch, 1], [PAGE, 64], _layout(pages.dtype, PAGE, 64))


def attend(
    q: torch.Tensor,
    pages_k: torch.Tensor,
    pages_v: torch.Tensor,
    tables: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens: torch.Tensor,
    starts: torch.Tensor,
    items: torch.Tensor,
    scale: float,
    o: torch.Tensor,
    parts: torch.Tensor,
    lses: torch.Tensor,
) -> None:
    """o, and the parts of tiles that are cut, by items of a plan (see kernels.pieces)."""
    _, H, D = q.shape
    Hkv = pages_k.shape[2]
    _attend_kernel[(len(items), Hkv)](
        q,
        _descriptor(pages_k),
        _descriptor(pages_v),
        o,
        parts,
        lses,
        items,
        tables,
        slots,
        cu_seqlens,
        starts,
        tables.stride(0),
        pages_k.stride(0) // pages_k.stride(1),
        float(scale) * LOG2_E,
        q.stride(0),
        q.stride(1),
        H,
        H // Hkv,
        D=D,
        ROWS=ROWS,
        KEYS=KEYS,
        STAGES=STAGES,
        q_layout=_layout(q.dtype, ROWS // 2, D),
        tiles_layout=_layout(q.dtype, KEYS, D),
        num_warps=4,
    )
