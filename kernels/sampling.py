"""Draws one id a row from softmax(logits / temperature), without sorting and without its sum.

    id = argmax_v (logits_v / T - log E_v),  E_v = -log(1 - w_v),  w_v = (hash(key, v) + 1/2) / 2^32

The E_v are exponential, so -log E_v is Gumbel noise and the argmax has exactly the distribution
(Gumbel-max, arXiv 1611.01144, section 2.1). A winner's w is small, where float32 is dense: w itself
is drawn, not 1 - w. The noise is a function of a row's key alone, whatever the batch. Temperature 0
takes the best logit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import early, jit, next_power_of_2, start_early, tl

BLOCK = 4096  # logits per program
MOST = 1 - 2.0**-24  # w as float32 may round to 1, of which there is no logarithm
PRIMES = (0x85EBCA6B, 0xC2B2AE35)  # of MurmurHash3's finaliser


def noise_reference(keys: torch.Tensor, vocab: int) -> torch.Tensor:
    """keys [R] int64 -> -log E_v [R, V] float64, of w_v as float32 holds it."""
    mask = 0xFFFFFFFF
    x = torch.arange(vocab, device=keys.device)[None] * 0x9E3779B9 & mask
    for word in (keys & mask, (keys >> 32) & mask):
        x = x ^ word[:, None]
        for shift, prime in ((16, PRIMES[0]), (13, PRIMES[1])):
            x = ((x ^ (x >> shift)) * prime) & mask
        x = x ^ (x >> 16)
    w = ((x.float() + 0.5) * 2.0**-32).clamp(max=MOST)
    return -torch.log(-torch.log1p(-w.double()))


def draw_reference(
    logits: torch.Tensor, temperatures: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """As draw(), in float64."""
    logits = logits.sum(0)
    scores = logits.double() / torch.where(temperatures > 0, temperatures, 1.0)[:, None]
    noise = noise_reference(keys, logits.shape[1])
    scores = torch.where(temperatures[:, None] > 0, scores + noise, scores)
    return torch.where(logits.amax(1).isfinite(), scores.argmax(1), -1)


@jit
def _hash(x, word):
    x = x ^ word
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@jit(do_not_specialize=["term_stride"])
def _best_kernel(
    logits_ptr,
    temperatures_ptr,
    keys_ptr,
    bests_ptr,
    ids_ptr,
    row_stride,
    term_stride,
    V,
    PARTS,
    TERMS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best of BLOCK logits of a row, noise added; infinite or NaN where a logit is not finite
    (other than minus infinity, which cannot be drawn)."""
    start_early(EARLY)
    i_p, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_v = i_p * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < V
    temperature = tl.load(temperatures_ptr + i_r)
    key = tl.load(keys_ptr + i_r)
    p_x = logits_ptr + i_r * row_stride + o_v
    b_x = tl.load(p_x, mask=m_v, other=-float("inf"))
    if TERMS == 2:
        b_x += tl.load(p_x + term_stride, mask=m_v, other=0.0)
    worst = tl.max(tl.where((b_x != b_x) | (b_x == float("inf")), 1, 0))
    if temperature > 0:
        b_hash = _hash(o_v.to(tl.uint32) * 0x9E3779B9, (key & 0xFFFFFFFF).to(tl.uint32))
        b_hash = _hash(b_hash, ((key >> 32) & 0xFFFFFFFF).to(tl.uint32))
        b_w = tl.minimum((b_hash.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
        # log(1 - w) near 0 by its series, for 1 - w keeps nothing of a small w
        b_series = -b_w * (1.0 + b_w * (0.5 + b_w * (0.333333333 + b_w * 0.25)))
        b_log = tl.where(b_w < 0.01, b_series, tl.log(1.0 - b_w))
        b_x = b_x / temperature - tl.log(-b_log)
    best, best_index = tl.max(b_x, 0, return_indices=True)
    best = tl.where(worst > 0, float("nan"), best)
    tl.store(bests_ptr + i_r * PARTS + i_p, best)
    tl.store(ids_ptr + i_r * PARTS + i_p, i_p * BLOCK + best_index)


@jit
def _join_kernel(bests_ptr, ids_ptr, o_ptr, PARTS, EARLY: tl.constexpr, BLOCK_P: tl.constexpr):
    """The best of the parts of a row; -1 where one is not finite, or all are minus infinity."""
    start_early(EARLY)
    i_r = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BLOCK_P)
    m_p = o_p < PARTS
    b_x = tl.load(bests_ptr + i_r * PARTS + o_p, mask=m_p, other=-float("inf"))
    broken = tl.max(tl.where(b_x != b_x, 1, 0))
    best, part = tl.max(b_x, 0, return_indices=True)
    id = tl.load(ids_ptr + i_r * PARTS + tl.where(broken > 0, 0, part))
    id = tl.where((broken > 0) | (best == -float("inf")), -1, id)
    tl.store(o_ptr + i_r, id.to(tl.int64))


def _triton(
    logits: torch.Tensor, temperatures: torch.Tensor, keys: torch.Tensor, o: torch.Tensor
) -> None:
    S, R, V = logits.shape
    parts = -(-V // BLOCK)
    bests = torch.empty(R, parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(R, parts, dtype=torch.int32, device=logits.device)
    _best_kernel[(parts, R)](
        logits,
        temperatures,
        keys,
        bests,
        ids,
        logits.stride(1),
        logits.stride(0),
        V,
        parts,
        TERMS=S,
        BLOCK=BLOCK,
        num_warps=8,
        **early(logits.device),
    )
    _join_kernel[(R,)](
        bests, ids, o, parts, BLOCK_P=next_power_of_2(parts), num_warps=1, **early(bests.device)
    )


def _torch(
    logits: torch.Tensor, temperatures: torch.Tensor, keys: torch.Tensor, o: torch.Tensor
) -> None:
    logits = logits.sum(0) if len(logits) > 1 else logits[0]
    best, ids = logits.max(1)
    warm = (temperatures > 0).nonzero().squeeze(1)
    if len(warm):
        scores = logits[warm] / temperatures[warm, None]
        scores += noise_reference(keys[warm], logits.shape[1])
        ids = ids.index_copy(0, warm, scores.argmax(1))
    o.copy_(torch.where(best.isfinite(), ids, -1))


def draw(logits: torch.Tensor, temperatures: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """logits [S, R, V] float32, S terms (1 or 2) that are added up; temperatures [R] float32 >= 0,
    keys [R] int64 -> ids [R] int64.

    A row with a NaN or plus infinity, or with nothing above minus infinity, gives -1.
    """
    S, R, _ = logits.shape
    assert logits.dtype == temperatures.dtype == torch.float32 and keys.dtype == torch.int64
    assert S in (1, 2) and logits.stride(2) == 1 and temperatures.shape == keys.shape == (R,)
    assert temperatures.is_contiguous() and keys.is_contiguous()
    o = torch.empty(R, dtype=torch.int64, device=logits.device)
    if R:
        (_triton if logits.is_cuda else _torch)(logits, temperatures, keys, o)
    return o
