"""What the host says of a step and what the step says to the host, by kernels that reach into its
pinned memory: beside the few bytes a copy engine takes long to begin, and a copy to the host would
wait there for every state that leaves.

    fetch: memory is that of this turn, and the turn is over for who fetches next
    take: words and numbers are those of this turn, id_n is latest[slot_n + 1] where it is below 0,
          and the turn is over for who takes next
    tell: told[turn that was taken] = ids, latest[slot_n + 1] = max(id_n, 0)
    send: host = x, whatever it is

Turns go round: so many may be under way at a time as there are rows in the host's memory. Row 0 of
latest is that of slot -1, which is nobody's.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import early, jit, next_power_of_2, start_early, tl

BLOCK = 512  # words that a program sends
AT_ONCE = 4096  # words that a program fetches before it waits for any


@jit
def _fetch_kernel(
    said_ptr,
    turn_ptr,
    memory_ptr,
    TURNS: tl.constexpr,
    WORDS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All words in one program, which alone changes the turn."""
    start_early(EARLY)
    turn = tl.load(turn_ptr)
    p_said = said_ptr + turn % TURNS * WORDS
    for first in tl.static_range(0, WORDS, BLOCK):
        o_n = first + tl.arange(0, BLOCK)
        b_word = tl.load(p_said + o_n, mask=o_n < WORDS, other=0, cache_modifier=".cv")
        tl.store(memory_ptr + o_n, b_word, mask=o_n < WORDS)
    tl.debug_barrier()  # the turn is known to every thread
    tl.store(turn_ptr, turn + 1)


