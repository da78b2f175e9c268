"""Streams 4,294,967,296 tokens through the state of one sequence and says what it then holds.

    python -m benchmarks.four_billion [--tokens 4294967296]

Keys and values are a function of position, head and element, made on the device piece by piece; the
kernels are those that serve. At the end each head's state is held against another computation:

- Heads with decay: float64, in chunks of another size, over the tokens that the decay can still
  feel (the last 20 / slope: what came before weighs e^-20).
- The head without decay: its tokens repeat after PERIOD, so its state is tokens / PERIOD times
  that of one period, in float64.

A float32 sum of so many terms stalls: at 2^31 its last bit is worth 256. So the head without decay
keeps its sum on two levels. The slot's state takes one piece, then joins a float64 total and begins
again at zero; the total reaches the outputs by a product q_t^T S_total of its own. That costs a
second state of twice the size and a pass over one head's q and o, and is counted in the time.
"""

from __future__ import annotations

import argparse
import time
from math import ceil

import torch

from benchmarks.result import Row, write
from benchmarks.timing import copy_bandwidth
from kernels.language import jit, tl
from kernels.lightning_prefill import lightning_prefill
from kernels.packing import Packing

TOKENS = 1 << 32
PIECE = 1 << 20
PERIOD = 1 << 22  # of the head without decay
CHUNK = 98_304  # of the float64 computation
H, D = 16, 128
SLOPES = (0.0, *(0.9 * (4e-8 / 0.9) ** (i / (H - 2)) for i in range(H - 1)))
FELT = 20.0
BOUND = 5e-3  # of bfloat16 keys and values that the kernel decays in bfloat16
BOUND_SUM = 1e-4  # of the plain sum
BLOCK = 1024


