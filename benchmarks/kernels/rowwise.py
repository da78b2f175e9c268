"""The neighbours of lightning attention, each one pass over memory, beside the same in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.result import Row
from benchmarks.timing import milliseconds
from kernels.gated import mul, silu_, silu_mul
from kernels.residual_rmsnorm import residual_rmsnorm
from kernels.rmsnorm_gate import rmsnorm_gate
from kernels.rotary import rotary, rotary_angles
from model.layers import rotary_frequencies

T = 16_384
HEADS, DIM = 16, 128
WIDTH = HEADS * DIM
ALPHA, EPS = 3.5, 1e-5


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


def works() -> list[tuple[str, int, Callable[[], Any], Callable[[], Any]]]:
    """Name, bytes read and written, the kernel, and PyTorch's operations."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    qkv_gate, x, f, weight = random(T, 4 * WIDTH), random(T, WIDTH), random(T, WIDTH), random(WIDTH)
    qkv, gate = qkv_gate[:, : 3 * WIDTH], qkv_gate[:, 3 * WIDTH :]
    one, two = random(T, 2 * WIDTH).chunk(2, dim=1)
    heads = x.view(T, HEADS, DIM)
    frequencies = rotary_frequencies(DIM, 1e7, torch.device("cuda"))
    cos, sin = rotary_angles(torch.arange(T, device="cuda"), frequencies)

    def torch_rotary() -> torch.Tensor:
        first, second = heads.chunk(2, -1)
        c, s = cos[:, None].bfloat16(), sin[:, None].bfloat16()
        return torch.cat((first * c - second * s, second * c + first * s), -1)

    row = T * WIDTH * 2
    return [
        (
            "silu of q, k, v in the projection's layout, in place",
            6 * row,
            lambda: silu_(qkv),
            lambda: F.silu(qkv),
        ),
        (
            "RMSNorm of the output times its sigmoid gate",
            3 * row,
            lambda: rmsnorm_gate(x, gate, weight, EPS),
            lambda: _norm(x, weight) * gate.sigmoid(),
        ),
        (
            "alpha x + beta f, then RMSNorm",
            3 * row,
            lambda: residual_rmsnorm(x, f, ALPHA, 1.0, weight, EPS),
            lambda: _norm(ALPHA * x + f, weight),
        ),
        ("silu(a) * b", 3 * row, lambda: silu_mul(x, gate), lambda: F.silu(x) * gate),
        ("a * b, halves of one tensor", 3 * row, lambda: mul(one, two), lambda: one * two),
        ("rotary", 2 * row, lambda: rotary(heads, cos, sin), torch_rotary),
    ]


def rows(bandwidth: float, deadline: float) -> Iterator[Row]:
    """Each beside a copy of the same bytes."""
    for name, size, work, other in works():
        yield Row(
            work=f"{name}, {T} x {WIDTH}",
            value=milliseconds(work),
            unit="ms",
            better="lower",
            floor=size / bandwidth * 1e3,
            peers={"PyTorch": milliseconds(other)},
        )
