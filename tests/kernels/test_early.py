"""Kernels of a decode step that start before the one in front has ended: they wait for it."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import (
    expert_rows,
    expert_tiles,
    join,
    language,
    lightning_decode,
    lightning_ring,
    lrpe,
    paged_decode,
    residual_route,
    routing,
    sampling,
    sorting,
    window_attention,
)
from kernels.gated import mul, silu_, silu_mul
from kernels.grouped_gemm import grouped_gemm
from kernels.quantize import quantized
from kernels.residual_rmsnorm import add_rmsnorm_, residual_rmsnorm
from kernels.rmsnorm import rmsnorm
from kernels.rmsnorm_gate import rmsnorm_gate
from kernels.rotary import norm_rotary
from kernels.skinny_gemm import Before, skinny_gemm
from kernels.tuning import DecodeTuning, KeysTuning, ProductTuning, RingTuning, SkinnyTuning, card
from tests.kernels.cases import pack

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
FILES = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))
FILES = [path for path in FILES if path.stem != "launches"]  # which makes those of others again
# of prompts alone: steps that read some are no chain of small launches
PROMPTS = {
    "lightning_prefill",
    "lightning_prefill_hopper",
    "paged_prefill",
    "paged_prefill_hopper",
}
# what may stand above the wait: numbers, and weights: the first of many, or all of a few
HARMLESS = {"program_id", "arange", "cdiv", "minimum", "to", "_outputs"}
WEIGHTS = {
    "_load(p_w, (o_k < K)[None, :], EVEN)",
    "tl.load(p_router, mask=m_e[:, None] & m_d, other=0.0)",
    "tl.load(weight_ptr + o_d, mask=m_d, other=0.0)",
}


def called(node):
    """The name of what a call calls, without what it is an attribute of."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)


