"""Ids that sequences drew last, on the device: the next step begins with them before the host has
read them.

    resolved: id_n, or latest[row_n] where id_n < 0      remember: latest[row_n] = max(id_n, 0)

A row that drew nothing that can be read (-1, see kernels.sampling) goes on from id 0.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import early, jit, start_early, tl

BLOCK = 128


@jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["ids_ptr", "rows_ptr"])
def _resolved_kernel(
    ids_ptr, rows_ptr, latest_ptr, o_ptr, N, EARLY: tl.constexpr, BLOCK: tl.constexpr
):
    start_early(EARLY)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_id = tl.load(ids_ptr + o_n, mask=m_n, other=0)
    b_row = tl.load(rows_ptr + o_n, mask=m_n, other=0)
    b_latest = tl.load(latest_ptr + b_row, mask=m_n & (b_id < 0), other=0)
    tl.store(o_ptr + o_n, tl.where(b_id < 0, b_latest, b_id), mask=m_n)


@jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["ids_ptr", "rows_ptr"])
def _remember_kernel(ids_ptr, rows_ptr, latest_ptr, N, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    start_early(EARLY)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_id = tl.load(ids_ptr + o_n, mask=m_n, other=0)
    b_row = tl.load(rows_ptr + o_n, mask=m_n, other=0)
    tl.store(latest_ptr + b_row, tl.maximum(b_id, 0), mask=m_n)


def _triton(ids: torch.Tensor, rows: torch.Tensor, latest: torch.Tensor, o: torch.Tensor) -> None:
    N = len(ids)
    _resolved_kernel[(-(-N // BLOCK),)](
        ids, rows, latest, o, N, BLOCK=BLOCK, num_warps=4, **early(ids.device)
    )


def _triton_remember(ids: torch.Tensor, rows: torch.Tensor, latest: torch.Tensor) -> None:
    N = len(ids)
    _remember_kernel[(-(-N // BLOCK),)](
        ids, rows, latest, N, BLOCK=BLOCK, num_warps=4, **early(ids.device)
    )


def _torch(ids: torch.Tensor, rows: torch.Tensor, latest: torch.Tensor, o: torch.Tensor) -> None:
    torch.where(ids < 0, latest[rows], ids, out=o)


def _torch_remember(ids: torch.Tensor, rows: torch.Tensor, latest: torch.Tensor) -> None:
    latest.index_copy_(0, rows, ids.clamp(min=0))


def _check(ids: torch.Tensor, rows: torch.Tensor, latest: torch.Tensor) -> None:
    assert ids.ndim == 1 and ids.shape == rows.shape and latest.ndim == 1
    assert ids.dtype == rows.dtype == latest.dtype == torch.int64
    assert ids.is_contiguous() and rows.is_contiguous() and latest.is_contiguous()


def resolved(ids: torch.Tensor, rows: torch.Tensor, latest: torch.Tensor) -> torch.Tensor:
    """ids [N], rows [N] of latest [S], all int64 -> ids [N], those below 0 as their rows say."""
    _check(ids, rows, latest)
    o = torch.empty_like(ids)
    if len(ids):
        (_triton if ids.is_cuda else _torch)(ids, rows, latest, o)
    return o


def remember(ids: torch.Tensor, rows: torch.Tensor, latest: torch.Tensor) -> None:
    """ids [N] become those of rows [N] in latest [S], all int64. A row that stands there twice
    keeps one of them."""
    _check(ids, rows, latest)
    if len(ids):
        (_triton_remember if ids.is_cuda else _torch_remember)(ids, rows, latest)
