"""Linear layers with what stands before and after them: residual sums, norms, gates, activations.

Each function is a formula with two ways through it: one kernel for few rows, where tuning.json says
that it won on this card for this shape (kernels/skinny_gemm.py), else a kernel each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.gated import mul, silu_, silu_mul
from kernels.join import Rows, join
from kernels.linear import linear
from kernels.quantize import Weight
from kernels.residual_rmsnorm import add_rmsnorm_, residual_rmsnorm
from kernels.rmsnorm import rmsnorm
from kernels.rmsnorm_gate import rmsnorm_gate
from kernels.skinny_gemm import Before, Keep, Pair, skinny_gemm
from kernels.tuning import SkinnyTuning, skinny_tuning


@dataclass(slots=True, frozen=True, eq=False)
class Residual:
    """A sum z = alpha x + beta f and its norm h = RMSNorm(z) * weight, neither computed yet.

    x, f [T, D], f may be absent or in parts; weight [D] or None. The stream that goes on beside
    what is made of h is z, or h where norms come after the sum (`post`).
    """

    x: torch.Tensor
    f: Rows | None
    weight: torch.Tensor | None
    eps: float
    alpha: float = 1.0
    beta: float = 1.0
    post: bool = False

    def normed(self, out_dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Stream and h. x itself may become the stream."""
        if self.f is None:
            x = self.x if self.alpha == 1 else self.x * self.alpha
            h = rmsnorm(x, self.weight, self.eps, out_dtype)
            return (h if self.post else x), h
        if self.post:
            sum_ = self.x, self.f, self.alpha, self.beta
            h = residual_rmsnorm(*sum_, self.weight, self.eps, out_dtype)
            return h, h
        assert self.alpha == self.beta == 1, "a stream that is weighted anew at every sum"
        return self.x, add_rmsnorm_(self.x, self.f, self.weight, self.eps, out_dtype)

    def outline(self) -> Before:
        """As much of it as tells which kernels serve; parts of f stay what they are."""
        return Before(x=self.x, norm=True)

    def before(self) -> Before:
        """The same for one kernel, to which f comes added up."""
        return Before(
            x=self.x,
            f=None if self.f is None else join(self.f),
            alpha=self.alpha,
            beta=self.beta,
            weight=self.weight,
            norm=True,
            eps=self.eps,
        )

    @property
    def keep(self) -> Keep:
        """What of it becomes the stream, if that is not x as it is."""
        if self.post:
            return "normed"
        return "" if self.f is None and self.alpha == 1 else "sum"


def form(before: Before, *, silu: int = 0, pair: Pair = "", whole: bool = False) -> str:
    """The name under which tuning.json knows a product with its surroundings."""
    gate = f"gate{before.groups}" if before.groups > 1 else "gate"
    name = gate if before.gate is not None else "norm" if before.norm else "plain"
    return f"{name}-head" if whole else f"{name}-{pair or 'silu'}" if pair or silu else name


def skinny(
    before: Before, w: Weight, *, silu: int = 0, pair: Pair = "", whole: bool = False
) -> SkinnyTuning | None:
    """How one kernel does it; None where several do. whole: rows as float32."""
    if not isinstance(w, torch.Tensor):
        return None
    name = form(before, silu=silu, pair=pair, whole=whole)
    return skinny_tuning(w.device, w.itemsize, name, len(before.x), *w.shape)


def after(y: torch.Tensor, silu: int, pair: Pair) -> torch.Tensor:
    """y [T, N] as linear gives it -> with what comes after the product."""
    if pair:
        one, two = y.chunk(2, dim=1)
        return (silu_mul if pair == "silu_mul" else mul)(one, two)
    if silu:
        silu_(y[:, :silu])
    return y


def residual_linear(
    residual: Residual, w: Weight, *, silu: int = 0, pair: Pair = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream [T, D], and y = w h [T, N] with silu on so many first outputs, or [T, N / 2]: both
    halves multiplied, as a gated unit does, the first through silu or as it is."""
    tuning = skinny(residual.outline(), w, silu=silu, pair=pair)
    if tuning is None:
        stream, h = residual.normed()
        return stream, after(linear(h, w), silu, pair)
    assert isinstance(w, torch.Tensor)
    y, kept = skinny_gemm(residual.before(), w, tuning, silu=silu, pair=pair, keep=residual.keep)
    return (residual.x if kept is None else kept), y


def pair_linear(x: torch.Tensor, w: Weight, pair: Pair) -> torch.Tensor:
    """x [T, D], w [N, D] -> [T, N / 2]: both halves of w x multiplied, the first through silu or as
    it is."""
    before = Before(x=x)
    tuning = skinny(before, w, pair=pair)
    if tuning is None:
        return after(linear(x, w), 0, pair)
    assert isinstance(w, torch.Tensor)
    return skinny_gemm(before, w, tuning, pair=pair)[0]


def gate_linear(
    o: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    w: Weight,
    *,
    groups: int = 1,
    sigmoid: bool = True,
) -> torch.Tensor:
    """w (RMSNorm(o) * weight * gate): o, gate [T, D], rows anywhere, as kernels.rmsnorm_gate."""
    before = Before(
        x=o, weight=weight, norm=True, eps=eps, groups=groups, gate=gate, sigmoid=sigmoid
    )
    tuning = skinny(before, w)
    if tuning is None:
        return linear(rmsnorm_gate(o, gate, weight, eps, groups=groups, sigmoid=sigmoid), w)
    assert isinstance(w, torch.Tensor)
    return skinny_gemm(before, w, tuning)[0]
