"""Choosing experts: ids_t = the K best of a token's E scores, ties to the lowest id, and weights.

Scores are made of logits_te = router_e . h_t. Softmax: weights are the softmax of the logits over
those chosen. Sigmoid in groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): scores are sigmoids,
a bias counts in choosing alone; of the groups of experts those are kept whose two best add up to
most, and of their experts the K best.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.language import early, jit, next_power_of_2, start_early, tl
from kernels.tuning import ROUTE, RouteTuning, route_tuning

LEAST = 1e-20  # added to a sum of sigmoids that others are divided by
MOST_BYTES = 1 << 17  # of a router that each token's program reads by itself
MOST_TOKENS = 1024  # that do so; more share it in one product


@dataclass(slots=True, frozen=True)
class Choice:
    """How many experts are chosen, and out of how many groups; without a bias by softmax."""

    top: int
    groups: int = 1
    top_groups: int = 1
    normed: bool = True  # weights add up to `factor`
    factor: float = 1.0


def route_reference(
    logits: torch.Tensor, bias: torch.Tensor | None, choice: Choice
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] of numbers, bias [E] or None -> ids [T, K], weights [T, K] float64."""
    x = logits.double()
    scores = x.softmax(-1) if bias is None else x.sigmoid()
    ranks = scores if bias is None else scores + bias.double()
    rows = []
    for row in ranks.tolist():
        size = len(row) // choice.groups
        groups = [range(g * size, g * size + size) for g in range(choice.groups)]
        if choice.top_groups < choice.groups:
            groups.sort(key=lambda group: -sum(sorted(row[e] for e in group)[-2:]))
        kept = sorted(e for group in groups[: choice.top_groups] for e in group)
        rows.append(sorted(kept, key=lambda e: -row[e])[: choice.top])
    ids = torch.tensor(rows, dtype=torch.int64, device=logits.device)
    weights = scores.gather(1, ids)
    if choice.normed:
        weights = weights / (weights.sum(-1, keepdim=True) + (0 if bias is None else LEAST))
    return ids, weights * choice.factor


@jit
def keys(b_x, o_index):
    """int64 that order as the numbers do, NaN above all; of equal ones the first index is above."""
    b_x = tl.where(b_x == 0.0, 0.0, b_x)  # -0 is 0
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    b_bits = tl.where(b_x != b_x, 0x7FFFFFFF, b_bits)
    return b_bits.to(tl.int64) * 4294967296 + (0x7FFFFFFF - o_index)


@jit
def _numbers(b_keys):
    """What keys were made of."""
    b_bits = (b_keys >> 32).to(tl.int32)
    return tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits).to(tl.float32, bitcast=True)


@jit
def indices(b_keys):
    """Of which indices keys were made."""
    return 0x7FFFFFFF - (b_keys & 0x7FFFFFFF).to(tl.int32)


@jit
def greatest(b_keys, NONE: tl.constexpr, TOP: tl.constexpr, BLOCK_K: tl.constexpr):
    """The TOP greatest keys of [G, S] in their order, [BLOCK_K]; NONE is below every key."""
    o_k = tl.arange(0, BLOCK_K)
    b_best = tl.zeros((BLOCK_K,), tl.int64)
    for k in range(TOP):
        best = tl.max(tl.max(b_keys, 1), 0)
        b_best = tl.where(o_k == k, best, b_best)
        b_keys = tl.where(b_keys == best, NONE, b_keys)
    return b_best


@jit
def softmax(b_keys, m_k):
    """Of the logits that keys were made of, 0 outside m_k; all NaN where a logit is."""
    b_w = tl.where(m_k, _numbers(b_keys), -float("inf"))
    b_w = tl.where(m_k, tl.exp(b_w - tl.max(b_w)), 0.0)
    return b_w / tl.sum(b_w)


