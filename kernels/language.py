"""Triton where it is installed, and a stand-in where it is not (macOS, Windows).

Kernels take `tl` and `jit` from here, some of those for Hopper Gluon's in their stead. Without
Triton they stay uncompiled Python that nobody calls: tensors then live on the CPU and the torch
paths serve them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from kernels.tuning import card

try:
    import triton
    import triton.language

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

tl: Any = triton.language if HAVE_TRITON else None
HOPPER = (9, 0)  # the first cards whose kernels can start early


def jit(function: Any = None, **options: Any) -> Any:
    """triton.jit, or the function as it is."""
    if function is None:
        return lambda function: jit(function, **options)
    return triton.jit(function, **options) if HAVE_TRITON else function


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def dot_precision(dtype: Any) -> str:
    """tl.dot's input_precision: three TF32 products make float32; bfloat16 needs nothing."""
    return "tf32x3" if dtype.itemsize == 4 else "tf32"


@lru_cache(maxsize=32)
def early(device: torch.device, asked: bool = True) -> dict[str, bool]:
    """How a kernel that calls start_early is launched: early where the card can do that."""
    able = asked and card(device) >= HOPPER
    return {"EARLY": able, "launch_pdl": able}


@jit
def start_early(EARLY: tl.constexpr):
    """Let the next kernel start, and wait until the one in front has ended and all it wrote is seen
    (programmatic dependent launch: what a launch costs passes beside the kernel in front).

    A kernel calls this before it reads what another one writes, and before its first write: at its
    top. Above it only weights may be read, which nothing writes while a model serves. Every program
    passes here before it returns: the one in front may have begun before its own forerunner ended,
    and it is by its waiting that its end means the end of all before it.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@jit
def barrier():
    """Threads of a program wait for one another: one word for Triton and every version of Gluon."""
    tl.debug_barrier()


@jit
def expm1(x):
    """exp(x) - 1 for x <= 0 without cancellation: a polynomial of degree 7 near 0."""
    p = 1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))
    return tl.where(x > -0.25, x * p, tl.exp(x) - 1.0)


@jit
def felt(slope):
    """Rows after which exp(-16) = 1e-7 is left of a state."""
    return tl.minimum(16.0 / tl.maximum(slope, 1e-8), 1.6e9).to(tl.int32)
