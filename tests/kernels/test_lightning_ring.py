"""Decoding with a ring of unfolded keys and values against the recurrence."""

from __future__ import annotations

import pytest
import torch

from kernels import lightning_ring
from kernels.lightning_prefill import lightning_prefill
from kernels.lightning_reference import lightning_reference
from kernels.lightning_ring import lightning_ring_decode, lightning_ring_fold
from kernels.packing import ELSEWHERE, PADDING
from kernels.tuning import RingTuning
from tests.kernels.cases import error, interleaved, pack, pool

BOUND = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-3}
SLOPES = [0.9, 4e-8, 0.0]
H = len(SLOPES)


class Slots:
    """S slots of garbage, and the two operations on them with everything else filled in."""

    def __init__(self, S, R, dk, dv, device, dtype=torch.float32, state_dtype=torch.float32):
        self.slopes = torch.tensor(SLOPES, device=device)
        (self.states,) = pool(S, (H, dk, dv), dtype=state_dtype, device=device)
        self.rings = pool(S, (H, R, dk), (H, R, dv), dtype=dtype, device=device)
        shape = S, H + 2, lightning_ring.parts(dv), 2
        self.folded = torch.full(shape, -(1 << 60), device=device)[:, :H]

    def decode(self, q, k, v, slots, starts, scale=1.0, drafts=0, out=None):
        slots = torch.as_tensor(slots, dtype=torch.int32, device=q.device)
        starts = torch.as_tensor(starts, device=q.device)
        where = self.states, *self.rings, self.folded, slots, starts
        return lightning_ring_decode(q, k, v, self.slopes, scale, *where, drafts=drafts, out=out)

    def fold(self, slots, starts, ends=None, drafts=0):
        device = self.states.device
        slots = torch.tensor(slots, dtype=torch.int32, device=device)
        starts = torch.tensor(starts, device=device)
        ends = starts if ends is None else torch.tensor(ends, device=device)
        where = self.states, *self.rings, self.folded, slots, starts, ends
        lightning_ring_fold(self.slopes, *where, drafts=drafts)


@pytest.mark.parametrize(("dk", "dv", "R"), [(64, 64, 4), (96, 96, 3), (24, 40, 2)])
def test_a_staggered_batch_with_padding(device, dk, dv, R, dtype):
    """Sequences begin at different steps in slots full of NaN; rings are folded once or twice."""
    T = 2 * R + 1
    begin = [0, None, 1, R - 1]  # row 1 is padding; other rows are until they begin
    slots = [4, -1, 0, 2]
    q, k, v = (x.unflatten(0, (4, T)) for x in interleaved(4 * T, H, (dk, dk, dv), dtype, device))
    on = Slots(5, R, dk, dv, device, dtype)
    steps = []
    for t in range(T):
        real = [b is not None and t >= b for b in begin]
        rows = [slot if r else -1 for slot, r in zip(slots, real, strict=True)]
        starts = [t - b if r else 7 for b, r in zip(begin, real, strict=True)]
        o = on.decode(q[:, t], k[:, t], v[:, t], rows, starts, scale=0.3)
        assert o.dtype == dtype and o.is_contiguous()
        for n in range(4):
            assert real[n] or (o[n] == 0).all()
        steps.append(o)
    o = torch.stack(steps, 1)
    on.fold([-1, *slots], [5, T, 9, T - 1, T - R + 1])
    for n, (b, slot) in enumerate(zip(begin, slots, strict=True)):
        if b is not None:
            since = n, slice(b, None)
            expected, state = lightning_reference(q[since], k[since], v[since], on.slopes, 0.3)
            assert error(o[since], expected) <= BOUND[dtype]
            assert error(on.states[slot], state) <= 1e-6
    assert on.states[[1, 3]].isnan().all()
    for ring in on.rings:
        assert ring[[1, 3]].isnan().all()


@pytest.mark.parametrize(("dk", "dv", "R"), [(128, 128, 5), (256, 128, 2)])
def test_a_staggered_batch_of_wide_heads(device, dk, dv, R, dtype, request):
    """Interpreted, they take long: what test_tuned does in float16 is not done twice."""
    interpreted = "triton" in request.node.name and device.type == "cpu"
    if interpreted and (dk, dtype) == (128, torch.float16):
        pytest.skip("see test_tuned.py")
    test_a_staggered_batch_with_padding(device, dk, dv, R, dtype)


