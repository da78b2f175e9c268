"""Lightning attention over chunks of any length, each from its slot's state and back into it.

For a block of m tokens i = 1..m after the state S, with lam = exp(-slope):

    o_i = scale (lam^i q_i^T S + sum_{j<=i} lam^(i-j) (q_i . k_j) v_j)
    S'  = S + S expm1(-slope m) + sum_j lam^(m-j) k_j v_j^T

The decay of S is a difference, not a product, and joins the sum before S does: slopes go down to
4e-8, where float32 rounds lam, and would round S + S expm1 back to S.
On the GPU a long sequence is cut into segments, in three kernels: what each leaves in a state that
started from zero, a scan that turns this into the states that segments start from, and the formula
above for segments and short sequences side by side. A sequence of middling length is rather cut
for the last kernel alone, whose segments then read again the keys and values that come before them:
that costs bytes, which lie in the cache, and saves time. The specification is lightning_reference.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

import torch

from kernels import lightning_prefill_hopper as hopper
from kernels.language import dot_precision, expm1, felt, jit, next_power_of_2, tl
from kernels.launches import Launch, Launches, launch
from kernels.packing import Packing, output
from kernels.segments import Work, plan, uncut
from kernels.tuning import PrefillTuning, prefill_tuning, processors

SPAN = 2048  # rows that the torch path works on at a time: they stay in the cache
SCANNED = 1024  # elements of a state that a program of the scan takes
LAUNCHES = Launches()
VIEWS = ["items_ptr", "chains_ptr", "cu_seqlens_ptr", "slots_ptr", "starts_ptr"]  # aligned at times


@jit
def _fold(b_s, b_k, b_v, leave, PRECISION: tl.constexpr, APART: tl.constexpr):
    """S + S leave + k^T v, where v carries the decays.

    They are not k's, so that Hopper's matrix instructions read k as it lies in shared memory: by
    way of registers, this product is compiled into wrong addresses. APART adds S leave to the
    product before S, which float32 inputs need and which takes more registers.
    """
    if APART:
        return b_s + tl.dot(tl.trans(b_k), b_v, b_s * leave, input_precision=PRECISION)
    return tl.dot(tl.trans(b_k), b_v, b_s + b_s * leave, input_precision=PRECISION)


@jit(do_not_specialize=["L"], do_not_specialize_on_alignment=VIEWS)
def _contributions_kernel(
    k_ptr,
    v_ptr,
    slopes_ptr,
    contributions_ptr,
    items_ptr,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    L,
    H,
    DK,
    DV,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    APART: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What the L rows before a segment leave in a state: of them, those that can still be felt."""
    i_v, i_h, i_w = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    end = tl.load(items_ptr + i_w * 4).to(tl.int64)
    slope = tl.load(slopes_ptr + i_h)
    blocks = tl.minimum(L // C, felt(slope) // C + 1)

    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BLOCK_K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k, m_v = o_k < DK, o_v < DV
    o_ik = o_i[:, None] * k_row_stride + o_k
    o_iv = o_i[:, None] * v_row_stride + o_v
    b_after = tl.exp(-slope * (C - 1 - o_i))[:, None]  # [C, 1]
    leave = expm1(-slope * C)
    row = end - blocks.to(tl.int64) * C
    p_k = k_ptr + row * k_row_stride + i_h * k_head_stride
    p_v = v_ptr + row * v_row_stride + i_h * v_head_stride
    b_s = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for _ in tl.range(0, blocks, num_stages=STAGES):
        b_k = tl.load(p_k + o_ik, mask=m_k[None, :], other=0.0)  # [C, K]
        b_v = tl.load(p_v + o_iv, mask=m_v[None, :], other=0.0)  # [C, V]
        b_v = (b_v * b_after).to(b_v.dtype)
        b_s = _fold(b_s, b_k, b_v, leave, PRECISION, APART)
        p_k += C * k_row_stride
        p_v += C * v_row_stride
    p_s = contributions_ptr + (i_w * H + i_h) * DK * DV + o_k[:, None] * DV + o_v
    tl.store(p_s, b_s, mask=m_k[:, None] & m_v)


@jit(do_not_specialize=["L"], do_not_specialize_on_alignment=VIEWS)
def _scan_kernel(
    slopes_ptr,
    states_ptr,
    segments_ptr,
    chains_ptr,
    slots_ptr,
    starts_ptr,
    states_stride,
    L,
    SIZE,
    H,
    BLOCK: tl.constexpr,
):
    """Contributions to a sequence's segments become, in place, the states that they start from."""
    i_b, i_h, i_c = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_n = tl.load(chains_ptr + i_c * 4)
    head = tl.load(chains_ptr + i_c * 4 + 1).to(tl.int64)
    first = tl.load(chains_ptr + i_c * 4 + 2).to(tl.int64)
    count = tl.load(chains_ptr + i_c * 4 + 3)
    slot = tl.load(slots_ptr + i_n).to(tl.int64)
    start = tl.load(starts_ptr + i_n)
    leave = expm1(-tl.load(slopes_ptr + i_h) * L)

    o_s = i_b * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < SIZE
    p_state = states_ptr + slot * states_stride + i_h * SIZE + o_s
    b_s = tl.load(p_state, mask=m_s & (start > 0), other=0.0).to(tl.float32)
    p_segments = segments_ptr + i_h * SIZE + o_s
    tl.store(p_segments + head * H * SIZE, b_s, mask=m_s)
    p_segments += first * H * SIZE
    for _ in tl.range(0, count, num_stages=4):
        b_s += b_s * leave + tl.load(p_segments, mask=m_s, other=0.0)
        tl.store(p_segments, b_s, mask=m_s)
        p_segments += H * SIZE


@jit(do_not_specialize=["segments"], do_not_specialize_on_alignment=VIEWS)
def _outputs_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slopes_ptr,
    scale,
    states_ptr,
    o_ptr,
    segments_ptr,
    items_ptr,
    cu_seqlens_ptr,
    slots_ptr,
    starts_ptr,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    states_stride,
    segments,
    H,
    DK,
    DV,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
    APART: tl.constexpr,
    STAGES: tl.constexpr,
    REREAD: tl.constexpr,
):
    """One segment or whole sequence, one head, BLOCK_V columns of the state, kept on chip.

    REREAD: a segment starts from the state that its sequence had, and from the rows before it.
    """
    i_v, i_h, i_w = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    begin = tl.load(items_ptr + i_w * 4).to(tl.int64)
    n = tl.load(items_ptr + i_w * 4 + 1)
    if n == 0:
        return
    i_n = tl.load(items_ptr + i_w * 4 + 2)
    last = tl.load(items_ptr + i_w * 4 + 3)
    slot = tl.load(slots_ptr + i_n).to(tl.int64)
    start = tl.load(starts_ptr + i_n)
    slope = tl.load(slopes_ptr + i_h)

    o_i = tl.arange(0, C)
    o_k = tl.arange(0, BLOCK_K)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_k, m_v = o_k < DK, o_v < DV
    o_iq = o_i[:, None] * q_row_stride + o_k
    o_ik = o_i[:, None] * k_row_stride + o_k
    o_iv = o_i[:, None] * v_row_stride + o_v
    o_io = o_i[:, None] * H * DV + o_v
    b_age = o_i[:, None] - o_i
    b_among = tl.where(b_age >= 0, tl.exp(-slope * tl.maximum(b_age, 0)), 0.0) * scale  # [C, C]
    b_before = (tl.exp(-slope * (o_i + 1)) * scale)[:, None]  # [C, 1]

    o_s = i_h * DK * DV + o_k[:, None] * DV + o_v
    m_s = m_k[:, None] & m_v
    p_state = states_ptr + slot * states_stride + o_s
    if i_w < segments:
        home = i_n.to(tl.int64) if REREAD else i_w
        b_s = tl.load(segments_ptr + home * H * DK * DV + o_s, mask=m_s, other=0.0)  # [K, V]
    else:
        b_s = tl.load(p_state, mask=m_s & (start > 0), other=0.0).to(tl.float32)
    if REREAD:
        before = (begin - tl.load(cu_seqlens_ptr + i_n)).to(tl.int32)
        blocks = tl.minimum(before // C, felt(slope) // C + 1)
        row = begin - blocks * C
        p_k = k_ptr + row * k_row_stride + i_h * k_head_stride
        p_v = v_ptr + row * v_row_stride + i_h * v_head_stride
        b_u = b_s * expm1(-slope * before)  # what the rows before change in the state
        for i in tl.range(0, blocks, num_stages=STAGES):
            o_left = (blocks - i) * C - 1 - o_i  # rows between this one and the segment
            b_k = tl.load(p_k + o_ik, mask=m_k[None, :], other=0.0)  # [C, K]
            b_v = tl.load(p_v + o_iv, mask=m_v[None, :], other=0.0)  # [C, V]
            b_v = (b_v * tl.exp(-slope * o_left)[:, None]).to(b_v.dtype)
            b_u = tl.dot(tl.trans(b_k), b_v, b_u, input_precision=PRECISION)
            p_k += C * k_row_stride
            p_v += C * v_row_stride
        b_s += b_u
    p_q = q_ptr + begin * q_row_stride + i_h * q_head_stride
    p_k = k_ptr + begin * k_row_stride + i_h * k_head_stride
    p_v = v_ptr + begin * v_row_stride + i_h * v_head_stride
    p_o = o_ptr + (begin * H + i_h) * DV
    for first in tl.range(0, n, C, num_stages=STAGES):
        m = tl.minimum(n - first, C)
        m_i = (o_i < m)[:, None]
        b_q = tl.load(p_q + o_iq, mask=m_i & m_k, other=0.0)  # [C, K]
        b_k = tl.load(p_k + o_ik, mask=m_i & m_k, other=0.0)  # [C, K]
        b_v = tl.load(p_v + o_iv, mask=m_i & m_v, other=0.0)  # [C, V]

        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_among  # [C, C]
        b_o = tl.dot(b_q, b_s.to(b_q.dtype), input_precision=PRECISION) * b_before
        b_o = tl.dot(b_scores.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)  # [C, V]
        tl.store(p_o + o_io, b_o.to(o_ptr.dtype.element_ty), mask=m_i & m_v)

        b_after = tl.exp(-slope * tl.maximum(m - 1 - o_i, 0))[:, None]  # [C, 1]
        b_v = (b_v * b_after).to(b_v.dtype)
        b_s = _fold(b_s, b_k, b_v, expm1(-slope * m), PRECISION, APART)
        p_q += C * q_row_stride
        p_k += C * k_row_stride
        p_v += C * v_row_stride
        p_o += C * H * DV
    if last > 0:
        tl.store(p_state, b_s.to(states_ptr.dtype.element_ty), mask=m_s)


def work_for(states: torch.Tensor, packing: Packing, tuning: PrefillTuning, bulk: bool) -> Work:
    """How sequences are cut where a card has as many heads going on at a time as it holds. bulk:
    for Hopper's kernel, whose segments may share a state where each has a processor to itself.
    Those that the host does not know stay whole."""
    if packing.items is not None:
        return uncut(packing.items)
    H, dk, dv = states.shape[1:]
    each = -(-dv // (hopper.V if bulk else tuning.outputs.columns))  # programs of a head

    def heads(resident: int) -> int:
        return max(processors(states.device) * resident // each, 1)

    sharing = heads(1) if bulk else 0
    once = tuning.reread and (heads(tuning.reread.resident), tuning.reread.cost, sharing)
    return plan(packing, H, heads(tuning.resident), 4 * dk * dv, once)


def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    packing: Packing,
    o: torch.Tensor,
    tuning: PrefillTuning | None = None,
) -> None:
    """As these tensors' shapes were launched before, or anew."""
    H, dk, dv = states.shape[1:]
    BLOCK_K = max(next_power_of_2(dk), 16)
    tuning = tuning or prefill_tuning(q.device, q.dtype.itemsize, BLOCK_K)
    bulk = hopper.serves(q, k, v)
    work = work_for(states, packing, tuning, bulk)
    segment_states = torch.empty(work.states, H, dk, dv, dtype=torch.float32, device=q.device)
    rows = packing.cu_seqlens, packing.slots, packing.starts
    rest = (*rows, hopper.readers(q.device)) if bulk else rows
    tensors = q, k, v, slopes, states, o, segment_states, work.items, work.chains, *rest
    numbers = scale, tuning, work.length, work.reread, work.continuing, work.segments
    if not (q.is_cuda and LAUNCHES.again(tensors, *numbers)):
        made = _launched(scale, work, packing, tuning, BLOCK_K, bulk, tensors)
        LAUNCHES.keep(made, tensors, *numbers)


def _launched(
    scale: float,
    work: Work,
    packing: Packing,
    tuning: PrefillTuning,
    BLOCK_K: int,
    bulk: bool,
    tensors: tuple[torch.Tensor, ...],
) -> list[Launch | None]:
    """Contributions of segments, their scan, then outputs: the last alone where nothing is cut.

    Where segments read again what comes before them, the scan only copies the states that they all
    start from, for the last segment writes its sequence's; no copy of what starts from nothing, nor
    where that segment waits until the others have read.
    """
    q, k, v, slopes, states, o, segment_states = tensors[:7]
    H, dk, dv = states.shape[1:]
    first, last = tuning.contributions, tuning.outputs
    stages = tuning.reread.stages if tuning.reread and work.reread else None
    kv_strides = k.stride(0), k.stride(1), v.stride(0), v.stride(1)
    precision, apart = dot_precision(q.dtype), q.dtype.itemsize == 4
    made = []
    if work.continuing:
        assert work.length % first.C == 0
        BLOCK_V = max(min(next_power_of_2(dv), first.columns), 16)
        made.append(
            launch(
                _contributions_kernel,
                (-(-dv // BLOCK_V), H, work.continuing),
                tensors,
                k,
                v,
                slopes,
                segment_states,
                work.items,
                *kv_strides,
                work.length,
                H,
                dk,
                dv,
                C=first.C,
                BLOCK_K=BLOCK_K,
                BLOCK_V=BLOCK_V,
                PRECISION=precision,
                APART=apart,
                STAGES=first.stages,
                num_warps=first.warps,
            )
        )
    if len(work.chains):
        made.append(
            launch(
                _scan_kernel,
                (-(-dk * dv // SCANNED), H, len(work.chains)),
                tensors,
                slopes,
                states,
                segment_states,
                work.chains,
                packing.slots,
                packing.starts,
                states.stride(0),
                work.length,
                dk * dv,
                H,
                BLOCK=SCANNED,
                num_warps=4,
            )
        )
    if bulk:
        made.append(hopper.outputs(scale, work, packing, stages or hopper.STAGES, tensors))
        return made
    BLOCK_V = max(min(next_power_of_2(dv), last.columns), 16)
    made.append(
        launch(
            _outputs_kernel,
            (-(-dv // BLOCK_V), H, len(work.items)),
            tensors,
            q,
            k,
            v,
            slopes,
            float(scale),
            states,
            o,
            segment_states,
            work.items,
            packing.cu_seqlens,
            packing.slots,
            packing.starts,
            q.stride(0),
            q.stride(1),
            *kv_strides,
            states.stride(0),
            work.segments,
            H,
            dk,
            dv,
            C=last.C,
            BLOCK_K=BLOCK_K,
            BLOCK_V=BLOCK_V,
            PRECISION=precision,
            APART=apart,
            STAGES=stages or last.stages,
            REREAD=work.reread,
            num_warps=last.warps,
        )
    )
    return made


@lru_cache(maxsize=128)
def _decays(slopes: tuple[float, ...], scale: float, C: int) -> tuple[torch.Tensor, ...]:
    """scale lam^(i-j) for i >= j, else 0 [H, C, C]; scale lam^i, lam^(C-j) [H, C, 1]."""
    s = torch.tensor(slopes, dtype=torch.float64)[:, None, None]
    i = torch.arange(C, dtype=torch.float64)
    among = torch.exp(-s * (i[:, None] - i).clamp(min=0)).tril()
    before = torch.exp(-s * (i[:, None] + 1))
    after = torch.exp(-s * (C - 1 - i[:, None]))
    return (scale * among).float(), (scale * before).float(), after.float()


def _blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: tuple[float, ...],
    scale: float,
    S: torch.Tensor,
    o: torch.Tensor,
    C: int,
) -> torch.Tensor:
    """M blocks of m <= C rows of G sequences: q, k, v, o [G, M, m, H, d], S [G, H, d, d] -> S'."""
    among, before, after = _decays(slopes, scale, C)
    m = q.shape[2]
    among, before, after = among[:, :m, :m], before[:, :m], after[:, C - m :]
    leave = torch.tensor(slopes, dtype=torch.float64).mul_(-m).expm1_().float()[:, None, None]
    # [M, G, H, m, d]: blocks first, so that the states of one moment lie together
    q, k, v = (x.float().permute(1, 0, 3, 2, 4).contiguous() for x in (q, k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(among)
    updates = torch.matmul((k * after).transpose(-1, -2), v)
    states = torch.empty(len(q) + 1, *S.shape)
    states[0] = S
    moments = states.unbind(0)
    for old, update, new in zip(moments, updates.unbind(0), moments[1:], strict=False):
        torch.addcmul(update, old, leave, out=new).add_(old)
    y = torch.matmul(q, states[:-1]).mul_(before)
    y.view(-1, m, y.shape[-1]).baddbmm_(scores.flatten(0, 2), v.flatten(0, 2))
    o.copy_(y.permute(1, 0, 3, 2, 4))
    return states[-1]


def _torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    packing: Packing,
    o: torch.Tensor,
) -> None:
    """Blocks of C rows by matrix products; neighbours of equal length go together."""
    if packing.items is not None:
        for row, n, i, _ in packing.items.tolist():
            if n:
                at = packing.slots[i : i + 1], packing.starts[i : i + 1]
                one = Packing((n,), packing.cu_seqlens[:2], *at)
                q_, k_, v_, o_ = (x[row : row + n] for x in (q, k, v, o))
                _torch(q_, k_, v_, slopes, scale, states, one, o_)
        return
    C = 128 if q.shape[-1] > 96 else 64
    decay = tuple(slopes.tolist())
    rows = (0, *accumulate(packing.lengths))
    i = 0
    while i < len(packing.lengths):
        n = packing.lengths[i]
        G = 1
        while (G + 1) * n <= SPAN and packing.lengths[i + G : i + G + 1] == (n,):
            G += 1
        slots, fresh = packing.slots[i : i + G], packing.starts[i : i + G] == 0
        S = states[slots].float().masked_fill_(fresh[:, None, None, None], 0.0)
        group = [x[rows[i] : rows[i + G]].unflatten(0, (G, n)) for x in (q, k, v, o)]
        whole = n // C * C
        for a in range(0, whole, SPAN):
            part = [x[:, a : min(a + SPAN, whole)].unflatten(1, (-1, C)) for x in group]
            S = _blocks(part[0], part[1], part[2], decay, scale, S, part[3], C)
        if whole < n:
            part = [x[:, None, whole:] for x in group]
            S = _blocks(part[0], part[1], part[2], decay, scale, S, part[3], C)
        states[slots] = S.to(states.dtype)
        i += G


def lightning_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    packing: Packing,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q, k [T, H, dk], v [T, H, dv], slopes [H] float32 -> o [T, H, dv] in v's dtype.

    states [S, H, dk, dv] float32 or bfloat16, updated in place at packing.slots. q, k, v and the
    states may be views: only the last dimension of q, k, v and a whole state need be contiguous.
    out: contiguous memory for o. Where packing.items say so, T rows are at least those of the
    sequences, and o of the others is whatever it was.
    """
    T, H, dk = q.shape
    dv = v.shape[-1]
    assert k.shape == (T, H, dk) and v.shape == (T, H, dv) and q.dtype == k.dtype == v.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert slopes.shape == (H,) and slopes.dtype == torch.float32 and slopes.is_contiguous()
    assert states.shape[1:] == (H, dk, dv) and states[0].is_contiguous()
    assert packing.items is not None or sum(packing.lengths) == T
    assert packing.slots.dtype == torch.int32
    assert packing.starts.dtype == torch.int64 and packing.cu_seqlens.dtype == torch.int32
    o = output((T, H, dv), v, out)
    (_triton if q.is_cuda else _torch)(q, k, v, slopes, scale, states, packing, o)
    return o
