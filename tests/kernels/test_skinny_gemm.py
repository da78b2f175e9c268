"""Products of few rows with what surrounds them, against float64 and against kernels one by one."""

from dataclasses import replace

import pytest
import torch

from kernels.fused_linear import Residual, gate_linear, pair_linear, residual_linear
from kernels.linear import linear
from kernels.logits import residual_logits
from kernels.quantize import quantized
from kernels.skinny_gemm import Before, before_reference, skinny_gemm, skinny_gemm_reference
from kernels.tuning import SKINNY, SkinnyTuning, skinny_tuning
from tests.kernels.cases import NAN, error, skinny_everywhere

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BOUND = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
SHAPES = pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (1, 257, 100),
        (1, 63, 2048),
        (3, 257, 100),
        (16, 63, 2048),
        (33, 63, 64),
        (63, 257, 100),
        (100, 62, 63),
    ],
)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def skip_what_the_interpreter_lacks(M, dtype):
    if not CUDA and M > 1 and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies no bfloat16")


def rows(M, K, dtype):
    """[M, K] amid a wider tensor of NaN."""
    wide = torch.full((M + 2, K + 16), NAN, device=DEVICE, dtype=dtype)
    wide[1 : M + 1, 8 : K + 8] = torch.randn(M, K, device=DEVICE)
    return wide[1 : M + 1, 8 : K + 8]


def tiles(M, early=False):
    most = next(most for most in SKINNY if most >= M)
    return SkinnyTuning(min(most, 32), 32, 64, 4, 2, early)


def befores(M, K, dtype):
    """What may stand before a product, with what may be kept of it."""
    x, f, gate = (rows(M, K, dtype) for _ in range(3))
    weight = torch.randn(K, device=DEVICE).to(dtype)
    return {
        "plain": (Before(x=x), ""),
        "norm": (Before(x=x, alpha=3.5, norm=True, eps=1e-5), "sum"),
        "add": (Before(x=x, f=f, weight=weight, norm=True, eps=1e-5), "sum"),
        "residual": (
            Before(x=x, f=f, alpha=3.5, beta=0.7, weight=weight, norm=True, eps=1e-5),
            "normed",
        ),
        "gate": (Before(x=x, gate=gate, norm=True, eps=1e-6), ""),
        "sigmoid": (
            Before(x=x, gate=gate, sigmoid=True, weight=weight, norm=True, eps=1e-6),
            "",
        ),
    }


@SHAPES
@pytest.mark.parametrize("kind", ["plain", "norm", "add", "residual", "gate", "sigmoid"])
def test_what_stands_before(M, N, K, kind, dtype):
    skip_what_the_interpreter_lacks(M, dtype)
    before, keep = befores(M, K, dtype)[kind]
    w = torch.randn(N, K, device=DEVICE).to(dtype)
    y, kept = skinny_gemm(before, w, tiles(M), keep=keep)
    assert y.dtype == dtype and y.shape == (M, N)
    assert error(y, skinny_gemm_reference(before, w)) <= BOUND[dtype]
    if keep:
        assert error(kept, before_reference(before)[keep == "normed"]) <= BOUND[dtype]
    else:
        assert kept is None
    if CUDA:  # one program after another is the same again whatever they do
        again, _ = skinny_gemm(before, w, tiles(M), keep=keep)
        assert torch.equal(y, again)


