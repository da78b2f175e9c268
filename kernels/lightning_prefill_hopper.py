"""The last pass of lightning_prefill on Hopper: 16-bit inputs, keys of 128.

The same formula, in Gluon, for the order of things: rows come by bulk copies a block ahead, and
the warps scale, convert and store while the matrix units multiply. No first operand goes from
shared memory through registers (see lightning_prefill).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from kernels.language import HAVE_TRITON, barrier, expm1, felt
from kernels.launches import Launch, launch
from kernels.packing import Packing
from kernels.segments import Work
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

C = 64  # rows at a time
K = 128  # rows of the state
V = 64  # its columns, per program: two programs fit on a multiprocessor
STAGES = 2  # blocks of rows in shared memory
READERS = 4096  # more than programs that go on at a time
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
VIEWS = ["items_ptr", "cu_seqlens_ptr", "slots_ptr", "starts_ptr"]  # aligned now and then


def jit(**options: Any) -> Any:
    """gluon.jit, or the function as it is where Triton is not installed."""
    return gluon.jit(**options) if HAVE_TRITON else lambda function: function


@jit()
def _fetch(i, row, real, descs, columns, tiles, arrived):
    """Ask for the rows of block i; its barrier in `arrived` turns when they are there."""
    stage = i % tiles[0].shape[0]
    size: gl.constexpr = (
        descs[0].block_type.nbytes + descs[1].block_type.nbytes + descs[2].block_type.nbytes
    )
    bar = arrived.index(stage)
    mbarrier.expect(bar, size, pred=real)
    for x in gl.static_range(3):
        tile = tiles[x].index(stage)
        tma.async_copy_global_to_shared(descs[x], [row, columns[x]], bar, tile, pred=real)


@jit()
def _fetch_either(i, row, real, whole, descs, columns, tiles, arrived):
    """The same of a block whose q is wanted only if it is `whole`."""
    stage = i % tiles[0].shape[0]
    size: gl.constexpr = descs[1].block_type.nbytes + descs[2].block_type.nbytes
    bar = arrived.index(stage)
    mbarrier.expect(bar, size, pred=real & (not whole))
    mbarrier.expect(bar, size + descs[0].block_type.nbytes, pred=real & whole)
    for x in gl.static_range(3):
        tile = tiles[x].index(stage)
        wanted = real & whole if x == 0 else real
        tma.async_copy_global_to_shared(descs[x], [row, columns[x]], bar, tile, pred=wanted)


@jit()
def _weigh(j, again, slope, v_tiles, arrived, rows: gl.constexpr, C: gl.constexpr):
    """Wait for the rows of block j, and let their values be as old as the segment makes them, where
    the block comes before it; those of its own blocks stay as they are."""
    stage = j % v_tiles.shape[0]
    v = v_tiles.index(stage)
    mbarrier.wait(arrived.index(stage), (j // v_tiles.shape[0]) & 1)
    age = gl.maximum((again - j) * C - 1 - gl.arange(0, C, gl.SliceLayout(1, rows)), 0)
    b_after = gl.where(j < again, gl.exp(-slope * age), 1.0)[:, None]  # [C, 1]
    v.store((v.load(rows).to(gl.float32) * b_after).to(v.dtype))


@jit(do_not_specialize=["segments", "length"], do_not_specialize_on_alignment=VIEWS)
def _outputs_kernel(
    q_desc,
    k_desc,
    v_desc,
    slopes_ptr,
    scale,
    states_ptr,
    o_ptr,
    segments_ptr,
    readers_ptr,
    items_ptr,
    cu_seqlens_ptr,
    slots_ptr,
    starts_ptr,
    q_head_stride,
    k_head_stride,
    v_head_stride,
    states_stride,
    segments,
    length,
    H,
    C: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    STAGES: gl.constexpr,
    REREAD: gl.constexpr,
    SHARED: gl.constexpr,
):
    """One segment or whole sequence, one head, V columns of the state, which stays on chip.

    REREAD: a segment starts from the state that its sequence had, and from the rows before it.
    SHARED: that is the one in the slot, which is changed once all have read it: they go on at a
    time, and each says so in `readers`.
    """
    dtype: gl.constexpr = q_desc.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    scores_a: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    i_v, i_h, i_w = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    DV = gl.num_programs(0) * V
    begin = gl.load(items_ptr + i_w * 4)
    n = gl.load(items_ptr + i_w * 4 + 1)
    if n == 0:
        return
    i_n = gl.load(items_ptr + i_w * 4 + 2)
    last = gl.load(items_ptr + i_w * 4 + 3)
    slot = gl.load(slots_ptr + i_n).to(gl.int64)
    start = gl.load(starts_ptr + i_n)
    slope = gl.load(slopes_ptr + i_h)

    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, K], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, K], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, C, V], v_desc.layout)
    s_tile = gl.allocate_shared_memory(dtype, [K, V], v_desc.layout)
    u_tile = gl.allocate_shared_memory(dtype, [C, V], v_desc.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(arrived.index(i), count=1)
    fence_async_shared()
    descs, tiles = (q_desc, k_desc, v_desc), (q_tiles, k_tiles, v_tiles)
    columns = (i_h * q_head_stride, i_h * k_head_stride, i_h * v_head_stride + i_v * V)
    if REREAD:
        before = begin - gl.load(cu_seqlens_ptr + i_n)
        again = gl.minimum(before // C, felt(slope) // C + 1)
        first = begin - again * C
        total = again * C + n
        _fetch_either(0, first, total > 0, again == 0, descs, columns, tiles, arrived)
    else:
        again = 0
        _fetch(0, begin, n > 0, descs, columns, tiles, arrived)
    o_s = gl.arange(0, K, gl.SliceLayout(1, mma))[:, None] * DV
    o_s += i_h * K * DV + i_v * V + gl.arange(0, V, gl.SliceLayout(0, mma))[None, :]
    p_state = states_ptr + slot * states_stride + o_s
    p_readers = readers_ptr + (i_n * H + i_h) * gl.num_programs(0) + i_v
    m_s = gl.full([K, V], start, gl.int64, mma) > 0
    if SHARED:
        b_s = gl.load(p_state, mask=m_s, other=0.0).to(gl.float32)  # [K, V]
    elif i_w < segments:
        home = i_n.to(gl.int64) if REREAD else i_w
        b_s = gl.load(segments_ptr + home * H * K * DV + o_s)
    else:
        b_s = gl.load(p_state, mask=m_s, other=0.0).to(gl.float32)
    for i in gl.static_range(1, STAGES):
        if REREAD:
            real, whole = i * C < total, i >= again
            _fetch_either(i, first + i * C, real, whole, descs, columns, tiles, arrived)
        else:
            _fetch(i, begin + i * C, i * C < n, descs, columns, tiles, arrived)

    o_i = gl.arange(0, C, gl.SliceLayout(1, mma))
    o_j = gl.arange(0, C, gl.SliceLayout(0, mma))
    b_age = o_i[:, None] - o_j[None, :]
    b_among = gl.where(b_age >= 0, gl.exp(-slope * gl.maximum(b_age, 0)), 0.0) * scale  # [C, C]
    b_before = (gl.exp(-slope * (o_i + 1)) * scale)[:, None]  # [C, 1]
    o_r = gl.arange(0, C, gl.SliceLayout(1, rows))
    o_o = o_r[:, None] * H * DV + gl.arange(0, V, gl.SliceLayout(0, rows))[None, :]
    p_o = o_ptr + (begin.to(gl.int64) * H + i_h) * DV + i_v * V
    zeros_ij = gl.zeros([C, C], gl.float32, mma)
    zeros_iv = gl.zeros([C, V], gl.float32, mma)
    if REREAD:
        gl.static_assert(STAGES > 1)  # a block is waited for before the one in front has gone
        b_s += b_s * expm1(-slope * before)
        _weigh(0, again, slope, v_tiles, arrived, rows, C)
        for j in range(again):
            k, v = k_tiles.index(j % STAGES), v_tiles.index(j % STAGES)
            fence_async_shared()
            update = warpgroup_mma(k.permute((1, 0)), v, b_s, is_async=True)
            _weigh(j + 1, again, slope, v_tiles, arrived, rows, C)
            b_s = warpgroup_mma_wait(0, deps=(update,))
            ahead = (j + STAGES) * C
            real, whole = ahead < total, j + STAGES >= again
            _fetch_either(j + STAGES, first + ahead, real, whole, descs, columns, tiles, arrived)
        if SHARED:  # noqa: SIM102  (one is known to the compiler, the other is not)
            if (i_w < segments) & (last == 0):
                barrier()  # all threads have what they read
                gl.atomic_add(p_readers, 1, sem="release")
    if SHARED:
        read = gl.load(p_readers, volatile=True)  # asked for now, needed at the end
    for i in range((n + C - 1) // C):
        j = again + i
        stage = j % STAGES
        m = gl.minimum(n - i * C, C)
        m_r = (o_r < m)[:, None]
        q, k, v = q_tiles.index(stage), k_tiles.index(stage), v_tiles.index(stage)
        mbarrier.wait(arrived.index(stage), (j // STAGES) & 1)
        b_v = v.load(rows)
        if m < C:  # the rows that follow are others', and may hold NaN
            b_v = gl.where(m_r, b_v, 0.0)
            v.store(b_v)
            k.store(gl.where(m_r, k.load(rows), 0.0))
            fence_async_shared()
        scores = warpgroup_mma(q, k.permute((1, 0)), zeros_ij, use_acc=False, is_async=True)
        b_after = gl.exp(-slope * gl.maximum(m - 1 - o_r, 0))[:, None]  # [C, 1]
        u_tile.store((b_v.to(gl.float32) * b_after).to(dtype))
        s_tile.store(b_s.to(dtype))
        fence_async_shared()
        b_scores = warpgroup_mma_wait(0, deps=(scores,))
        o = warpgroup_mma(q, s_tile, zeros_iv, use_acc=False, is_async=True)
        b_p = gl.convert_layout((b_scores * b_among).to(dtype), scores_a)
        b_s += b_s * expm1(-slope * m)
        b_o = warpgroup_mma_wait(0, deps=(o,))
        o = warpgroup_mma(b_p, v, b_o * b_before, is_async=True)
        update = warpgroup_mma(k.permute((1, 0)), u_tile, b_s, is_async=True)
        b_o, b_p, b_s = warpgroup_mma_wait(1, deps=(o, b_p, update))
        gl.store(p_o + o_o, gl.convert_layout(b_o.to(dtype), rows), mask=m_r)
        b_o, b_s = warpgroup_mma_wait(0, deps=(b_o, b_s))
        ahead = (i + STAGES) * C
        _fetch(j + STAGES, begin + ahead, ahead < n, descs, columns, tiles, arrived)
        p_o += C * H * DV
    if last > 0:
        if SHARED:  # noqa: SIM102
            if i_w < segments:
                while read < before // length:
                    read = gl.load(p_readers, volatile=True)
                barrier()  # every thread has seen it
                gl.store(p_readers, 0)
        gl.store(p_state, b_s.to(states_ptr.dtype.element_ty))


def serves(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether card, types and sizes are the kernel's, and the strides those of bulk copies."""
    if card(q.device) != (9, 0) or q.dtype not in DTYPES:
        return False
    if q.shape[-1] != K or v.shape[-1] % V:
        return False
    return all(
        x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 for x in (q, k, v)
    )