def test_nothing_but_padding(device):
    on = Slots(2, 4, 16, 16, device)
    q, k, v = interleaved(2, H, (16, 16, 16), device=device)
    assert (on.decode(q, k, v, [PADDING, PADDING], [0, 5]) == 0).all()
    o = torch.full_like(v, 3.0)
    on.decode(q, k, v, [ELSEWHERE, PADDING], [0, 5], out=o)
    assert (o[0] == 3).all() and (o[1] == 0).all()
    on.fold([-1, -1], [0, 5])
    assert on.states.isnan().all() and on.rings[0].isnan().all() and on.rings[1].isnan().all()
    assert (on.folded == -(1 << 60)).all()


def test_a_step_writes_one_slice_of_the_state(device):
    R, d = 4, 16
    on = Slots(1, R, d, d, device)
    q, k, v = interleaved(3 * R, H, (d, d, d), device=device)
    for t in range(3 * R):
        old = on.states.clone()
        on.decode(q[t, None], k[t, None], v[t, None], [0], [t])
        written = (on.states != old).any(-1)[0, 0].nonzero().squeeze(1).tolist()
        assert t == 0 or written == list(range(t % R * d // R, (t % R + 1) * d // R))
        assert (on.folded[..., 0] == 0).all() and (on.folded[..., 1] == t + 1).all()
    on.fold([0], [3 * R])
    assert error(on.states[0], lightning_reference(q, k, v, on.slopes, 1.0)[1]) <= 1e-6


def test_a_head_is_shared_by_more_programs_where_they_would_be_few():
    assert lightning_ring.parts(128) == lightning_ring.parts(256) == 8
    assert [lightning_ring.parts(d) for d in (16, 40, 64, 96)] == [1, 1, 4, 2]
    splits = lightning_ring.splits
    assert [splits(8, 128, 128, heads, 132) for heads in (16, 48, 128, 132)] == [8, 4, 2, 1]
    assert [splits(8, 128, 64, heads, 132) for heads in (16, 128, 4096)] == [8, 2, 2]
    assert splits(1, 40, 16, 1, 132) == 1 and splits(8, 256, 128, 4096, 132) == 2


@pytest.mark.parametrize("device", ["triton"], indirect=True)
@pytest.mark.parametrize("dv", [64, 128, 256])
def test_any_share_of_a_head_goes_on_from_any_other(device, monkeypatch, dv):
    """Batches grow and shrink: the next step has other programs for the same columns."""
    R, d, T = 4, 16, 12
    on = Slots(1, R, d, dv, device)
    q, k, v = interleaved(T, H, (d, d, dv), device=device)
    rows = []
    for t in range(T):
        columns = (16, 64, 128)[t % 3]
        tuning = RingTuning(32, columns, 2, 128)
        monkeypatch.setattr(lightning_ring, "ring_tuning", lambda *of, tuning=tuning: tuning)
        monkeypatch.setattr(lightning_ring, "processors", lambda device: 1)  # no more programs
        rows.append(on.decode(q[t, None], k[t, None], v[t, None], [0], [t], drafts=1))
        assert (on.folded[..., 0] == 0).all() and (on.folded[..., 1] == t + 1).all()
    on.fold([0], [T], drafts=1)
    expected, state = lightning_reference(q, k, v, on.slopes, 1.0)
    assert error(torch.cat(rows), expected) <= 1e-5
    assert error(on.states[0], state) <= 1e-5


def test_prefill_goes_on_from_a_ring_and_decoding_from_a_prefill(device):
    """Chunks and single tokens by turns, as a conversation has them; two slots at once."""
    R, d, turns = 4, 32, [9, -3, 5, -6, 1, -1, 17, -9]
    T = sum(map(abs, turns))
    q, k, v = interleaved(2 * T, H, (d, d, d), device=device)
    q, k, v = (x.unflatten(0, (2, T)) for x in (q, k, v))
    on, slots, t, parts = Slots(4, R, d, d, device), [3, 1], 0, []
    for turn in turns:
        if turn > 0:
            on.fold(slots, [t, t], [t + turn, t + turn])
            packing = pack([turn, turn], slots, [t, t], device)
            part = (x[:, t : t + turn].flatten(0, 1) for x in (q, k, v))
            o = lightning_prefill(*part, on.slopes, 1.0, on.states, packing)
            parts.append(o.unflatten(0, (2, turn)))
        else:
            for i in range(t, t - turn):
                o = on.decode(q[:, i], k[:, i], v[:, i], slots, [i, i])
                parts.append(o[:, None])
        t += abs(turn)
    o = torch.cat(parts, 1)
    on.fold(slots, [T, T])
    assert (on.folded[[1, 3]] == T).all()
    for n, slot in enumerate(slots):
        expected, state = lightning_reference(q[n], k[n], v[n], on.slopes, 1.0)
        assert error(o[n], expected) <= 1e-5
        assert error(on.states[slot], state) <= 1e-5


def test_rolling_back_drafts_is_passing_a_smaller_start(device):
    """Every step drafts three tokens and keeps none to three, across several folds, and once more
    before a checkpoint: the tokens kept come out as if the others had never been."""
    R, d, drafts = 8, 16, 3
    T = 30
    q, k, v = interleaved(T, H, (d, d, d), device=device)
    on, t, kept, rows, again = Slots(1, R, d, d, device), 0, 0, [], set()
    while t < T:
        kept = (kept + 1) % (drafts + 1)
        rows.append(on.decode(q[t, None], k[t, None], v[t, None], [0], [t], drafts=drafts))
        t += 1
        for i in range(drafts):
            right = i < kept and t + i < T
            token = (x[t + i, None] if right else torch.randn_like(x[:1]) for x in (q, k, v))
            o = on.decode(*token, [0], [t + i], drafts=drafts)
            if right:
                rows.append(o)
        t = min(t + kept, T)
        again.add(int(on.folded[0, 0, 0, 1]) - t)  # steps that will be taken once more
    assert again == set(range(drafts + 1))
    expected, state = lightning_reference(q, k, v, on.slopes, 1.0)
    assert error(torch.cat(rows), expected) <= 1e-5
    on.fold([0], [T], drafts=drafts)
    assert error(on.states[0], state) <= 1e-5


def test_bfloat16_state(device):
    """A row is rounded once in R tokens."""
    R, d = 16, 32
    on = Slots(1, R, d, d, device, state_dtype=torch.bfloat16)
    q, k, v = interleaved(2 * R, H, (d, d, d), device=device)
    rows = [on.decode(q[t, None], k[t, None], v[t, None], [0], [t]) for t in range(2 * R)]
    o = torch.cat(rows)
    expected, state = lightning_reference(q, k, v, on.slopes, 1.0)
    assert error(o[:1], expected[:1]) <= 1e-6
    on.fold([0], [2 * R])
    assert error(o, expected) <= 4e-3 and error(on.states[0], state) <= 8e-3


@pytest.mark.parametrize("device", ["torch"], indirect=True)
def test_a_small_slope_does_not_drift(device):
    drift(device, 10_000)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="long for the interpreter")
@pytest.mark.parametrize("device", ["triton"], indirect=True)
def test_a_small_slope_does_not_drift_on_the_device(device):
    drift(device, 20_000)


def drift(device, n):
    """The state after n tokens is a sum that float64 takes at once."""
    d, R = 16, 16
    on = Slots(1, R, d, d, device)
    q, k, v = interleaved(n, H, (d, d, d), device=device)
    slot = torch.zeros(1, dtype=torch.int32, device=device)
    starts = torch.arange(n, device=device)
    for t in range(n):
        one = slice(t, t + 1)
        on.decode(q[one], k[one], v[one], slot, starts[one])
    on.fold([0], [n])
    age = torch.arange(n - 1, -1, -1, dtype=torch.float64, device=device)
    decay = torch.exp(-age[:, None] * on.slopes.double())
    expected = torch.einsum("thk,thv->hkv", k.double() * decay[..., None], v.double())
    for h in range(H):
        assert error(on.states[0, h], expected[h]) <= 1e-5, f"slope {SLOPES[h]}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph")
