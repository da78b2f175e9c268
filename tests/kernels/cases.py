"""What the kernel tests are made of: packings, strided inputs, pools, errors."""

import re
from itertools import accumulate

import torch

from kernels import tuning
from kernels.packing import Packing
from kernels.tuning import SkinnyTuning

NAN = float("nan")
PRODUCTS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 5e-3}


def pack(lengths, slots, starts, device="cpu"):
    """A packing from plain lists."""
    return Packing(
        tuple(lengths),
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
        torch.tensor(slots, dtype=torch.int32, device=device),
        torch.tensor(starts, dtype=torch.int64, device=device),
        tuple(starts),
    )


def interleaved(T, H, widths, dtype=torch.float32, device="cpu"):
    """Views [T, H, width] into one tensor that interleaves them per head, as a projection does."""
    return torch.randn(T, H, sum(widths), device=device).to(dtype).split(widths, dim=-1)


def pool(slots, *shapes, dtype=torch.float32, device="cpu", others=8):
    """NaN-filled views [slots, *shape] into slot-major memory that holds other things too."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    memory = torch.full((slots, sum(sizes) + others), NAN, device=device).to(dtype)
    parts = memory.split([*sizes, others], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=False)]


def error(actual, expected):
    """Norm of the difference relative to the norm of what is expected; NaN if anything is NaN."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def product_bound(dtype, codes, device):
    """Of the error of a product in `dtype`. Units that multiply fp8 keep some 14 bits of a sum: on
    Hopper tiles of 64 rows are 3e-5 off, smaller ones are multiplied as float16 and exact."""
    fp8 = codes is not None and codes.is_floating_point
    return max(PRODUCTS[dtype], 1e-4 if fp8 and device.type == "cuda" else 0.0)


def skinny_everywhere(monkeypatch):
    """Every product of few rows goes through one kernel; returns the list of the classes met."""
    met = []

    def found(device, name):
        match = re.fullmatch(r"([a-z]+)(\d*)(-\w+)?-(\d)x(\d+)x(\d+)x(\d+)", name)
        groups, rows, K = int(match[2] or 1), int(match[5]), int(match[7])
        inputs = K // groups if groups > 1 else 32
        if inputs & (inputs - 1) or inputs < 16:
            return None
        met.append(name)
        return SkinnyTuning(min(rows, 32), 32, inputs, 4, 2, early=False)

    monkeypatch.setattr(tuning, "skinny_of", found)
    return met
