"""Sequences in shuffled pages of a pool, as a run of the server leaves them, and what is due."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from kernels.packing import Packing

PAGE = 64
SAMPLED = 3  # sequences that are checked, and rows and heads of each


@dataclass(slots=True, frozen=True, eq=False)
class Paged:
    """New rows q, k, v of N sequences whose past keys and values lie in pages."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pages: tuple[torch.Tensor, torch.Tensor]
    tables: torch.Tensor
    packing: Packing
    scale: float

    @classmethod
    def random(
        cls,
        lengths: tuple[int, ...],
        past: tuple[int, ...],
        *,
        H: int,
        Hkv: int,
        d: int = 128,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Paged:
        """Normal numbers; NaN where nothing was written yet."""
        N, T = len(lengths), sum(lengths)
        ends = [n + start for n, start in zip(lengths, past, strict=True)]
        counts = [-(-end // PAGE) for end in ends]
        free = torch.randperm(sum(counts) + 1, dtype=torch.int32).split([*counts, 1])
        tables = torch.full((N, max(counts)), -1, dtype=torch.int32)
        for i, blocks in enumerate(free[:-1]):
            tables[i, : len(blocks)] = blocks
        memory = torch.empty(sum(counts) + 1, 2, PAGE, Hkv, d, dtype=dtype, device="cuda")
        for block in memory.split(4096):
            block.normal_()
        for i, start in enumerate(past):
            at = torch.arange(start, counts[i] * PAGE)
            memory[tables[i, at // PAGE].cuda(), :, (at % PAGE).cuda()] = torch.nan
        q = torch.randn(T, H, d, device="cuda").to(dtype)
        k, v = (torch.randn(T, Hkv, d, device="cuda").to(dtype) for _ in range(2))
        packing = Packing(
            lengths,
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda"),
            torch.arange(N, dtype=torch.int32, device="cuda"),
            torch.tensor(past, device="cuda"),
            past,
        )
        pages = memory[:, 0], memory[:, 1]
        return cls(q, k, v, pages, tables.cuda(), packing, d**-0.5)

    def whole(self, i: int) -> list[torch.Tensor]:
        """Keys and values [past + n, Hkv, d] of sequence i, from its pages and its new rows."""
        assert self.packing.past is not None
        past, first = self.packing.past[i], sum(self.packing.lengths[:i])
        rows = slice(first, first + self.packing.lengths[i])
        blocks = self.tables[i, : -(-past // PAGE)]
        return [
            torch.cat((pages[blocks].flatten(0, 1)[:past], new[rows]))
            for pages, new in zip(self.pages, (self.k, self.v), strict=True)
        ]

    def wrong(self, o: torch.Tensor) -> float:
        """Greatest error of some rows and heads, against float64; NaN if any is."""
        assert self.packing.past is not None
        lengths, H = self.packing.lengths, self.q.shape[1]
        first = [0, *accumulate(lengths)]
        errors = []
        for i in sorted({j * (len(lengths) - 1) // (SAMPLED - 1) for j in range(SAMPLED)}):
            n, past = lengths[i], self.packing.past[i]
            rows = torch.tensor(sorted({0, n // 3, n // 2 + 7, n - 2, n - 1}), device="cuda")
            rows = rows[(rows >= 0) & (rows < n)]
            later = torch.arange(past + n, device="cuda") > past + rows[:, None]
            keys, values = self.whole(i)
            for h in {0, H // 2, H - 1}:
                k, v = (x[:, h * x.shape[1] // H].double() for x in (keys, values))
                q = self.q[first[i] + rows, h].double()
                weights = (self.scale * q @ k.T).masked_fill(later, -torch.inf).softmax(-1)
                expected = weights @ v
                actual = o[first[i] + rows, h].double()
                errors.append((actual - expected).norm() / expected.norm())
            for pages, due in zip(self.pages, (keys, values), strict=True):
                at = torch.arange(past, past + n, device="cuda")
                written = pages[self.tables[i, at // PAGE].long(), at % PAGE]
                errors.append((written != due[past:]).any().double())
        return float(torch.stack(errors).max())
