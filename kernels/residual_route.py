"""A post-norm residual and the choice among its experts in one launch:

    h = RMSNorm(alpha x + beta f) * weight,    logits_e = router_e . h

of h as it is rounded, then ids and weights by softmax (kernels/routing.py). For routers so small
that every token's program reads the whole one, which it does while it waits for x and f.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels import routing
from kernels.fused_linear import Residual
from kernels.language import early, jit, next_power_of_2, start_early, tl
from kernels.routing import Choice, greatest, indices, keys, route, softmax

PART = 4096  # elements of the router that a warp holds


@jit
def _residual_route_kernel(
    x_ptr,
    f_ptr,
    weight_ptr,
    router_ptr,
    h_ptr,
    ids_ptr,
    weights_ptr,
    alpha,
    beta,
    x_stride,
    f_stride,
    E,
    D,
    eps,
    TOP: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token."""
    i_t = tl.program_id(0).to(tl.int64)
    o_e, o_k, o_d = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    m_e, m_k, m_d = o_e < E, o_k < TOP, o_d < D
    p_router = router_ptr + o_e[:, None] * D + o_d
    b_router = tl.load(p_router, mask=m_e[:, None] & m_d, other=0.0)  # [E, D]
    b_weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0)
    start_early(EARLY)
    b_x = tl.load(x_ptr + i_t * x_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_f = tl.load(f_ptr + i_t * f_stride + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_z = alpha * b_x + beta * b_f
    b_h = b_z / tl.sqrt(tl.sum(b_z * b_z) / D + eps) * b_weight.to(tl.float32)
    b_h = b_h.to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + i_t * D + o_d, b_h, mask=m_d)
    b_logits = tl.sum(b_router.to(tl.float32) * b_h.to(tl.float32)[None, :], 1)
    b_logits = b_logits.to(router_ptr.dtype.element_ty).to(tl.float32)
    NONE: tl.constexpr = -9223372036854775807  # below every key
    b_keys = tl.where(m_e, keys(b_logits, o_e), NONE)
    b_chosen = greatest(b_keys[None, :], NONE, TOP, BLOCK_K)
    tl.store(ids_ptr + i_t * TOP + o_k, indices(b_chosen), mask=m_k)
    tl.store(weights_ptr + i_t * TOP + o_k, softmax(b_chosen, m_k), mask=m_k)


def _triton(
    x: torch.Tensor,
    f: torch.Tensor,
    alpha: float,
    beta: float,
    weight: torch.Tensor,
    eps: float,
    router: torch.Tensor,
    top: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (T, D), E = x.shape, len(router)
    h = torch.empty(T, D, dtype=x.dtype, device=x.device)
    ids = torch.empty(T, top, dtype=torch.int32, device=x.device)
    weights = torch.empty(T, top, dtype=torch.float32, device=x.device)
    BLOCK_E, BLOCK_D = next_power_of_2(E), next_power_of_2(D)
    if T:
        _residual_route_kernel[(T,)](
            x,
            f,
            weight,
            router,
            h,
            ids,
            weights,
            float(alpha),
            float(beta),
            x.stride(0),
            f.stride(0),
            E,
            D,
            eps,
            TOP=top,
            BLOCK_E=BLOCK_E,
            BLOCK_K=next_power_of_2(top),
            BLOCK_D=BLOCK_D,
            num_warps=min(max(BLOCK_D // 512, BLOCK_E * BLOCK_D // PART, 1), 16),
            **early(x.device),
        )
    return h, ids, weights


def residual_route(
    residual: Residual, router: torch.Tensor, choice: Choice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """residual of T rows whose stream is their norm, router [E, D] -> h [T, D], and of its rows ids
    and weights [T, K] as kernels.routing.route has them without a bias."""
    r, (E, D) = residual, router.shape
    assert r.post and r.x.ndim == 2 and r.x.shape[1] == D and router.is_contiguous()
    whole = next_power_of_2(E) * next_power_of_2(D) * router.itemsize <= routing.MOST_BYTES
    if not (whole and isinstance(r.f, torch.Tensor) and r.weight is not None) or not routing.fused(
        r.x, router
    ):
        _, h = r.normed()
        return h, *route(h, router, None, choice)
    assert r.x.shape == r.f.shape and r.x.stride(1) == r.f.stride(1) == 1
    assert r.weight.shape == (D,) and r.weight.is_contiguous()
    assert 1 <= choice.top <= E and choice == Choice(choice.top)
    return _triton(r.x, r.f, r.alpha, r.beta, r.weight, r.eps, router, choice.top)