@jit(do_not_specialize=["first", "salt"])
def _draw_kernel(x_ptr, first, salt, H, D, period, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    head = (o_x // D) % H
    t = first + o_x // (D * H)
    t = tl.where(head == 0, t % period, t)
    index = (t * H + head) * D + o_x % D
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    b_x = low ^ ((index >> 32).to(tl.uint32) * 0x9E3779B9) ^ salt.to(tl.uint32)
    b_x = (b_x ^ (b_x >> 16)) * 0x85EBCA6B
    b_x = (b_x ^ (b_x >> 13)) * 0xC2B2AE35
    b_x = (b_x >> 24).to(tl.int32)
    tl.store(x_ptr + o_x, ((b_x - 96).to(tl.float32) / 128).to(x_ptr.dtype.element_ty))


def draw(
    first: int, count: int, salt: int, device: torch.device, head: int | None = None
) -> torch.Tensor:
    """Tokens first .. first + count - 1 as [count, H, D] bfloat16, or one head's [count, D].

    Values are (hash(position, head, element) mod 256 - 96) / 128, which bfloat16 holds exactly.
    """
    if device.type == "cuda":
        x = torch.empty(count, H, D, dtype=torch.bfloat16, device=device)
        _draw_kernel[(x.numel() // BLOCK,)](x, first, salt, H, D, PERIOD, BLOCK=BLOCK)
        return x if head is None else x[:, head]
    heads = torch.arange(H) if head is None else torch.tensor([head])
    t = torch.arange(first, first + count)[:, None]
    t = torch.where(heads == 0, t % PERIOD, t)
    index = ((t * H + heads) * D)[..., None] + torch.arange(D)
    mask = 0xFFFFFFFF
    x = (index & mask) ^ ((index >> 32) * 0x9E3779B9 & mask) ^ salt
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    x = ((x >> 24) - 96).float().div(128).bfloat16()
    return x if head is None else x[:, 0]


class Stream:
    """One sequence: the slot's states, and the float64 total of the head without decay."""

    def __init__(self, device: torch.device) -> None:
        self.slopes = torch.tensor(SLOPES, dtype=torch.float32, device=device)
        self.states = torch.zeros(1, H, D, D, device=device)
        self.total = torch.zeros(D, D, dtype=torch.float64, device=device)
        self.slot = torch.zeros(1, dtype=torch.int32, device=device)
        self.position = 0

    @property
    def bytes(self) -> int:
        return self.states.nbytes + self.total.nbytes

    def read(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Fold tokens in; their outputs [count, H, D]."""
        device, count = q.device, len(q)
        rows = torch.tensor([0, count], dtype=torch.int32, device=device)
        start = torch.tensor([self.position], device=device)
        packing = Packing((count,), rows, self.slot, start)
        o = lightning_prefill(q, k, v, self.slopes, 1.0, self.states, packing)
        o[:, 0] += q[:, 0] @ self.total.to(q.dtype)
        self.total += self.states[0, 0]
        self.states[0, 0] = 0
        self.position += count
        return o

    def state(self, head: int) -> torch.Tensor:
        """What a head holds, float64."""
        return self.total if head == 0 else self.states[0, head].double()


def periodic_state(tokens: int, device: torch.device) -> torch.Tensor:
    """The head without decay after whole periods, float64."""
    assert tokens % PERIOD == 0
    S = torch.zeros(D, D, dtype=torch.float64, device=device)
    for first in range(0, PERIOD, PIECE):
        k, v = (draw(first, PIECE, salt, device, head=0).double() for salt in (1, 2))
        S += k.T @ v
    return S * (tokens // PERIOD)


def felt_state(head: int, slope: float, tokens: int, device: torch.device) -> torch.Tensor:
    """A head with decay, over the tokens that it can still feel, float64."""
    first = max(0, tokens - ceil(FELT / slope))
    S = torch.zeros(D, D, dtype=torch.float64, device=device)
    for begin in range(first, tokens, CHUNK):
        count = min(CHUNK, tokens - begin)
        k, v = (draw(begin, count, salt, device, head=head).double() for salt in (1, 2))
        age = torch.arange(count - 1, -1, -1, dtype=torch.float64, device=device)
        S *= torch.exp(torch.tensor(-slope * count, dtype=torch.float64))
        S += (k * torch.exp(-slope * age)[:, None]).T @ v
    return S


def drift(stream: Stream, tokens: int) -> list[float]:
    """Relative error of each head's state against the other computation."""
    device = stream.states.device
    errors = []
    for head, slope in enumerate(stream.slopes.double().tolist()):
        if slope == 0:
            expected = periodic_state(tokens, device)
        else:
            expected = felt_state(head, slope, tokens, device)
        errors.append(float((stream.state(head) - expected).norm() / expected.norm()))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="a multiple of 4,194,304")
    tokens = parser.parse_args().tokens
    device = torch.device("cuda")
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    stream = Stream(device)
    q = draw(0, PIECE, 3, device)
    taken, held = 0.0, []
    for first in range(0, tokens, PIECE):
        k, v = (draw(first, PIECE, salt, device) for salt in (1, 2))
        if first in (0, PIECE):
            torch.cuda.synchronize()
            taken = time.perf_counter()  # what comes first compiles
        stream.read(q, k, v)
        del k, v
        if first in (8 * PIECE, tokens - PIECE):
            held.append(torch.cuda.max_memory_allocated())
    torch.cuda.synchronize()
    taken = time.perf_counter() - taken
    assert held[0] == held[-1], f"memory grew from {held[0]} to {held[-1]} bytes"
    errors = drift(stream, tokens)
    worst = max(errors[1:])
    assert worst <= BOUND and errors[0] <= BOUND_SUM, errors
    rate = (tokens - PIECE) / taken
    floor = 4 * H * D * 2 + 4 * H * D  # q, k, v, o once, and k, v once more to make them
    name = f"{tokens:,} tokens"
    rows = [
        Row(work=f"rate, {name}", value=rate / 1e6, unit="M tokens/s", better="higher",
            floor=bandwidth / floor / 1e6),
        Row(work=f"time, {name}", value=taken, unit="s", better="lower"),
        Row(work="state of the sequence", value=stream.bytes / 1e6, unit="MB", better="lower"),
        Row(work=f"memory after {9 * PIECE:,} tokens", value=held[0] / 1e6, unit="MB",
            better="lower"),
        Row(work="memory at the end", value=held[-1] / 1e6, unit="MB", better="lower"),
        *(
            Row(work=f"error of the state, slope {slope:.2g}", value=wrong, unit="relative error",
                better="lower")
            for slope, wrong in zip(SLOPES, errors, strict=True)
        ),
    ]  # fmt: skip
    write("four_billion", rows, copy_TBps=bandwidth / 1e12)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