@pytest.mark.parametrize("device", ["triton"], indirect=True)
def test_a_graph_replays_folds_that_the_device_decides(device):
    N, R, d = 5, 8, 128
    T = 3 * R
    eager, replayed = (Slots(N, R, d, d, device, torch.bfloat16) for _ in range(2))
    q, k, v = interleaved(N * T, H, (d, d, d), torch.bfloat16, device)
    q, k, v = (x.unflatten(0, (N, T)) for x in (q, k, v))
    slots = torch.tensor([3, 0, -1, 4, 2], dtype=torch.int32, device=device)
    starts = torch.zeros(N, dtype=torch.int64, device=device)
    buffers = [torch.empty_like(x[:, 0]) for x in (q, k, v)]
    for buffer, x in zip(buffers, (q, k, v), strict=True):
        buffer.copy_(x[:, 0])
    replayed.decode(*buffers, slots, starts)  # compiles; a start of 0 forgets it again
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = replayed.decode(*buffers, slots, starts)
    for t in range(T):
        for buffer, x in zip(buffers, (q, k, v), strict=True):
            buffer.copy_(x[:, t])
        graph.replay()
        expected = eager.decode(q[:, t], k[:, t], v[:, t], slots, starts)
        assert torch.equal(o, expected)
        starts += 1
    real = [0, 2, 3, 4]
    assert torch.equal(eager.states[real], replayed.states[real])
    assert (replayed.folded[real][..., 1] == T).all()
