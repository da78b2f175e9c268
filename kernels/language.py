"""Triton where it is installed, and a stand-in where it is not (macOS, Windows).

Every kernel file takes `tl`, `jit` and `next_power_of_2` from here. Without Triton the kernels stay
uncompiled Python that nobody calls: tensors then live on the CPU and the torch paths serve them.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language

    HAVE_TRITON = True
except ImportError:
    HAVE_TRITON = False

tl: Any = triton.language if HAVE_TRITON else None


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


@jit
def expm1(x):
    """exp(x) - 1 for x <= 0 without cancellation: a polynomial of degree 7 near 0."""
    p = 1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))
    return tl.where(x > -0.25, x * p, tl.exp(x) - 1.0)


@jit
def felt(slope):
    """Rows after which exp(-16) = 1e-7 is left of a state."""
    return tl.minimum(16.0 / tl.maximum(slope, 1e-8), 1.6e9).to(tl.int32)