@lru_cache(maxsize=8)
def _layout(dtype: torch.dtype, columns: int) -> Any:
    return gl.NVMMASharedLayout.get_default_for([C, columns], gl.dtype(DTYPES[dtype]))


def _descriptor(x: torch.Tensor, columns: int) -> Any:
    """x [T, H, d] as a matrix with a row of all heads for each token, in tiles [C, columns]."""
    T, H, d = x.shape
    shape, strides = [T, (H - 1) * x.stride(1) + d], [x.stride(0), 1]
    return TensorDescriptor(x, shape, strides, [C, columns], _layout(x.dtype, columns))


@lru_cache(maxsize=8)
def readers(device: torch.device) -> torch.Tensor:
    """How many programs have read the state of a sequence, head and group of columns: 0 before and
    after every launch. Of a device one launch at a time may count."""
    return torch.zeros(READERS, dtype=torch.int32, device=device)


def outputs(
    scale: float, work: Work, packing: Packing, stages: int, tensors: tuple[torch.Tensor, ...]
) -> Launch | None:
    """o, and the states of sequences that end, by items of a plan (see kernels.segments).

    tensors: q, k, v, slopes, states, o, segment_states, those of the plan, and readers().
    """
    q, k, v, slopes, states, o, segment_states = tensors[:7]
    H, each = q.shape[1], v.shape[-1] // V
    shared = work.reread and work.states == 0
    assert not shared or len(packing.lengths) * H * each <= READERS
    return launch(
        _outputs_kernel,
        (each, H, len(work.items)),
        tensors,
        _descriptor(q, K),
        _descriptor(k, K),
        _descriptor(v, V),
        slopes,
        float(scale),
        states,
        o,
        segment_states,
        tensors[-1],
        work.items,
        packing.cu_seqlens,
        packing.slots,
        packing.starts,
        q.stride(1),
        k.stride(1),
        v.stride(1),
        states.stride(0),
        work.segments,
        work.length,
        H,
        C=C,
        K=K,
        V=V,
        STAGES=stages,
        REREAD=work.reread,
        SHARED=shared,
        num_warps=4,
    )