@pytest.mark.parametrize(("M", "N", "K"), [(1, 62, 100), (16, 258, 64), (33, 62, 100)])
@pytest.mark.parametrize(("silu", "pair"), [(20, ""), (0, "mul"), (0, "silu_mul")])
def test_what_comes_after(M, N, K, silu, pair, dtype):
    skip_what_the_interpreter_lacks(M, dtype)
    before, _ = befores(M, K, dtype)["add"]
    w = torch.randn(N, K, device=DEVICE).to(dtype)
    y, _ = skinny_gemm(before, w, tiles(M), silu=silu, pair=pair)
    assert y.shape == (M, N // 2 if pair else N)
    assert error(y, skinny_gemm_reference(before, w, silu=silu, pair=pair)) <= BOUND[dtype]


@pytest.mark.parametrize("M", [1, 5, 40])
def test_groups_are_normed_alone(M, dtype):
    skip_what_the_interpreter_lacks(M, dtype)
    before, _ = befores(M, 256, dtype)["sigmoid"]
    before.x.mul_(torch.linspace(1, 9, 256, device=DEVICE).to(dtype))
    before = replace(before, groups=4)
    w = torch.randn(63, 256, device=DEVICE).to(dtype)
    y, _ = skinny_gemm(before, w, tiles(M))
    assert error(y, skinny_gemm_reference(before, w)) <= BOUND[dtype]


@pytest.mark.parametrize("M", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_may_count_as_float32(M, dtype):
    """Rounded rows would be off by 2^-9 of their size, or 2^-12 with float16."""
    skip_what_the_interpreter_lacks(M, dtype)
    before, _ = befores(M, 200, dtype)["add"]
    w = torch.randn(100, 200, device=DEVICE).to(dtype)
    y, _ = skinny_gemm(before, w, tiles(M), out_dtype=torch.float32)
    assert y.dtype == torch.float32
    assert error(y, skinny_gemm_reference(before, w)) <= 2e-5


@pytest.mark.skipif(not CUDA, reason="kernels that start before the one in front has ended")
@pytest.mark.parametrize("M", [1, 16])
def test_early_kernels_wait_for_their_rows(M, monkeypatch):
    """A chain in which each product needs the one before it, in a graph, replayed many times."""
    monkeypatch.undo()  # of torch.empty: nothing that fills a tensor stands between two products
    w = torch.randn(20, 2048, 2048, device=DEVICE, dtype=torch.bfloat16) / 45
    x = torch.randn(M, 2048, device=DEVICE, dtype=torch.bfloat16)

    def chain(early):
        y = x
        for each in w:
            tuning = SkinnyTuning(M, 16, 512, 2, 3, early)
            y, _ = skinny_gemm(Before(x=y, norm=True, eps=1e-6), each, tuning)
        return y

    want = chain(False)
    chain(True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(True)
    for _ in range(20):
        got.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got, want)


def test_what_is_not_measured_goes_the_other_way():
    device = torch.device(DEVICE)
    assert skinny_tuning(device, 2, "norm", 257, 8192, 2048) is None
    assert skinny_tuning(device, 2, "norm", 0, 8192, 2048) is None
    assert skinny_tuning(device, 2, "unheard of", 1, 8192, 2048) is None


@pytest.mark.parametrize("M", [1, 3, 40])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_ways_are_the_same(M, post, weighted, monkeypatch):
    """Streams, products and logits, with the residual sum and at the first layer without."""
    K, pair = 96, "silu_mul" if post else "mul"
    x, f, gate = (rows(M, K, torch.float32) for _ in range(3))
    weight = torch.randn(K, device=DEVICE) if weighted else None
    w, w2 = torch.randn(130, K, device=DEVICE), torch.randn(44, K, device=DEVICE)
    scale = {"alpha": 1.5, "beta": 0.5} if post else {}

    def ways():
        made = []
        for added in (f, None):
            r = Residual(x.clone(), added, weight, 1e-5, **scale, post=post)
            made += residual_linear(r, w, silu=70)
            r = Residual(x.clone(), added, weight, 1e-5, **scale, post=post)
            made += residual_linear(r, w, pair=pair)
            r = Residual(x.clone(), added, weight, 1e-5, **scale, post=post)
            made.append(residual_logits(r, w2).sum(0))
        made += [linear(x, w), pair_linear(x, w, pair)]
        made += [gate_linear(x, gate, weight, 1e-6, w2, sigmoid=post)]
        return made

    want = ways()
    met = skinny_everywhere(monkeypatch)
    got = ways()
    starts = ("plain", "norm", "norm-silu", f"norm-{pair}", "norm-head", f"plain-{pair}", "gate")
    assert {name.rpartition("-")[0] for name in met} == {*starts} - {"norm"}
    for ours, theirs in zip(got, want, strict=True):
        assert error(ours, theirs) <= 2e-6


def test_quantised_weights_and_many_rows_keep_their_kernels(monkeypatch):
    met = skinny_everywhere(monkeypatch)
    x, w = torch.randn(3, 64, device=DEVICE), torch.randn(48, 64, device=DEVICE)
    small = quantized(w, torch.int8)
    residual_linear(Residual(x, None, None, 1e-6), small)
    gate_linear(x, x, None, 1e-6, small)
    linear(x, small)
    linear(torch.randn(257, 64, device=DEVICE), w)
    assert met == []
