"""Lightning attention for one token of each sequence, states read at every step, rarely written.

Beside its state a slot keeps a ring: the last R keys and values. The rows of a state are folded in
slices, one slice a step by turns, so that a step writes one P-th of a state and no step has more to
do than another. A row k that has folded all but the last n_k tokens holds S_k, and position t sees

    o_t = scale sum_k q_k (lam^n_k S_k + sum_{a < n_k} lam^a k_(t-a),k v_(t-a))

Token t goes to row t mod R of the ring. With D drafted tokens that may yet be rolled back there are
P = R - D slices, and step t folds the m = n_k - D tokens of slice t mod P that are sure:

    S_k' = S_k + S_k expm1(-slope m) + sum_{D <= a < n_k} lam^(a-D) k_(t-a),k v_(t-a)

so that rolling back is to pass a smaller start. `folded` holds two positions of a slot and head:
where its state stood when the ring began, and the step up to which slices have had their turn; once
for each of some parts of its columns, which are always alike, so that of a small batch several
programs may share a head without a word between them. The specification is lightning_reference.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code=assignment
# ruff: noqa: RUF005  (Triton has no starred tuples)
from __future__ import annotations

import torch

from kernels.language import early, expm1, jit, next_power_of_2, start_early, tl
from kernels.launches import Launch, Launches, launch
from kernels.packing import PADDING, output
from kernels.tuning import RingTuning, processors, ring_tuning

MOST_REGISTERS = 255  # of a thread, where a program has a multiprocessor almost to itself
AT_ONCE = 8  # programs that a multiprocessor has room for

DECODES, FOLDS = Launches(), Launches()


@jit
def _ages(last, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """How many tokens each row of the ring lies behind the last one; R, too many, past its end."""
    o_r = tl.arange(0, BLOCK_R)
    newest = (last % R).to(tl.int32)
    b_age = newest - o_r + tl.where(o_r > newest, R, 0)
    return tl.where(o_r < R, b_age, R)


@jit
def _waiting(o_k, position, origin, done, R: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr):
    """n_k: how many of the tokens before `position` each row of the state has not folded."""
    young = tl.minimum(position - origin, R).to(tl.int32)
    turn = (done % P).to(tl.int32)
    latest = (position - done).to(tl.int32) + R - P + turn - 1
    o_slice = o_k // ROWS
    return tl.minimum(young, latest - o_slice + tl.where(o_slice < turn, 0, P))


@jit
def _add2(a, b, c, d):
    return a + c, b + d


@jit
def _add4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@jit
def _sums(b_terms, N: tl.constexpr):
    """Sums over rows of N tensors [K, V]: of 2 or 4 in one exchange between warps."""
    if N == 2:
        return tl.reduce(b_terms, 0, _add2)
    elif N == 4:
        return tl.reduce(b_terms, 0, _add4)
    else:
        b_sums = ()
        for i in tl.static_range(N):
            b_sums = b_sums + (tl.sum(b_terms[i], 0),)
        return b_sums


@jit
def _fold(b_s, b_k, b_v, leave):
    """A piece of the state [K, V] after decayed keys [K, R] float32 and values [R, V]."""
    if b_v.dtype == tl.bfloat16:  # two products take 16 bits of a key's 24, and all of a value's
        b_high = b_k.to(tl.bfloat16)
        b_low = (b_k - b_high.to(tl.float32)).to(tl.bfloat16)
        b_update = tl.dot(b_low, b_v, tl.dot(b_high, b_v))
    else:
        b_update = tl.dot(b_k, b_v.to(tl.float32), input_precision="tf32x3")
    return b_s + (b_s * leave + b_update)


@jit
def _slice(p_keys, p_state, rows, m_row, COLUMNS: tl.constexpr, BLOCK_V: tl.constexpr, DV):
    """Rows of a state that are about to be folded: their keys [K, R], and the rows [K, V]."""
    o_v = tl.arange(0, BLOCK_V)
    b_keys = tl.load(p_keys + rows[:, None], mask=m_row[:, None], other=0.0)
    b_rows = ()
    for v in tl.static_range(0, COLUMNS, BLOCK_V):
        p_rows = p_state + rows[:, None] * DV + v + o_v
        b_rows = b_rows + (tl.load(p_rows, mask=m_row[:, None], other=0.0),)
    return b_keys, b_rows


@jit(do_not_specialize_on_alignment=["slots_ptr", "starts_ptr"])
def _decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    slopes_ptr,
    scale,
    states_ptr,
    ring_k_ptr,
    ring_v_ptr,
    folded_ptr,
    o_ptr,
    slots_ptr,
    starts_ptr,
    q_row_stride,
    q_head_stride,
    k_row_stride,
    k_head_stride,
    v_row_stride,
    v_head_stride,
    states_stride,
    ring_k_stride,
    ring_v_stride,
    folded_stride,
    H,
    R: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    PIECE: tl.constexpr,
    STRIP: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One sequence, one head, one of SPLITS groups of columns: the only program that knows of their
    `folded`.

    AHEAD: a slice is read before the output is summed up: it takes registers from the loads of the
    state, which pays where all programs go on at once and the longest wait is the time.
    """
    start_early(EARLY)
    COLUMNS: tl.constexpr = DV // SPLITS
    EACH: tl.constexpr = PARTS // SPLITS
    i_h, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    i_n = tl.program_id(1).to(tl.int64)
    o_r, o_k, o_v = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    o_piece, o_row, o_s = tl.arange(0, PIECE), tl.arange(0, BLOCK_ROWS), tl.arange(0, STRIP)
    p_o = o_ptr + (i_n * H + i_h) * DV + i_s * COLUMNS
    slot = tl.load(slots_ptr + i_n).to(tl.int64)
    start = tl.load(starts_ptr + i_n)
    if slot < 0:
        if slot == -1:  # PADDING
            for v in tl.static_range(0, COLUMNS, BLOCK_V):
                tl.store(p_o + v + o_v, tl.zeros([BLOCK_V], o_ptr.dtype.element_ty))
        return
    p_q = q_ptr + i_n * q_row_stride + i_h * q_head_stride
    p_k = k_ptr + i_n * k_row_stride + i_h * k_head_stride
    p_v = v_ptr + i_n * v_row_stride + i_h * v_head_stride + i_s * COLUMNS
    p_state = states_ptr + slot * states_stride + i_h * DK * DV + i_s * COLUMNS
    p_ring_k = ring_k_ptr + slot * ring_k_stride + i_h * R * DK
    p_ring_v = ring_v_ptr + slot * ring_v_stride + i_h * R * DV + i_s * COLUMNS
    p_folded = folded_ptr + slot * folded_stride + (i_h * PARTS + i_s * EACH) * 2
    o_parts = tl.arange(0, EACH) * 2

    slope = tl.load(slopes_ptr + i_h)
    if start == 0:  # whatever the slot holds, its sequence begins
        for v in tl.static_range(0, COLUMNS, BLOCK_V):
            b_zeros = tl.zeros([PIECE, BLOCK_V], p_state.dtype.element_ty)
            for k in tl.static_range(0, DK, PIECE):
                tl.store(p_state + (k + o_piece)[:, None] * DV + v + o_v, b_zeros)
        tl.store(p_folded + o_parts, tl.zeros([EACH], tl.int64))
        tl.store(p_folded + 1 + o_parts, tl.zeros([EACH], tl.int64))
        tl.debug_barrier()
    origin = tl.load(p_folded)
    done = tl.load(p_folded + 1)
    b_age = _ages(start, R, BLOCK_R)
    b_decay = tl.exp(-slope * b_age)
    # a row out of date is read as the new token, without weight: what the ring holds there is not
    m_r = (b_age > 0) & (b_age < tl.minimum(start - origin + 1, R))
    p_keys = tl.where(m_r, p_ring_k + o_r * DK, p_k)
    p_values = tl.where(m_r, p_ring_v + o_r * DV, p_v)[:, None]
    row = (start % R).to(tl.int32)

    # every load is under way before the first sum across warps waits for any, and what a row weighs
    # is worked out once for all strips of its columns
    b_weights = ()
    for k in tl.static_range(0, DK, PIECE):
        b_n = _waiting(k + o_piece, start + 1, origin, done, R, P, ROWS)
        b_q = tl.load(p_q + k + o_piece).to(tl.float32) * tl.exp(-slope * b_n)
        b_weights = b_weights + (b_q,)
    b_sums = ()
    for s in tl.static_range(0, COLUMNS, STRIP):
        b_sum = tl.zeros([PIECE, STRIP], tl.float32)
        for k in tl.static_range(0, DK, PIECE):
            b_piece = tl.load(p_state + (k + o_piece)[:, None] * DV + s + o_s)
            b_sum += b_weights[k // PIECE][:, None] * b_piece.to(tl.float32)
        b_sums = b_sums + (b_sum,)
    b_values = ()
    for s in tl.static_range(0, COLUMNS, STRIP):
        b_values = b_values + (tl.load(p_values + s + o_s),)  # [R, STRIP]
    b_p = tl.zeros([BLOCK_R], tl.float32)
    for k in tl.static_range(0, DK, BLOCK_K):
        b_n = _waiting(k + o_k, start + 1, origin, done, R, P, ROWS)
        b_keys = tl.load(p_keys[:, None] + k + o_k)  # [R, K]
        b_product = b_keys.to(tl.float32) * tl.load(p_q + k + o_k).to(tl.float32)
        b_p += tl.sum(tl.where(b_age[:, None] < b_n, b_product, 0.0), 1)
        if i_s == 0:
            tl.store(p_ring_k + row * DK + k + o_k, tl.load(p_k + k + o_k))
    b_p *= b_decay
    due = start >= done  # else this is a step once more, after drafts
    first = (start % P).to(tl.int32) * ROWS
    m_row = (o_row < ROWS) & (first + o_row < DK) & due
    if AHEAD:  # what is folded is on its way too before anything waits
        b_late, b_rows = _slice(p_keys, p_state, first + o_row, m_row, COLUMNS, BLOCK_V, DV)
    b_terms = ()
    for s in tl.static_range(0, COLUMNS, STRIP):
        b_term = b_p[:, None] * b_values[s // STRIP].to(tl.float32)
        if PIECE == BLOCK_R:  # rows of the ring count as rows of the state
            b_term += b_sums[s // STRIP]
        b_terms = b_terms + (b_term,)
    b_os = _sums(b_terms, COLUMNS // STRIP)
    for s in tl.static_range(0, COLUMNS, STRIP):
        b_o = b_os[s // STRIP]
        if PIECE != BLOCK_R:
            b_o += tl.sum(b_sums[s // STRIP], 0)
        tl.store(p_o + s + o_s, (b_o * scale).to(o_ptr.dtype.element_ty))
    for v in tl.static_range(0, COLUMNS, BLOCK_V):
        tl.store(p_ring_v + row * DV + v + o_v, tl.load(p_v + v + o_v))

    if due:
        tl.debug_barrier()  # the slice is read, and `folded`, by every thread
        if not AHEAD:
            b_late, b_rows = _slice(p_keys, p_state, first + o_row, m_row, COLUMNS, BLOCK_V, DV)
        n = _waiting(first, start + 1, origin, done, R, P, ROWS)
        b_weight = tl.where((b_age >= R - P) & (b_age < n), tl.exp(-slope * (b_age - (R - P))), 0.0)
        leave = expm1(-slope * tl.maximum(n - (R - P), 0))
        b_k = b_late.to(tl.float32) * b_weight[None, :]
        for v in tl.static_range(0, COLUMNS, BLOCK_V):
            b_v = tl.load(p_values + v + o_v)
            p_s = p_state + (first + o_row)[:, None] * DV + v + o_v
            b_s = _fold(b_rows[v // BLOCK_V].to(tl.float32), b_k, b_v, leave)
            tl.store(p_s, b_s.to(p_state.dtype.element_ty), mask=m_row[:, None])
        tl.store(p_folded + 1 + o_parts, tl.zeros([EACH], tl.int64) + (start + 1))


@jit(do_not_specialize_on_alignment=["slots_ptr", "starts_ptr", "ends_ptr"])
def _fold_kernel(
    slopes_ptr,
    states_ptr,
    ring_k_ptr,
    ring_v_ptr,
    folded_ptr,
    slots_ptr,
    starts_ptr,
    ends_ptr,
    states_stride,
    ring_k_stride,
    ring_v_stride,
    folded_stride,
    R: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One sequence, one head."""
    start_early(EARLY)
    i_h, i_n = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots_ptr + i_n).to(tl.int64)
    if slot < 0:
        return
    start = tl.load(starts_ptr + i_n)
    p_folded = folded_ptr + slot * folded_stride + i_h * PARTS * 2
    origin = tl.where(start > 0, tl.load(p_folded), 0)
    done = tl.where(start > 0, tl.load(p_folded + 1), 0)
    if start > origin:
        o_r, o_k, o_v = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
        p_state = states_ptr + slot * states_stride + i_h * DK * DV
        p_k = ring_k_ptr + slot * ring_k_stride + i_h * R * DK
        p_v = ring_v_ptr + slot * ring_v_stride + i_h * R * DV
        slope = tl.load(slopes_ptr + i_h)
        b_age = _ages(start - 1, R, BLOCK_R)
        m_r = b_age < tl.minimum(start - origin, R)
        b_decay = tl.exp(-slope * b_age)
        for v in tl.static_range(0, DV, BLOCK_V):
            b_v = tl.load(p_v + o_r[:, None] * DV + v + o_v, mask=m_r[:, None], other=0.0)  # [R, V]
            for k in range(0, DK, BLOCK_K):
                b_n = _waiting(k + o_k, start, origin, done, R, P, ROWS)[:, None]
                p_s = p_state + (k + o_k)[:, None] * DV + v + o_v
                b_s = tl.load(p_s).to(tl.float32)  # [K, V]
                m_k = m_r & (b_age < b_n)
                b_k = tl.load(p_k + k + o_k[:, None] + o_r * DK, mask=m_k, other=0.0)  # [K, R]
                b_s = _fold(b_s, b_k.to(tl.float32) * b_decay, b_v, expm1(-slope * b_n))
                tl.store(p_s, b_s.to(p_state.dtype.element_ty))
    tl.debug_barrier()  # `folded` is known to every thread
    end = tl.load(ends_ptr + i_n)
    tl.store(p_folded + tl.arange(0, PARTS * 2), tl.zeros([PARTS * 2], tl.int64) + end)


def _divisor(n: int, most: int) -> int:
    """The largest power of two that divides n, or `most`: tiles of it need no mask."""
    return min(n & -n, most)


def parts(dv: int) -> int:
    """Of a state's columns: how many programs at most share a head, a power of two."""
    return max(_divisor(dv, 128) // 16, 1)


def splits(parts: int, dv: int, columns: int, heads: int, programs: int) -> int:
    """Programs a head: one for so many columns, more where all heads would not fill the card."""
    found = 1
    while found < parts and (dv // found > columns or heads * found < programs):
        found *= 2
    return found


def _slices(R: int, drafts: int, dk: int) -> dict[str, int]:
    """R and P, tokens in the ring and slices of the state, and how many ROWS a slice has."""
    P = R - drafts
    return {"R": R, "P": P, "ROWS": -(-dk // P)}


def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    drafts: int,
    o: torch.Tensor,
    tuning: RingTuning | None = None,
) -> Launch | None:
    N, H, dk = q.shape
    dv = v.shape[-1]
    R = ring_k.shape[2]
    slices = _slices(R, drafts, dk)
    tuning = tuning or ring_tuning(q.device, states.element_size())
    PARTS = folded.shape[2]
    SPLITS = splits(PARTS, dv, tuning.columns, N * H, processors(q.device))
    programs = N * H * SPLITS
    few = 2 * processors(q.device) >= programs
    tensors = q, k, v, slopes, states, ring_k, ring_v, folded, slots, starts, o
    return launch(
        _decode_kernel,
        (H * SPLITS, N),
        tensors,
        q,
        k,
        v,
        slopes,
        float(scale),
        states,
        ring_k,
        ring_v,
        folded,
        o,
        slots,
        starts,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        states.stride(0),
        ring_k.stride(0),
        ring_v.stride(0),
        folded.stride(0),
        H,
        **slices,
        DK=dk,
        DV=dv,
        BLOCK_R=max(next_power_of_2(R), 16),
        PIECE=_divisor(dk, max(next_power_of_2(R), 16)),
        BLOCK_K=_divisor(dk, 128),
        BLOCK_V=_divisor(dv // SPLITS, 128),
        BLOCK_ROWS=max(next_power_of_2(slices["ROWS"]), 16),
        STRIP=_divisor(dv // SPLITS, tuning.strip),
        PARTS=PARTS,
        SPLITS=SPLITS,
        AHEAD=AT_ONCE * processors(q.device) >= programs,
        num_warps=tuning.warps,
        maxnreg=MOST_REGISTERS if few else tuning.registers,
        **early(q.device),
    )


def _triton_fold(
    slopes: torch.Tensor,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    drafts: int,
) -> Launch | None:
    H, dk, dv = states.shape[1:]
    R = ring_k.shape[2]
    return launch(
        _fold_kernel,
        (H, len(slots)),
        (slopes, states, ring_k, ring_v, folded, slots, starts, ends),
        slopes,
        states,
        ring_k,
        ring_v,
        folded,
        slots,
        starts,
        ends,
        states.stride(0),
        ring_k.stride(0),
        ring_v.stride(0),
        folded.stride(0),
        **_slices(R, drafts, dk),
        DK=dk,
        DV=dv,
        BLOCK_R=max(next_power_of_2(R), 16),
        BLOCK_K=_divisor(dk, 32),
        BLOCK_V=_divisor(dv, 128),
        PARTS=folded.shape[2],
        num_warps=4,
        **early(slopes.device),
    )


def _unfolded(
    positions: torch.Tensor, origin: torch.Tensor, done: torch.Tensor, dk: int, R: int, drafts: int
) -> torch.Tensor:
    """n_k [N, dk]: how many tokens before positions [N] each row of the states has not folded."""
    slices = _slices(R, drafts, dk)
    turn = torch.arange(dk, device=done.device) // slices["ROWS"]
    since = (done[:, None] - 1 - turn) % slices["P"]
    ahead = (positions - done + drafts)[:, None] + since
    return torch.minimum((positions - origin).clamp(max=R)[:, None], ahead)


def _rows(ring: torch.Tensor, at: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """[N, H, R, d] float32: the tokens that lie 0, 1, 2, ... behind the last ones [N]."""
    age = torch.arange(ring.shape[2], device=last.device)
    return ring[at[:, None], :, (last[:, None] - age) % ring.shape[2]].float().transpose(1, 2)


def _folded_rows(
    S: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    slopes: torch.Tensor,
    m: torch.Tensor,
    drafts: int,
) -> torch.Tensor:
    """S [N, H, dk, dv] after the m [N, dk] tokens of K, V [N, H, R, d] that lie behind drafts."""
    age = torch.arange(K.shape[2], device=K.device) - drafts
    within = (age >= 0)[:, None] & (age[:, None] < m[:, None])  # [N, R, dk]
    decay = torch.exp(-slopes[:, None] * age.clamp(min=0))[..., None]  # [H, R, 1]
    K = torch.where(within[:, None], K, 0.0)
    V = torch.where(within.any(2)[:, None, :, None], V * decay, 0.0)
    # one sum of the small terms, then one rounding: S + S expm1 alone would stall at small slopes
    update = torch.matmul(K.transpose(2, 3), V)
    return S + update.addcmul_(S, torch.expm1(-slopes[:, None] * m[:, None])[..., None])


def _torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    drafts: int,
    o: torch.Tensor,
) -> None:
    """All sequences together: states and rings are gathered, and the states put back."""
    o[slots == PADDING] = 0
    real = (slots >= 0).nonzero().squeeze(1)
    if len(real) == 0:
        return
    if len(real) < len(slots):
        q, k, v, slots, starts = (x[real] for x in (q, k, v, slots, starts))
    at, R, dk = slots.long(), ring_k.shape[2], q.shape[2]
    fresh = starts == 0
    folded[at[fresh]] = 0
    ring_k[at, :, starts % R] = k
    ring_v[at, :, starts % R] = v
    origin, done = folded[at, 0, 0].unbind(1)
    n = _unfolded(starts + 1, origin, done, dk, R, drafts)
    K, V = (_rows(ring, at, starts) for ring in (ring_k, ring_v))
    S = states[at].float().masked_fill_(fresh[:, None, None, None], 0.0)
    q = q.float() * scale
    age = torch.arange(R, device=q.device)
    decay = torch.exp(-slopes[:, None] * age)  # [H, R]
    waits = age[:, None] < n[:, None]  # [N, R, dk]
    products = torch.where(waits[:, None], K * q[:, :, None], 0.0)
    scores = (products.sum(3) * decay)[:, :, None]
    before = (q * torch.exp(-slopes[:, None] * n[:, None])).unsqueeze(2)  # [N, H, 1, dk]
    V = torch.where((age < n.amax(1)[:, None])[:, None, :, None], V, 0.0)
    o[real] = (torch.matmul(before, S) + torch.matmul(scores, V)).squeeze(2).to(o.dtype)
    slices = _slices(R, drafts, dk)
    turn = torch.arange(dk, device=q.device) // slices["ROWS"] == (starts % slices["P"])[:, None]
    m = torch.where(turn & (starts >= done)[:, None], (n - drafts).clamp(min=0), 0)
    S = _folded_rows(S, K, V, slopes, m, drafts)
    states[at] = S.to(states.dtype)
    folded[at, ..., 1] = torch.maximum(done, starts + 1)[:, None, None]


def _torch_fold(
    slopes: torch.Tensor,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    drafts: int,
) -> None:
    real = (slots >= 0).nonzero().squeeze(1)
    at, starts, ends = slots[real].long(), starts[real], ends[real]
    origin, done = (torch.where(starts > 0, x, 0) for x in folded[at, 0, 0].unbind(1))
    folded[at] = ends[:, None, None, None]
    some = (starts > origin).nonzero().squeeze(1)
    if len(some) == 0:
        return
    at, starts, origin, done = at[some], starts[some], origin[some], done[some]
    R, dk = ring_k.shape[2], ring_k.shape[3]
    n = _unfolded(starts, origin, done, dk, R, drafts)
    K, V = (_rows(ring, at, starts - 1) for ring in (ring_k, ring_v))
    states[at] = _folded_rows(states[at].float(), K, V, slopes, n, 0).to(states.dtype)


def _check(
    slopes: torch.Tensor,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    S, H, dk, dv = states.shape
    R = ring_k.shape[2]
    assert slopes.shape == (H,) and slopes.dtype == torch.float32 and slopes.is_contiguous()
    assert ring_k.shape == (S, H, R, dk) and ring_v.shape == (S, H, R, dv)
    assert ring_k.dtype == ring_v.dtype
    assert states[0].is_contiguous() and ring_k[0].is_contiguous() and ring_v[0].is_contiguous()
    assert folded.shape == (S, H, parts(dv), 2) and folded.dtype == torch.int64
    assert folded[0].is_contiguous()
    assert slots.shape == starts.shape == (len(slots),)
    assert slots.dtype == torch.int32 and starts.dtype == torch.int64


def lightning_ring_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    scale: float,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    drafts: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """q, k [N, H, dk], v [N, H, dv], slopes [H] float32 -> o [N, H, dv] in v's dtype.

    states [S, H, dk, dv] float32 or bfloat16, ring_k [S, H, R, dk] and ring_v [S, H, R, dv] in q's
    dtype and folded [S, H, parts(dv), 2] int64 are updated in place at slots [N] int32. starts [N]
    int64 are the positions of these tokens: each one more than in the call before, or up to
    `drafts` less than that, which forgets the tokens from there on. Where it is 0 the sequence
    begins, whatever the slot holds; a row with slot PADDING comes out as zero, one with ELSEWHERE
    is left as it is. `drafts` < R is the same in every call between two folds. out: contiguous
    memory for o.
    """
    inputs = q, k, v, slopes, states, ring_k, ring_v, folded, slots, starts
    if out is not None and q.is_cuda and DECODES.again((*inputs, out), scale, drafts):
        return out
    N, H, dk = q.shape
    dv = v.shape[-1]
    assert k.shape == (N, H, dk) and v.shape == (N, H, dv)
    assert q.dtype == k.dtype == v.dtype == ring_k.dtype
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert states.shape[1:] == (H, dk, dv) and slots.shape == (N,)
    assert 0 <= drafts < ring_k.shape[2]
    _check(slopes, states, ring_k, ring_v, folded, slots, starts)
    o = output((N, H, dv), v, out)
    made = (_triton if q.is_cuda else _torch)(
        q, k, v, slopes, scale, states, ring_k, ring_v, folded, slots, starts, drafts, o
    )
    DECODES.keep((made,), (*inputs, o), scale, drafts)
    return o


def lightning_ring_fold(
    slopes: torch.Tensor,
    states: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    folded: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    drafts: int = 0,
) -> None:
    """Fold the rings at slots [N] up to the positions starts [N]; drafts from there on are gone.

    Afterwards the states are those of lightning_decode and lightning_prefill at starts, the rings
    are empty, and `folded` says ends [N] int64: starts, or the end of a prefill that follows.
    `drafts` is that of the calls of lightning_ring_decode before.
    """
    tensors = slopes, states, ring_k, ring_v, folded, slots, starts, ends
    if states.is_cuda and FOLDS.again(tensors, drafts):
        return
    _check(slopes, states, ring_k, ring_v, folded, slots, starts)
    assert ends.shape == starts.shape and ends.dtype == torch.int64
    made = (_triton_fold if states.is_cuda else _torch_fold)(*tensors, drafts)
    FOLDS.keep((made,), tensors, drafts)
