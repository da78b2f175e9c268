"""Rows by expert: a stable sort of ids below E by counting, and where the rows of each expert end.

    order[place_r] = r,  place_r = |{s: id_s < id_r}| + |{s < r: id_s = id_r}|
    ends_e = |{r: id_r <= e}|

One program an expert reads all ids: there are few when speed is asked for.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch

from kernels.language import early, jit, next_power_of_2, start_early, tl

MOST = 4096  # ids that a program holds


def by_expert_reference(ids: torch.Tensor, E: int) -> tuple[list[int], list[int]]:
    """ids [R] -> order [R], ends [E]."""
    found = ids.tolist()
    order = sorted(range(len(found)), key=found.__getitem__)
    return order, [sum(id <= e for id in found) for e in range(E)]


@jit(do_not_specialize=["R"])
def _by_expert_kernel(ids_ptr, order_ptr, ends_ptr, R, EARLY: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of one expert."""
    start_early(EARLY)
    i_e = tl.program_id(0)
    o_r = tl.arange(0, BLOCK)
    b_ids = tl.load(ids_ptr + o_r, mask=o_r < R, other=0x7FFFFFFF)
    b_mine = (b_ids == i_e).to(tl.int32)
    begin = tl.sum((b_ids < i_e).to(tl.int32))
    tl.store(order_ptr + begin + tl.cumsum(b_mine) - 1, o_r, mask=b_mine > 0)
    tl.store(ends_ptr + i_e, begin + tl.sum(b_mine))


def _triton(ids: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor]:
    R = len(ids)
    order = torch.empty(R, dtype=torch.int32, device=ids.device)
    ends = torch.empty(E, dtype=torch.int32, device=ids.device)
    BLOCK = max(next_power_of_2(R), 32)
    warps = min(max(BLOCK // 256, 1), 8)
    _by_expert_kernel[(E,)](ids, order, ends, R, BLOCK=BLOCK, num_warps=warps, **early(ids.device))
    return order, ends


def sort_by_expert(ids: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As by_expert, by PyTorch's sort: any number of ids, order int64."""
    found, order = ids.sort(stable=True)
    every = torch.arange(E, dtype=ids.dtype, device=ids.device)
    return order, torch.searchsorted(found, every, right=True, out_int32=True)


_torch = sort_by_expert


def by_expert(ids: torch.Tensor, E: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [R], integers below E -> order [R] integers, ends [E] int32; the device is not asked."""
    assert ids.ndim == 1 and ids.is_contiguous()
    return (_triton if ids.is_cuda and 0 < len(ids) <= MOST else _torch)(ids, E)