def launches(tree):
    """Calls kernel[grid](...) and launch(kernel, ...) with the names of the kernels."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield ast.unparse(node.func.value), node
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "launch":
            yield ast.unparse(node.args[0]), node


def options(tree, call):
    """What a launch gets by **: spelled there, or in a dictionary that is spelled above."""
    spread = [keyword.value for keyword in call.keywords if keyword.arg is None]
    names = [ast.unparse(value) for value in spread]
    made = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    made = [node.value for node in made if ast.unparse(node.targets[0]) in names]
    for value in made:
        if isinstance(value, ast.Dict):
            pairs = zip(value.keys, value.values, strict=True)
            spread += [one for key, one in pairs if key is None]
    return spread


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_launch_of_a_step_may_start_early(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kernels = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    if path.stem in PROMPTS:
        assert any(name in kernels for name, _ in launches(tree))
        return
    for name, call in launches(tree):
        given = [x for x in options(tree, call) if isinstance(x, ast.Call)]
        assert "early" in map(called, given), f"{path.name}:{call.lineno} launches {name}"
        body = [ast.unparse(statement) for statement in kernels[name].body]
        assert body.count("start_early(EARLY)") == 1, name
        above = kernels[name].body[: body.index("start_early(EARLY)")]
        for statement in above:
            assert isinstance(statement, ast.Assign | ast.Expr), f"{name} may return or branch"
            for node in ast.walk(statement):
                if isinstance(node, ast.Call):
                    assert called(node) in HARMLESS or ast.unparse(node) in WEIGHTS, name


def test_what_cannot_start_early_does_not(monkeypatch):
    capability = (9, 0)
    monkeypatch.setattr(language, "card", lambda device: capability)
    device = torch.device("cuda:77")
    early = language.early.__wrapped__
    assert early(device) == {"EARLY": True, "launch_pdl": True}
    assert not any(early(device, False).values())
    capability = (8, 9)
    assert not any(early(device).values())
    capability = (0, 0)
    assert not any(early(device).values())


class Step:
    """One decode step of all those kernels, each of which needs the ones before it."""

    N, H, HKV, D, E, K = 5, 4, 2, 64, 16, 4  # sequences, heads, of keys, their size, experts

    def __init__(self, dtype):
        torch.manual_seed(0)
        N, H, D, E, width = self.N, self.H, self.D, self.E, self.H * self.D
        make = {"device": DEVICE, "dtype": dtype}
        self.x = torch.randn(N, width, **make)
        self.qkv = torch.randn(4 * width, width, **make) / width**0.5
        self.head_norm, self.norm = torch.ones(D, **make), torch.ones(width, **make)
        self.cos, self.sin = torch.rand(2, N, D // 2, device=DEVICE).unbind()
        self.theta = torch.rand(H, D, device=DEVICE)
        self.slopes = torch.rand(H, device=DEVICE)
        self.router = torch.randn(E, width, **make) / width**0.5
        self.gate_up = torch.randn(E, 2 * width, width, **make) / width**0.5
        self.down = torch.randn(E, width, width, **make) / width**0.5
        self.int8 = quantized(torch.randn(width, width, **make) / width**0.5, torch.int8)
        self.slots = torch.arange(N, dtype=torch.int32, device=DEVICE)
        self.starts = torch.arange(N, device=DEVICE) * 200 + 150  # in one span of keys, and in more
        self.packing = replace(pack([1] * N, range(N), [0] * N, DEVICE), starts=self.starts)
        states, wide = torch.zeros(N, H, D, D, device=DEVICE), (N, H, 2 * D, D)
        self.states, self.wide = states, torch.zeros(wide, device=DEVICE)
        self.rings = [torch.zeros(N, H, 8, D, **make) for _ in range(2)]
        alike = 1, H, lightning_ring.parts(D), 2
        self.folded = self.starts[:, None, None, None].repeat(alike)
        self.windows = [torch.zeros(N, 7, self.HKV, D, **make) for _ in range(2)]
        self.pages = [torch.zeros(N * 32, 64, self.HKV, D, **make) for _ in range(2)]
        table = torch.arange(N * 32, dtype=torch.int32, device=DEVICE)
        self.tables = table.view(N, 32)
        self.temperatures = torch.full((N,), 0.5, device=DEVICE)

    def memory(self):
        """All that a step changes and reads again."""
        return [
            self.x,
            self.states,
            self.wide,
            self.folded,
            *self.rings,
            *self.windows,
            self.starts,
        ]

    def __call__(self):
        N, H, HKV, D = self.N, self.H, self.HKV, self.D
        where = self.slots, self.starts
        one = self.product(rmsnorm(self.x, self.norm, 1e-6), self.qkv, keep="sum")
        q, k, v, gate = silu_(one).view(N, 4, H, D).unbind(1)
        q, k = (norm_rotary(x, self.cos, self.sin, self.head_norm, 1e-6) for x in (q, k))
        o = torch.empty_like(v)
        ring = self.slopes, 0.1, self.states, *self.rings, self.folded, *where, 1, o
        lightning_ring._triton(q, k, v, *ring, RingTuning(64, 128, 4, 128))
        turned = torch.empty(N, H, 2 * D, dtype=o.dtype, device=DEVICE)
        lrpe._triton(o, self.theta, self.starts, turned)
        o = torch.empty_like(o)
        plain = self.slopes, 0.1, self.wide, *where, o, DecodeTuning(2048, 4)
        lightning_decode._triton(turned, turned, v, *plain)
        y = rmsnorm_gate(o.flatten(1), gate.flatten(1), self.norm, 1e-6, groups=2)
        z = residual_rmsnorm(y, o.flatten(1), 1.0, 0.5, self.norm, 1e-6)
        q, k, v = z.view(N, H, D), *(x.view(N, HKV, D) for x in z.chunk(2, dim=1))
        o = torch.empty_like(q)
        paged_decode.decode(
            q, k, v, *self.pages, self.tables, *where, 0.1, o, KeysTuning(32, 4, 2, 4)
        )
        k, v = (x.view(N, HKV, D) for x in o.flatten(1).chunk(2, dim=1))
        o = torch.empty_like(q)
        window_attention._triton(q, k, v, *self.windows, self.packing, 7, 0.1, o)
        h = add_rmsnorm_(self.x, self.product(o.flatten(1), self.qkv[: H * D]), self.norm, 1e-6)
        h, mixed = self.mixture(h, y)
        h = grouped_gemm(mul(silu_mul(h, mixed), h), self.int8[None], None, h.dtype)
        h = h.clone()  # no kernel in a graph
        h = h + quantized(h, torch.int8).scales[:, None].to(h.dtype)
        logits = self.product(h, self.qkv, out_dtype=torch.float32)
        ids = torch.empty(N, dtype=torch.int64, device=DEVICE)
        sampling._triton(logits[None], self.temperatures, self.starts, ids)
        add_rmsnorm_(self.x, h, None, 1e-6)
        self.x += (ids % 7)[:, None]
        self.starts += 1
        return logits, ids

    @staticmethod
    def product(x, w, **how):
        """The first row alone, through the kernel of single rows, and all of them."""
        first, _ = skinny_gemm(Before(x=x[:1]), w, SkinnyTuning(1, 16, 128, 2, 1, True))
        before = Before(x=x, f=x, norm=True, eps=1e-6)
        y, _ = skinny_gemm(before, w, SkinnyTuning(16, 16, 128, 4, 2, True), **how)
        y[:1] += first
        return y

    def mixture(self, x, f):
        """A row's norm, and what its experts make of it: by rows, then by tiles."""
        choice, E = routing.Choice(self.K), self.E
        norm = self.norm, 1e-6
        h, ids, weights = residual_route._triton(x, f, 1.0, 0.5, *norm, self.router, self.K)
        rows, tiles = ProductTuning(1, 16, 128, 4, 2), ProductTuning(16, 32, 64, 4, 2)
        y = expert_rows.up(h, self.gate_up, ids, rows)
        y = expert_rows.down(y, self.down, ids, weights, rows)
        ids, weights = routing._triton(y, None, choice, self.router)
        order, ends = sorting._triton(ids.flatten(), E)
        z = expert_tiles.up(y, self.gate_up, order, ends, tiles)
        joined = torch.empty_like(h)
        parts = expert_tiles.down(z, self.down, order, ends, weights, tiles)
        join._triton(parts, joined)
        return h, residual_rmsnorm(joined, parts, 1.0, 0.5, *norm)


@pytest.mark.skipif(not CUDA or card(DEVICE) < language.HOPPER, reason="a card that starts early")
def test_a_step_in_a_graph_comes_out_as_without(monkeypatch):
    """Bit for bit over many steps, pages and states of which each needs the one before."""
    monkeypatch.undo()  # of torch.empty: nothing that fills a tensor stands between two kernels
    steps = 40

    def run():
        step = Step(torch.bfloat16)
        fresh = [x.clone() for x in step.memory()]
        step()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, ids = step()
        for kept, x in zip(step.memory(), fresh, strict=True):
            kept.copy_(x)
        for _ in range(steps):
            graph.replay()
        return [x.clone() for x in (logits, ids, *step.memory(), *step.pages)]

    got = run()
    assert all(x.isfinite().all() for x in got)
    language.early.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(language, "card", lambda device: (8, 0))
        want = run()
    language.early.cache_clear()
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)
