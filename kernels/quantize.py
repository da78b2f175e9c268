"""Quantisation of rows: scale_r = max |x_r| / limit, codes_r = round(x_r / scale_r), so that
x_r ~ scale_r codes_r. Weights are quantised so, a scale for each output, and rows of activations.

int8: codes from -127 to 127. fp8: float8_e4m3fn, whose largest finite value is 448.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kernels.language import early, jit, next_power_of_2, start_early, tl

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST = 1e-30  # of max |x_r|, so that a row of zeros has a scale to divide by
BLOCK = 4096


@dataclass(slots=True, frozen=True, eq=False)
class Quantized:
    """Rows as codes [..., R, K] and scales [..., R] float32.

    Indexing and splitting make views, of whole rows: a part of a matrix is filled by itself.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Quantized:
        """Codes of `dtype` and scales that are still to be filled."""
        codes = torch.empty(shape, dtype=dtype, device=device)
        return cls(codes, torch.empty(shape[:-1], dtype=torch.float32, device=device))

    @property
    def shape(self) -> torch.Size:
        """That of the codes."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Dimensions of the codes."""
        return self.codes.ndim

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def numel(self) -> int:
        """How many numbers the codes stand for."""
        return self.codes.numel()

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Any) -> Quantized:
        return Quantized(self.codes[index], self.scales[index])

    def split(self, sizes: list[int]) -> list[Quantized]:
        """Parts of so many rows each."""
        pairs = zip(self.codes.split(sizes), self.scales.split(sizes), strict=True)
        return [Quantized(codes, scales) for codes, scales in pairs]

    def copy_(self, x: torch.Tensor) -> Quantized:
        """Fill with rows x [R, K] of any float dtype, from any device; returns self."""
        quantize_rows(x.to(self.codes.device), self.codes, self.scales)
        return self

    def double(self) -> torch.Tensor:
        """The numbers that the codes stand for, float64."""
        return self.codes.double() * self.scales.double()[..., None]


Weight = torch.Tensor | Quantized


def quantize_reference(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [R, K] -> what the codes are rounded from [R, K], scales [R]; float64."""
    scales = x.double().abs().amax(-1).clamp_min(LEAST) / LIMITS[dtype]
    return x.double() / scales[:, None], scales


@jit
def _quantize_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    x_stride,
    codes_stride,
    K,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start_early(EARLY)
    i_row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK)
    b_max = tl.zeros((BLOCK,), tl.float32)
    b_nan = tl.zeros((BLOCK,), tl.float32)  # NaN where x is not finite: maxima pass NaN over
    for k in range(0, K, BLOCK):
        b_x = tl.load(x_ptr + i_row * x_stride + k + o_k, mask=k + o_k < K, other=0.0)
        b_max = tl.maximum(b_max, tl.abs(b_x.to(tl.float32)))
        b_nan += b_x.to(tl.float32) * 0.0
    scale = tl.div_rn(tl.maximum(tl.max(b_max), LEAST), LIMIT)
    tl.store(scales_ptr + i_row, scale + tl.sum(b_nan))
    for k in range(0, K, BLOCK):
        m_k = k + o_k < K
        b_x = tl.load(x_ptr + i_row * x_stride + k + o_k, mask=m_k, other=0.0)
        b_y = tl.div_rn(b_x.to(tl.float32), scale + tl.zeros((BLOCK,), tl.float32))
        if WHOLE:
            b_y = (b_y + 12582912.0) - 12582912.0  # + 3 * 2^22: ties go to even
        p_codes = codes_ptr + i_row * codes_stride + k + o_k
        tl.store(p_codes, b_y.to(codes_ptr.dtype.element_ty), mask=m_k)


def _triton(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    R, K = x.shape
    size = min(next_power_of_2(K), BLOCK)
    _quantize_kernel[(R,)](
        x,
        codes,
        scales,
        x.stride(0),
        codes.stride(0),
        K,
        LIMIT=LIMITS[codes.dtype],
        LEAST=LEAST,
        WHOLE=not codes.is_floating_point(),
        BLOCK=size,
        num_warps=min(max(size // 512, 1), 8),
        **early(x.device),
    )


def _torch(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    x = x.float()
    torch.div(x.abs().amax(-1).clamp_min_(LEAST), LIMITS[codes.dtype], out=scales)
    y = x / scales[:, None]
    codes.copy_(y if codes.is_floating_point() else y.round_())


def quantize_rows(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """x [R, K], rows anywhere, into codes [R, K], rows anywhere, and scales [R] float32.

    A row with what is not finite gets a scale that is not: it is not lost among codes.
    """
    assert x.ndim == 2 and x.shape == codes.shape and x.stride(-1) == codes.stride(-1) == 1
    assert scales.shape == x.shape[:1] and scales.is_contiguous() and scales.dtype == torch.float32
    if len(x):
        (_triton if x.is_cuda else _torch)(x, codes, scales)


def quantized(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """x [R, K], rows anywhere, as codes of `dtype`."""
    return Quantized.empty(tuple(x.shape), dtype, x.device).copy_(x)
