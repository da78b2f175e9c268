"""Attention over pages beside cuDNN's on contiguous keys, and beside the bytes of decoding."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.pages import Paged
from benchmarks.result import Row
from benchmarks.timing import milliseconds
from kernels import paged_prefill, paged_prefill_hopper
from kernels.paged_attention import paged_attention
from kernels.tuning import rows_tuning

D = 128
ERROR = 6e-3
TIMES_CUDNN = 1.25
LONG = 131_072


@dataclass(slots=True, frozen=True)
class Chunks:
    """Chunks of a prompt: rows and rows before them; goal: as a multiple of cuDNN's time."""

    name: str
    lengths: tuple[int, ...]
    past: tuple[int, ...]
    H: int = 16
    Hkv: int = 16
    goal: float | None = None


MIXED = tuple(37 * i % 512 * 16 for i in range(16))
CHUNKS = [
    Chunks(f"1 x {LONG}", (LONG,), (0,), goal=TIMES_CUDNN),
    Chunks("1 x 8192", (8192,), (0,), goal=TIMES_CUDNN),
    Chunks("8192 after 122880", (8192,), (122_880,), goal=TIMES_CUDNN),
    Chunks("8192 after 122880", (8192,), (122_880,), 64, 8, goal=TIMES_CUDNN),
    Chunks("16 x 512 after none", (512,) * 16, (0,) * 16),
    Chunks("16 x 512 after 0-7700", (512,) * 16, MIXED),
    Chunks("16 x 512 after 0-7700", (512,) * 16, MIXED, 64, 8),
    Chunks("100 after 131072", (100,), (LONG,)),
]
DECODES = [(B, 300, H, Hkv) for B in (1, 64, 256, 512) for H, Hkv in ((16, 16), (64, 8))]
DECODES += [(B, LONG, H, Hkv) for B in (1, 16) for H, Hkv in ((16, 16), (64, 8))]
DECODES += [(512, 0, 16, 16)]  # contexts 16 to 529


def cudnn(work: Paged) -> Callable[[], Any]:
    """The first sequence by cuDNN, on keys already gathered: past, chunk, and both weighed."""
    assert work.packing.past is not None
    n, past = work.packing.lengths[0], work.packing.past[0]
    G = work.q.shape[1] // work.k.shape[1]
    q = work.q[:n].transpose(0, 1)[None].contiguous()
    k, v = (x.repeat_interleave(G, 1).transpose(0, 1)[None].contiguous() for x in work.whole(0))
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention

    def part(rows: slice, causal: bool, lse: bool) -> Any:
        return attend(
            q, k[:, :, rows], v[:, :, rows], None, lse, 0.0, causal, False, scale=work.scale
        )

    def run() -> torch.Tensor:
        own = part(slice(past, None), True, past > 0)
        if not past:
            return own[0]
        old = part(slice(past), False, True)
        shape = *q.shape[:3], 1
        share = torch.sigmoid(old[1].view(shape) - own[1].view(shape))
        return torch.lerp(own[0].float(), old[0].float(), share).to(q.dtype)

    wrong = work.wrong(run()[0].transpose(0, 1)) if len(work.packing.lengths) == 1 else 0.0
    if not wrong <= ERROR:
        raise AssertionError(f"cuDNN: error {wrong:.1e}")
    return run


def chunk_rows(deadline: float) -> Iterator[Row]:
    """Chunks in one launch, beside cuDNN on the first of them times their number, if alike."""
    for shape in CHUNKS:
        work = Paged.random(shape.lengths, shape.past, H=shape.H, Hkv=shape.Hkv)
        pages = *work.pages, work.tables, work.packing
        name = f"attention of chunks {shape.name}, {shape.H}/{shape.Hkv} heads"
        run = partial(paged_attention, work.q, work.k, work.v, *pages, work.scale)
        wrong = work.wrong(run())
        if not wrong <= ERROR:
            raise AssertionError(f"{name}: error {wrong:.1e} > {ERROR}")
        value = milliseconds(run, rounds=5)
        others: dict[str, float] = {}
        if len(shape.lengths) == 1:
            try:
                others["cuDNN"] = milliseconds(cudnn(work), rounds=5)
            except (RuntimeError, AssertionError) as failure:
                print(f"{name}: cuDNN fails: {failure}")
        if paged_prefill_hopper.serves(work.q, *work.pages) and time.monotonic() < deadline:
            o = torch.empty_like(work.q)
            plain = partial(
                paged_prefill.prefill,
                work.q,
                work.k,
                work.v,
                *pages,
                0,
                work.scale,
                o,
                rows_tuning(o.device, 2, D),
            )
            plain()
            if work.wrong(o) <= ERROR:
                others["the Triton kernel"] = milliseconds(plain, rounds=3)
            else:
                print(f"{name}: the Triton kernel is wrong by {work.wrong(o):.1e}")
        pairs = sum(n * (2 * s + n + 1) / 2 for n, s in zip(shape.lengths, shape.past, strict=True))
        print(
            f"{name}: {value:.3f} ms, {4 * pairs * D * shape.H / value / 1e9:.0f} TFLOP/s, "
            f"error {wrong:.1e}, others {others}"
        )
        yield Row(
            work=name,
            value=value,
            unit="ms",
            better="lower",
            goal=shape.goal * others["cuDNN"] if shape.goal and "cuDNN" in others else None,
            peers=others,
        )
        del work, run, pages
        torch.cuda.empty_cache()


def decode_rows(bandwidth: float) -> Iterator[Row]:
    """One token of each sequence, beside the time of a copy as large as keys and values."""
    for B, context, H, Hkv in DECODES:
        past = (context,) * B if context else tuple(16 + 37 * i % 514 for i in range(B))
        work = Paged.random((1,) * B, past, H=H, Hkv=Hkv)
        name = f"attention of {B} tokens after {context or '16-529'}, {H}/{Hkv} heads"
        pages = *work.pages, work.tables, work.packing
        run = partial(paged_attention, work.q, work.k, work.v, *pages, work.scale)
        wrong = work.wrong(run())
        if not wrong <= ERROR:
            raise AssertionError(f"{name}: error {wrong:.1e} > {ERROR}")
        floor = (sum(past) + B) * Hkv * D * 4 / bandwidth * 1e3
        value = milliseconds(run)
        print(f"{name}: {value:.4f} ms, {value / floor:.2f}x floor, error {wrong:.1e}")
        yield Row(work=name, value=value, unit="ms", better="lower", floor=floor)
        del work, run, pages
        torch.cuda.empty_cache()


def rows(bandwidth: float, deadline: float) -> Iterator[Row]:
    """Decoding, then chunks."""
    yield from decode_rows(bandwidth)
    yield from chunk_rows(deadline)