@jit
def _logits(h_ptr, router_ptr, S, D, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """A token h [D] times router [S, D] -> [S] in the router's dtype."""
    o_s, o_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    b_sums = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        m_d = o_d < D - d
        b_h = tl.load(h_ptr + d + o_d, mask=m_d, other=0.0).to(tl.float32)
        p_router = router_ptr + o_s[:, None] * D + d + o_d
        b_router = tl.load(p_router, mask=(o_s < S)[:, None] & m_d[None, :], other=0.0)
        b_sums += b_router.to(tl.float32) * b_h[None, :]
    return tl.sum(b_sums, 1).to(router_ptr.dtype.element_ty)


@jit
def _route_kernel(
    x_ptr,
    router_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    x_stride,
    S,
    D,
    factor,
    LEAST: tl.constexpr,
    FUSED: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMED: tl.constexpr,
    TOP: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token, whose experts lie in GROUPS groups of S. x holds its logits; FUSED: itself."""
    start_early(EARLY)
    NONE: tl.constexpr = -9223372036854775807  # below every key
    i_t = tl.program_id(0).to(tl.int64)
    o_g, o_s, o_k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    o_e = o_g[:, None] * S + o_s  # [G, S]
    m_e = (o_g < GROUPS)[:, None] & (o_s < S)
    p_x = x_ptr + i_t * x_stride
    if FUSED:
        b_x = _logits(p_x, router_ptr, S, D, BLOCK_S, BLOCK_D).to(tl.float32)[None, :]
    else:
        b_x = tl.load(p_x + o_e, mask=m_e, other=0.0).to(tl.float32)
    if SIGMOID:
        b_x = tl.sigmoid(b_x) + tl.load(bias_ptr + o_e, mask=m_e, other=0.0)
    b_keys = tl.where(m_e, keys(b_x, o_e), NONE)
    if TOP_GROUPS < GROUPS:
        b_best = tl.max(b_keys, 1)
        b_next = tl.max(tl.where(b_keys == b_best[:, None], NONE, b_keys), 1)
        b_sums = keys(_numbers(b_best) + _numbers(b_next), o_g)  # [G]
        b_sums = tl.where(o_g < GROUPS, b_sums, NONE)
        b_kept = o_g < 0
        for _ in range(TOP_GROUPS):
            b_found = b_sums == tl.max(b_sums, 0)
            b_kept = b_kept | b_found
            b_sums = tl.where(b_found, NONE, b_sums)
        b_keys = tl.where(b_kept[:, None], b_keys, NONE)
    b_chosen = greatest(b_keys, NONE, TOP, BLOCK_K)
    b_ids = indices(b_chosen)
    m_k = o_k < TOP
    if SIGMOID:
        b_w = tl.load(p_x + b_ids, mask=m_k, other=0.0).to(tl.float32)
        b_w = tl.where(m_k, tl.sigmoid(b_w), 0.0)
        if NORMED:
            b_w /= tl.sum(b_w) + LEAST
    else:
        b_w = softmax(b_chosen, m_k)
    tl.store(ids_ptr + i_t * TOP + o_k, b_ids, mask=m_k)
    tl.store(weights_ptr + i_t * TOP + o_k, b_w * factor, mask=m_k)


def _triton(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    choice: Choice,
    router: torch.Tensor | None = None,
    tuning: RouteTuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    T, E = len(x), x.shape[1] if router is None else len(router)
    ids = torch.empty(T, choice.top, dtype=torch.int32, device=x.device)
    weights = torch.empty(T, choice.top, dtype=torch.float32, device=x.device)
    size, D = E // choice.groups, x.shape[1]
    tuning = tuning or route_tuning(x.device, E) or ROUTE
    if T:
        _route_kernel[(T,)](
            x,
            router,
            bias,
            ids,
            weights,
            x.stride(0),
            size,
            D,
            choice.factor,
            LEAST=LEAST,
            FUSED=router is not None,
            SIGMOID=bias is not None,
            NORMED=choice.normed,
            TOP=choice.top,
            GROUPS=choice.groups,
            TOP_GROUPS=choice.top_groups,
            BLOCK_G=next_power_of_2(choice.groups),
            BLOCK_S=next_power_of_2(size),
            BLOCK_K=next_power_of_2(choice.top),
            BLOCK_D=min(next_power_of_2(D), max(8192 // next_power_of_2(size), 32)),
            num_warps=tuning.warps,
            **early(x.device),
        )
    return ids, weights


def _torch(
    logits: torch.Tensor, bias: torch.Tensor | None, choice: Choice
) -> tuple[torch.Tensor, torch.Tensor]:
    if bias is None:
        weights, ids = logits.softmax(-1, dtype=torch.float32).topk(choice.top, dim=-1)
        return ids, weights / weights.sum(-1, keepdim=True)
    scores = logits.float().sigmoid()
    ranks = scores + bias
    if choice.top_groups < choice.groups:
        grouped = ranks.unflatten(1, (choice.groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(choice.top_groups, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, True)
        ranks = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    ids = ranks.topk(choice.top, dim=-1).indices
    weights = scores.gather(1, ids)
    if choice.normed:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST)
    return ids, weights * choice.factor


def choose(
    logits: torch.Tensor, bias: torch.Tensor | None, choice: Choice
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E], bias [E] float32 or None -> ids [T, K] integers, weights [T, K] float32.

    Whatever the logits are, ids are K different ones below E. A logit of NaN counts as the best,
    and where weights are normed, it makes all of its token's NaN. Which of equal ones comes first
    is certain where the kernel chooses.
    """
    _, E = logits.shape
    assert logits.stride(1) == 1
    assert E % choice.groups == 0 and choice.top_groups <= choice.groups
    assert 1 <= choice.top <= choice.top_groups * (E // choice.groups)
    if bias is None:
        assert choice == Choice(choice.top)
    else:
        assert bias.shape == (E,) and bias.dtype == torch.float32 and bias.is_contiguous()
        assert choice.top_groups == choice.groups or E // choice.groups > 1
    ours = logits.is_cuda and route_tuning(logits.device, E) is not None
    return (_triton if ours else _torch)(logits, bias, choice)


def fused(h: torch.Tensor, router: torch.Tensor) -> bool:
    """Whether the program that chooses a token's experts by softmax makes its logits too."""
    if not h.is_cuda or router.nbytes > MOST_BYTES or len(h) > MOST_TOKENS:
        return False
    tuning = route_tuning(h.device, len(router))
    return tuning is not None and tuning.fused


def route(
    h: torch.Tensor, router: torch.Tensor, bias: torch.Tensor | None, choice: Choice
) -> tuple[torch.Tensor, torch.Tensor]:
    """h [T, D], router [E, D], in whose dtype logits are; the rest as in choose."""
    E, D = router.shape
    assert h.shape[1] == D and h.stride(1) == 1 and router.is_contiguous()
    if bias is None and fused(h, router):
        assert 1 <= choice.top <= E and choice == Choice(choice.top)
        return _triton(h, None, choice, router)
    return choose(F.linear(h.to(router.dtype), router), bias, choice)
