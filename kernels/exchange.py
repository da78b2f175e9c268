"""What the host says of a step and what the step says to the host, by kernels that reach into its
pinned memory: beside the few bytes a copy engine takes long to begin, and a copy to the host would
wait there for every state that leaves.

    take: memory is what was said of this turn, its first words the ids: id_n is latest[slot_n + 1]
          where it is below 0; and the turn is over for who takes next
    tell: told[turn that was taken] = ids, latest[slot_n + 1] = max(id_n, 0)
    send: host = x, whatever it is

Turns go round: so many may be under way at a time as there are rows in the host's memory. Row 0 of
latest is nobody's: that of slots below 0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import early, jit, next_power_of_2, start_early, tl

BLOCK = 512  # words that a program sends
AT_ONCE = 4096  # words that a program takes before it waits for any
LEAST = 128  # ids that it has room for: few steps need another program


@jit(do_not_specialize=["WORDS", "N", "SLOTS"])
def _take_kernel(
    said_ptr,
    said_narrow_ptr,
    turn_ptr,
    latest_ptr,
    memory_ptr,
    WORDS,
    N,
    SLOTS,
    TURNS: tl.constexpr,
    MOST: tl.constexpr,
    EARLY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All words in one program, which alone changes the turn. SLOTS: where the slots begin, in
    words of 4 bytes."""
    start_early(EARLY)
    turn = tl.load(turn_ptr)
    p_said = said_ptr + turn % TURNS * MOST
    p_slot = said_narrow_ptr + turn % TURNS * 2 * MOST + SLOTS
    o_n = tl.arange(0, ROWS)
    m_n = o_n < N
    b_id = tl.load(p_said + o_n, mask=m_n, other=0, volatile=True)
    b_slot = tl.load(p_slot + o_n, mask=m_n, other=-1, volatile=True)
    for first in range(N, WORDS, BLOCK):  # ids are stored once, below
        o_w = first + tl.arange(0, BLOCK)
        b_word = tl.load(p_said + o_w, mask=o_w < WORDS, other=0, volatile=True)
        tl.store(memory_ptr + o_w, b_word, mask=o_w < WORDS)
    b_row = tl.maximum(b_slot + 1, 0)
    b_latest = tl.load(latest_ptr + b_row, mask=m_n & (b_id < 0), other=0)
    tl.store(memory_ptr + o_n, tl.where(b_id < 0, b_latest, b_id), mask=m_n)
    tl.debug_barrier()  # the turn is known to every thread
    tl.store(turn_ptr, turn + 1)


@jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["ids_ptr"])
def _tell_kernel(
    ids_ptr,
    slots_ptr,
    latest_ptr,
    turn_ptr,
    told_ptr,
    N,
    TURNS: tl.constexpr,
    MOST: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start_early(EARLY)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < N
    turn = tl.load(turn_ptr) - 1
    b_id = tl.load(ids_ptr + o_n, mask=m_n, other=0)
    b_slot = tl.load(slots_ptr + o_n, mask=m_n, other=-1)
    tl.store(told_ptr + turn % TURNS * MOST + o_n, b_id, mask=m_n)
    tl.store(latest_ptr + b_slot + 1, tl.maximum(b_id, 0), mask=m_n)


@jit(do_not_specialize=["N"])
def _send_kernel(x_ptr, host_ptr, N, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    start_early(EARLY)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(host_ptr + o_n, tl.load(x_ptr + o_n, mask=o_n < N), mask=o_n < N)


def _triton_take(
    said: torch.Tensor,
    turn: torch.Tensor,
    latest: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    TURNS, MOST = said.shape
    WORDS, N = len(memory), len(slots)
    BLOCK = min(next_power_of_2(MOST), AT_ONCE)
    _take_kernel[(1,)](
        said,
        said.view(torch.int32),
        turn,
        latest,
        memory,
        WORDS,
        N,
        (slots.data_ptr() - memory.data_ptr()) // slots.itemsize,
        TURNS=TURNS,
        MOST=MOST,
        ROWS=max(next_power_of_2(N), LEAST),
        BLOCK=BLOCK,
        num_warps=4 if BLOCK <= 1024 else 8,
        **early(memory.device),
    )


def _triton_tell(
    ids: torch.Tensor,
    slots: torch.Tensor,
    latest: torch.Tensor,
    turn: torch.Tensor,
    told: torch.Tensor,
) -> None:
    TURNS, MOST = told.shape
    _tell_kernel[(1,)](
        ids,
        slots,
        latest,
        turn,
        told,
        len(ids),
        TURNS=TURNS,
        MOST=MOST,
        BLOCK=next_power_of_2(MOST),
        num_warps=4,
        **early(ids.device),
    )


def _triton_send(x: torch.Tensor, host: torch.Tensor) -> None:
    N = x.numel()
    _send_kernel[(-(-N // BLOCK),)](x, host, N, BLOCK=BLOCK, num_warps=4, **early(x.device))


def _torch_take(
    said: torch.Tensor,
    turn: torch.Tensor,
    latest: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    torch.index_select(said[:, : len(memory)], 0, turn % len(said), out=memory[None])
    ids = memory[: len(slots)]
    rows = torch.where(ids < 0, slots + 1, 0).clamp(min=0).long()
    ids.copy_(torch.where(ids < 0, latest[rows], ids))
    turn += 1


def _torch_tell(
    ids: torch.Tensor,
    slots: torch.Tensor,
    latest: torch.Tensor,
    turn: torch.Tensor,
    told: torch.Tensor,
) -> None:
    told[(int(turn) - 1) % len(told), : len(ids)] = ids
    latest.index_copy_(0, slots.long() + 1, ids.clamp(min=0))


def _torch_send(x: torch.Tensor, host: torch.Tensor) -> None:
    host.copy_(x)


def take(
    said: torch.Tensor,
    turn: torch.Tensor,
    latest: torch.Tensor,
    memory: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """memory [w] int64 becomes the first words of what the host said of this turn: said [turns, W],
    the host's, pinned beside a GPU.

    Its first N words are ids, and somewhere behind them, in its own memory, lie their slots [N]
    int32, of which those of pending ids have a row in latest [slots + 1] int64. turn [1] int64.
    """
    N, at = len(slots), slots.data_ptr() - memory.data_ptr()
    assert said.ndim == 2 and memory.shape == (len(memory),) and len(memory) <= said.shape[1]
    assert slots.shape == (N,) and 0 < 8 * N <= at <= 8 * len(memory) - 4 * N
    assert said.dtype == turn.dtype == latest.dtype == memory.dtype == torch.int64
    assert slots.dtype == torch.int32 and turn.shape == (1,) and latest.ndim == 1
    assert all(x.is_contiguous() for x in (said, latest, memory, slots)) and not said.is_cuda
    (_triton_take if memory.is_cuda else _torch_take)(said, turn, latest, memory, slots)


def tell(
    ids: torch.Tensor,
    slots: torch.Tensor,
    latest: torch.Tensor,
    turn: torch.Tensor,
    told: torch.Tensor,
) -> None:
    """ids [N] int64 that the rows drew, whose slots are these [N] int32, to told [turns, M] int64,
    which is the host's, and to latest."""
    N = len(ids)
    assert ids.shape == slots.shape == (N,) and 0 < N <= told.shape[1]
    assert ids.dtype == latest.dtype == turn.dtype == told.dtype == torch.int64
    assert slots.dtype == torch.int32
    assert ids.is_contiguous() and slots.is_contiguous() and told.is_contiguous()
    (_triton_tell if ids.is_cuda else _torch_tell)(ids, slots, latest, turn, told)


def send(x: torch.Tensor, host: torch.Tensor) -> None:
    """x to the host's memory, which has its shape and dtype, words of 8 bytes, and is pinned beside
    a GPU: there by the time that the stream has come so far."""
    assert x.shape == host.shape and x.dtype == host.dtype and x.itemsize == 8
    assert x.is_contiguous() and host.is_contiguous() and not host.is_cuda
    if x.numel():
        (_triton_send if x.is_cuda else _torch_send)(x, host)
