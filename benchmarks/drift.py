"""How far a state drifts from float64, by dtype and slope, after long decode and long prefill.

    python -m benchmarks.drift [--steps 100000] [--tokens 4194304]

Random keys and values (the same for every dtype) of 8 heads of 16 x 16, one slope a head. What is
told is ||S - S64|| / ||S64|| of the state, S64 by the chunked recurrence in float64. On a GPU the
Triton kernels run, elsewhere the CPU's paths.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from benchmarks.result import Row, write
from kernels.lightning_decode import lightning_decode
from kernels.lightning_prefill import lightning_prefill
from kernels.packing import Packing

SLOPES = (0.9, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 4e-8, 0.0)
DIM = 16
PIECE = 4096  # tokens that are drawn at a time


class Reference:
    """S by S' = exp(-s C) S + sum_j exp(-s (C - j)) k_j v_j^T in float64, C tokens at a time."""

    def __init__(self, slopes: torch.Tensor) -> None:
        self.slopes = slopes.double()
        self.state = torch.zeros(len(slopes), DIM, DIM, dtype=torch.float64, device=slopes.device)

    def fold(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v [C, H, d]."""
        ages = torch.arange(len(k) - 1, -1, -1, dtype=torch.float64, device=k.device)
        decay = torch.exp(-self.slopes * ages[:, None])[..., None]  # [C, H, 1]
        update = torch.einsum("thk,thv->hkv", k.double() * decay, v.double())
        self.state = self.state * torch.exp(-self.slopes * len(k))[:, None, None] + update

    def error(self, state: torch.Tensor) -> list[float]:
        """Relative error of each head's state [H, d, d]."""
        off = (state.double() - self.state).flatten(1).norm(dim=1)
        return (off / self.state.flatten(1).norm(dim=1)).tolist()


def pieces(total: int, seed: int, device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    """q, k, v [n, H, d] float32, `total` tokens in all."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (len(SLOPES), DIM)
    for first in range(0, total, PIECE):
        n = min(PIECE, total - first)
        yield tuple(torch.randn(n, *shape, generator=generator, device=device) for _ in range(3))


def states_of(dtypes: Sequence[torch.dtype], device: torch.device) -> list[torch.Tensor]:
    """States [1, H, d, d] of each dtype, in which nobody has written."""
    shape = 1, len(SLOPES), DIM, DIM
    return [torch.empty(shape, dtype=dtype, device=device) for dtype in dtypes]


def decode(
    dtypes: Sequence[torch.dtype], steps: int, device: torch.device
) -> dict[torch.dtype, list[float]]:
    """Errors by dtype and slope after `steps` tokens, one at a time."""
    slopes = torch.tensor(SLOPES, device=device)
    held = states_of(dtypes, device)
    slot = torch.zeros(1, dtype=torch.int32, device=device)
    reference = Reference(slopes)
    start = torch.zeros(1, dtype=torch.int64, device=device)
    for q, k, v in pieces(steps, 1, device):
        for t in range(len(q)):
            one = slice(t, t + 1)
            for states in held:
                lightning_decode(q[one], k[one], v[one], slopes, 1.0, states, slot, start)
            start += 1
        reference.fold(k, v)
    return {states.dtype: reference.error(states[0]) for states in held}


def prefill(
    dtypes: Sequence[torch.dtype], tokens: int, device: torch.device
) -> dict[torch.dtype, list[float]]:
    """Errors by dtype and slope after `tokens` tokens in chunks of PIECE."""
    slopes = torch.tensor(SLOPES, device=device)
    held = states_of(dtypes, device)
    slot = torch.zeros(1, dtype=torch.int32, device=device)
    reference = Reference(slopes)
    start = 0
    for q, k, v in pieces(tokens, 2, device):
        rows = torch.tensor([0, len(q)], dtype=torch.int32, device=device)
        starts = torch.tensor([start], device=device)
        packing = Packing((len(q),), rows, slot, starts)
        for states in held:
            lightning_prefill(q, k, v, slopes, 1.0, states, packing)
        start += len(q)
        reference.fold(k, v)
    return {states.dtype: reference.error(states[0]) for states in held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=4 << 20)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for name, run, count in (
        ("decode", decode, options.steps),
        ("prefill", prefill, options.tokens),
    ):
        exact, small = run((torch.float32, torch.bfloat16), count, device).values()
        for slope, error, other in zip(SLOPES, exact, small, strict=True):
            rows.append(
                Row(
                    work=f"{name} of {count:,} tokens, slope {slope:g}, float32 state",
                    value=error,
                    unit="relative error",
                    better="lower",
                    peers={"bfloat16 state": other},
                )
            )
    write("drift", rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