@jit(do_not_specialize=["N"])
def _take_kernel(
    said_words_ptr,
    said_numbers_ptr,
    latest_ptr,
    turn_ptr,
    words_ptr,
    numbers_ptr,
    N,
    TURNS: tl.constexpr,
    MOST: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All rows in one program, which alone changes the turn."""
    start_early(EARLY)
    turn = tl.load(turn_ptr)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < N
    p_words = said_words_ptr + turn % TURNS * 3 * MOST + o_n
    p_numbers = said_numbers_ptr + turn % TURNS * 2 * MOST + o_n
    b_id = tl.load(p_words, mask=m_n, other=0, cache_modifier=".cv")
    b_position = tl.load(p_words + MOST, mask=m_n, other=0, cache_modifier=".cv")
    b_key = tl.load(p_words + 2 * MOST, mask=m_n, other=0, cache_modifier=".cv")
    b_slot = tl.load(p_numbers, mask=m_n, other=-1, cache_modifier=".cv")
    b_temperature = tl.load(p_numbers + MOST, mask=m_n, other=0, cache_modifier=".cv")
    b_latest = tl.load(latest_ptr + b_slot + 1, mask=m_n & (b_id < 0), other=0)
    tl.store(words_ptr + o_n, tl.where(b_id < 0, b_latest, b_id), mask=m_n)
    tl.store(words_ptr + MOST + o_n, b_position, mask=m_n)
    tl.store(words_ptr + 2 * MOST + o_n, b_key, mask=m_n)
    tl.store(numbers_ptr + o_n, b_slot, mask=m_n)
    tl.store(numbers_ptr + MOST + o_n, b_temperature, mask=m_n)
    tl.debug_barrier()  # the turn is known to every thread
    tl.store(turn_ptr, turn + 1)


@jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["ids_ptr"])
def _tell_kernel(
    ids_ptr,
    numbers_ptr,
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
    b_slot = tl.load(numbers_ptr + o_n, mask=m_n, other=-1)
    tl.store(told_ptr + turn % TURNS * MOST + o_n, b_id, mask=m_n)
    tl.store(latest_ptr + b_slot + 1, tl.maximum(b_id, 0), mask=m_n)


@jit(do_not_specialize=["N"])
def _send_kernel(x_ptr, host_ptr, N, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    start_early(EARLY)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(host_ptr + o_n, tl.load(x_ptr + o_n, mask=o_n < N), mask=o_n < N)


def _triton_fetch(said: torch.Tensor, turn: torch.Tensor, memory: torch.Tensor) -> None:
    TURNS, WORDS = said.shape
    _fetch_kernel[(1,)](
        said,
        turn,
        memory,
        TURNS=TURNS,
        WORDS=WORDS,
        BLOCK=min(next_power_of_2(WORDS), AT_ONCE),
        num_warps=8,
        **early(memory.device),
    )


def _triton_take(
    said_words: torch.Tensor,
    said_numbers: torch.Tensor,
    latest: torch.Tensor,
    turn: torch.Tensor,
    words: torch.Tensor,
    numbers: torch.Tensor,
    N: int,
) -> None:
    TURNS, _, MOST = said_words.shape
    _take_kernel[(1,)](
        said_words,
        said_numbers,
        latest,
        turn,
        words,
        numbers,
        N,
        TURNS=TURNS,
        MOST=MOST,
        BLOCK=next_power_of_2(MOST),
        num_warps=4,
        **early(words.device),
    )


def _triton_tell(
    ids: torch.Tensor,
    numbers: torch.Tensor,
    latest: torch.Tensor,
    turn: torch.Tensor,
    told: torch.Tensor,
) -> None:
    TURNS, MOST = told.shape
    _tell_kernel[(1,)](
        ids,
        numbers,
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


def _torch_fetch(said: torch.Tensor, turn: torch.Tensor, memory: torch.Tensor) -> None:
    torch.index_select(said, 0, turn % len(said), out=memory[None])
    turn += 1


def _torch_take(
    said_words: torch.Tensor,
    said_numbers: torch.Tensor,
    latest: torch.Tensor,
    turn: torch.Tensor,
    words: torch.Tensor,
    numbers: torch.Tensor,
    N: int,
) -> None:
    now = int(turn) % len(said_words)
    words[:, :N], numbers[:, :N] = said_words[now, :, :N], said_numbers[now, :, :N]
    ids = words[0, :N]
    ids.copy_(torch.where(ids < 0, latest[numbers[0, :N].long() + 1], ids))
    turn += 1


def _torch_tell(
    ids: torch.Tensor,
    numbers: torch.Tensor,
    latest: torch.Tensor,
    turn: torch.Tensor,
    told: torch.Tensor,
) -> None:
    told[(int(turn) - 1) % len(told), : len(ids)] = ids
    latest.index_copy_(0, numbers[0, : len(ids)].long() + 1, ids.clamp(min=0))


def _torch_send(x: torch.Tensor, host: torch.Tensor) -> None:
    host.copy_(x)


def fetch(said: torch.Tensor, turn: torch.Tensor, memory: torch.Tensor) -> None:
    """memory [W] int64 becomes what the host said for this turn: said [turns, W], the host's,
    pinned beside a GPU; turn [1] int64."""
    assert (
        said.ndim == 2
        and memory.shape == said.shape[1:]
        and turn.shape == (1,)
        and said.numel() > 0
    )
    assert said.dtype == turn.dtype == memory.dtype == torch.int64
    assert said.is_contiguous() and memory.is_contiguous() and not said.is_cuda
    (_triton_fetch if memory.is_cuda else _torch_fetch)(said, turn, memory)


def take(
    said_words: torch.Tensor,
    said_numbers: torch.Tensor,
    latest: torch.Tensor,
    turn: torch.Tensor,
    words: torch.Tensor,
    numbers: torch.Tensor,
    N: int,
) -> None:
    """The first N rows of what the host said for this turn: words [3, M] int64 become ids,
    positions and keys, numbers [2, M] int32 slots and temperatures, by their bits.

    said_words [turns, 3, M] and said_numbers [turns, 2, M] are the host's, pinned beside a GPU;
    latest [slots + 1] and turn [1] int64.
    """
    turns, _, most = said_words.shape
    assert said_words.shape == (turns, 3, most) and said_numbers.shape == (turns, 2, most)
    assert words.shape == (3, most) and numbers.shape == (2, most) and 0 < N <= most
    assert said_words.dtype == words.dtype == latest.dtype == turn.dtype == torch.int64
    assert said_numbers.dtype == numbers.dtype == torch.int32 and turn.shape == (1,)
    assert all(x.is_contiguous() for x in (said_words, said_numbers, words, numbers, latest))
    by = _triton_take if words.is_cuda else _torch_take
    by(said_words, said_numbers, latest, turn, words, numbers, N)


def tell(
    ids: torch.Tensor,
    numbers: torch.Tensor,
    latest: torch.Tensor,
    turn: torch.Tensor,
    told: torch.Tensor,
) -> None:
    """ids [N] int64 that the rows drew, whose slots numbers [2, M] hold, to told [turns, M] int64,
    which is the host's, and to latest."""
    N, most = len(ids), told.shape[1]
    assert ids.shape == (N,) and 0 < N <= most and numbers.shape == (2, most)
    assert ids.dtype == latest.dtype == turn.dtype == told.dtype == torch.int64
    assert numbers.dtype == torch.int32 and ids.is_contiguous() and told.is_contiguous()
    (_triton_tell if ids.is_cuda else _torch_tell)(ids, numbers, latest, turn, told)


def send(x: torch.Tensor, host: torch.Tensor) -> None:
    """x to the host's memory, which has its shape and dtype, words of 8 bytes, and is pinned beside
    a GPU: there by the time that the stream has come so far."""
    assert x.shape == host.shape and x.dtype == host.dtype and x.itemsize == 8
    assert x.is_contiguous() and host.is_contiguous() and not host.is_cuda
    if x.numel():
        (_triton_send if x.is_cuda else _torch_send)(x, host)
