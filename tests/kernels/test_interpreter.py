"""The interpreter as tests run it computes, bit for bit, what Triton's own does."""

import hashlib
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def _heavier(value, weight, other_value, other_weight):
    heavier = other_weight > weight
    return tl.where(heavier, other_value, value), weight * 0.5 + other_weight


@triton.jit
def _twice(x):
    return x * 2 + tl.maximum(x, 0)


@triton.jit
def _kernel(x, ids, out, N: tl.constexpr, AXIS: tl.constexpr, KEEP: tl.constexpr):
    row = tl.arange(0, N)[:, None]
    column = tl.arange(0, N)[None, :]
    b_x = tl.load(x + row * N + column, mask=column < N - 3, other=1.0)
    b_ids = tl.load(ids + row * N + column)
    b_weight = tl.dot(b_x.to(tl.float16), _twice(b_x).to(tl.float16)) + tl.program_id(0)
    b_value = tl.exp2(b_x) * ((b_ids * 3 - row) // 2)
    b_value, b_weight = tl.reduce((b_value, b_weight), AXIS, _heavier, keep_dims=KEEP)
    offset = tl.arange(0, N)
    if KEEP:
        offset = tl.expand_dims(offset, AXIS)
    out += tl.program_id(0).to(tl.int64) * 3 * N
    tl.store(out + offset, b_value)
    tl.store(out + N + offset, b_weight.to(tl.bfloat16).to(tl.float32))
    b_flat, b_sum = tl.reduce((tl.ravel(b_value), tl.ravel(b_weight)), 0, _heavier)
    tl.store(out + 2 * N, b_flat)
    tl.store(out + 2 * N + 1, b_sum + tl.sum(b_ids))


def digest() -> str:
    """Of what kernels give that use each thing which tests/interpreter.py replaces."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(16, 16, generator=generator)
    ids = torch.randint(2**20, (16, 16), generator=generator, dtype=torch.int32)
    given = []
    for axis in (0, 1):
        for keep in (False, True):
            out = torch.zeros(2, 3, 16)
            _kernel[(2,)](x, ids, out, 16, axis, keep)
            given.append(out)
    assert len({tuple(out.flatten().tolist()) for out in given}) == 2
    assert all(out.isfinite().all() and out.count_nonzero() > 60 for out in given)
    return hashlib.sha256(torch.stack(given).numpy().tobytes()).hexdigest()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled there")
def test_results_are_those_of_tritons_own() -> None:
    code = f"import runpy; print(runpy.run_path({__file__!r})['digest']())"
    own = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert own.stdout.strip() == digest(), own.stderr
