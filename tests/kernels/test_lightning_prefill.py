"""Chunked lightning attention against the recurrence."""

from dataclasses import replace

import pytest
import torch

from kernels import lightning_prefill as lightning_prefill_module
from kernels import lightning_prefill_hopper as hopper
from kernels import segments, tuning
from kernels.lightning_decode import lightning_decode
from kernels.lightning_prefill import lightning_prefill
from kernels.lightning_reference import lightning_reference
from kernels.tuning import PREFILL, RereadTuning, prefill_tuning
from tests.kernels.cases import error, interleaved, pack, pool

BOUND = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-3}
SLOPES = [0.9, 4.05e-8, 0.0, 0.03]  # float32 rounds exp(-64 * 4.05e-8) as badly as it can
triton_only = pytest.mark.parametrize("device", ["triton"], indirect=True)


def check(lengths, starts, *, dk, dv, dtype, device, H=2, state_dtype=torch.float32, bound=None):
    """One call for all sequences, slots in no order, against the recurrence of each alone."""
    bound = bound or BOUND[dtype]
    N = len(lengths)
    q, k, v = interleaved(sum(lengths), H, (dk, dk, dv), dtype, device)
    slopes = torch.tensor(SLOPES[:H], device=device)
    slots = torch.randperm(2 * N)[:N].tolist()
    (states,) = pool(2 * N, (H, dk, dv), dtype=state_dtype, device=device)
    initial = torch.randn(N, H, dk, dv, device=device).to(state_dtype)
    for i in range(N):
        if starts[i] > 0:
            states[slots[i]] = initial[i]
        else:
            initial[i] = 0  # while the slot holds NaN
    o = lightning_prefill(q, k, v, slopes, 0.3, states, pack(lengths, slots, starts, device))
    assert o.dtype == dtype and o.is_contiguous() and o.shape == (sum(lengths), H, dv)
    first = 0
    for i, n in enumerate(lengths):
        rows = slice(first, first + n)
        first += n
        expected, state = lightning_reference(q[rows], k[rows], v[rows], slopes, 0.3, initial[i])
        assert error(o[rows], expected) <= bound
        assert error(states[slots[i]], state) <= bound
    untouched = [i for i in range(2 * N) if i not in slots]
    assert states[untouched].isnan().all()


def test_ugly_lengths_in_one_call(device, dtype):
    lengths, starts = [64, 1, 781, 63, 257, 100], [5, 1, 70, 0, 3, 0]
    check(lengths, starts, dk=32, dv=16, dtype=dtype, device=device)


def test_equal_lengths(device):
    lengths, starts = [100, 100, 100, 64, 64, 7, 7, 100], [0, 1, 2, 3, 0, 5, 0, 7]
    check(lengths, starts, dk=16, dv=16, dtype=torch.float32, device=device)


@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (96, 96), (128, 128), (256, 128), (48, 80)])
def test_head_sizes(device, dk, dv, dtype):
    check([1, 70], [9, 0], dk=dk, dv=dv, dtype=dtype, device=device, H=1)


def test_four_slopes(device):
    check([257, 70], [0, 4], dk=16, dv=32, dtype=torch.float32, device=device, H=4)


@pytest.fixture(params=[False, True], ids=["scanned", "reread"])
def short_segments(request, monkeypatch):
    """Whatever is longer than 64 rows is cut, for three passes or for one."""
    monkeypatch.setattr(segments, "choose", lambda *_: (64, request.param))


@triton_only
def test_segments(device, short_segments):
    lengths, starts = [257, 64, 1, 781, 128, 65], [5, 1, 70, 0, 3, 0]
    check(lengths, starts, dk=16, dv=32, dtype=torch.float32, device=device, H=4)


@triton_only
@pytest.mark.parametrize("going_on", [0, 9])
def test_middling_lengths_in_one_pass(device, going_on, monkeypatch):
    """Each alone and all in a batch, new ones (which need no copy of a state) and others."""
    monkeypatch.setattr(segments, "choose", lambda *_: (256, True))
    lengths = [1, 63, 64, 65, 100, 257, 781, 1024, 1500]
    kinds = {"dk": 16, "dv": 16, "dtype": torch.float32, "device": device, "H": 4}
    check(lengths, [going_on, 0, 1] * 3 if going_on else [0] * 9, **kinds)
    for n in (257, 1024):
        check([n], [going_on], **kinds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="long for the interpreter")
@triton_only
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_middling_lengths_by_stages(device, dtype, stages, monkeypatch):
    usual = prefill_tuning(device, dtype.itemsize, 128)
    tuned = replace(usual, reread=RereadTuning(stages, 1, 0.25))
    monkeypatch.setattr(lightning_prefill_module, "prefill_tuning", lambda *_: tuned)
    monkeypatch.setattr(segments, "choose", lambda *_: (256, True))
    lengths, starts = [1, 63, 64, 65, 100, 257, 781, 1024, 1500], [9, 0, 1] * 3
    check(lengths, starts, dk=128, dv=128, dtype=dtype, device=device, H=4)


@triton_only
@pytest.mark.parametrize(("dk", "dv"), [(64, 64), (96, 96), (128, 128), (256, 128), (48, 80)])
def test_segments_of_head_sizes(device, dk, dv, dtype, short_segments):
    check([193, 70, 33], [9, 0, 1], dk=dk, dv=dv, dtype=dtype, device=device)


@triton_only
def test_segments_with_a_bfloat16_state(device, dtype, short_segments):
    dtypes = {"dtype": dtype, "state_dtype": torch.bfloat16}
    check([100, 70], [0, 4], dk=128, dv=128, device=device, bound=4e-3, **dtypes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no card: see test_tuned.py")
@triton_only
@pytest.mark.parametrize("itemsize, dk", PREFILL)
def test_every_tuning_of_the_card(device, itemsize, dk, short_segments):
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    check([330, 70], [3, 0], dk=dk, dv=128, dtype=dtype, device=device)


@pytest.mark.parametrize(("dk", "dv"), [(128, 128), (48, 80)])
def test_sequences_that_the_device_alone_knows(device, dtype, dk, dv):
    """Rows of others lie before, between and behind theirs; items past the last have no rows."""
    H, T, N = 2, 200, 4
    q, k, v = interleaved(T, H, (dk, dk, dv), dtype, device)
    slopes = torch.tensor(SLOPES[:H], device=device)
    (states,) = pool(N, (H, dk, dv), device=device)
    sequences = {3: (3, 100, 7), 0: (110, 65, 0)}  # slot: first row, rows, start
    states[3] = before = torch.randn(H, dk, dv, device=device)
    empty = pack([], [3, 0, -1, -1], [7, 0, 0, 0], device)
    cut = [(*sequences[slot][:2], i, 1) for i, slot in enumerate((3, 0))]
    items = torch.tensor([*cut, (0, 0, 2, 0), (0, 0, 3, 0)], dtype=torch.int32, device=device)
    out = torch.full((T, H, dv), 5.0, device=device).to(dtype)
    packing = replace(empty, items=items)
    lightning_prefill(q, k, v, slopes, 0.3, states, packing, out=out)
    others = torch.ones(T, dtype=torch.bool)
    for slot, (first, n, start) in sequences.items():
        rows = slice(first, first + n)
        others[rows] = False
        S = before if start else torch.zeros_like(before)
        expected, state = lightning_reference(q[rows], k[rows], v[rows], slopes, 0.3, S)
        assert error(out[rows], expected) <= BOUND[dtype]
        assert error(states[slot], state) <= BOUND[dtype]
    assert (out[others] == 5).all() and states[1:3].isnan().all()


@triton_only
@pytest.mark.parametrize("cut", [None, False, True], ids=["whole", "scanned", "reread"])
def test_nan_stays_with_its_sequence(device, dtype, cut, monkeypatch):
    if cut is not None:
        monkeypatch.setattr(segments, "choose", lambda *_: (64, cut))
    H, d, lengths = 1, 128, [70, 3, 90, 33]
    q, k, v = interleaved(sum(lengths), H, (d, d, d), dtype, device)
    q[70:73] = k[70:73] = v[70:73] = q[163:] = k[163:] = v[163:] = torch.nan
    slopes = torch.tensor(SLOPES[:H], device=device)
    (states,) = pool(4, (H, d, d), device=device)
    packing = pack(lengths, [2, 0, 3, 1], [0, 0, 0, 0], device)
    o = lightning_prefill(q, k, v, slopes, 1.0, states, packing)
    assert o[:70].isfinite().all() and o[73:163].isfinite().all()
    assert states[2:].isfinite().all()


@triton_only
def test_rows_that_bulk_copies_cannot_read(device, dtype):
    """The state of 128 x 128 has a kernel of its own on Hopper, but not for odd strides."""
    lengths, H, d = [70, 33], 2, 128
    q, k, v, _ = interleaved(sum(lengths), H, (d, d, d, 1), dtype, device)
    slopes = torch.tensor(SLOPES[:H], device=device)
    (states,) = pool(2, (H, d, d), device=device)
    packing = pack(lengths, [1, 0], [0, 0], device)
    o = lightning_prefill(q, k, v, slopes, 0.3, states, packing)
    expected, state = lightning_reference(q[:70], k[:70], v[:70], slopes, 0.3)
    assert error(o[:70], expected) <= BOUND[dtype] and error(states[1], state) <= BOUND[dtype]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what Hopper's kernel does")
@triton_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_is_changed_once_all_segments_have_read_it(device, dtype):
    """As tuned, in many calls on end: each leaves the counts as it has found them."""
    rows = [torch.empty(64, 8, 128, dtype=dtype, device=device) for _ in range(3)]
    if not hopper.serves(*rows):
        pytest.skip("another card")
    for call in range(40):
        kinds = {"dk": 128, "dv": 128, "dtype": dtype, "device": device}
        check([512 + 13 * call], [9], H=4, **kinds)
        check([700, 64, 300 + call], [9, 3, 0], H=2, **kinds)
        assert not hopper.readers(rows[0].device).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="long for the interpreter")
@triton_only
@pytest.mark.parametrize("d", [64, 128])
def test_long_sequences_are_cut_by_themselves(device, dtype, d):
    lengths, starts, H = [9001, 300, 40_000], [4, 0, 0], 2
    q, k, v = interleaved(sum(lengths), H, (d, d, d), dtype, device)
    slopes = torch.tensor([0.004, 4.05e-8], device=device)
    states = torch.randn(3, H, d, d, device=device)
    expected_states = states.cpu()
    o = lightning_prefill(q, k, v, slopes, 0.3, states, pack(lengths, [2, 0, 1], starts, device))
    rows, packing = (x.float().cpu() for x in (q, k, v)), pack(lengths, [2, 0, 1], starts)
    expected = lightning_prefill(*rows, slopes.cpu(), 0.3, expected_states, packing)
    bound = max(BOUND[dtype], 2e-5)  # of two float32 sums
    assert error(o, expected) <= bound and error(states, expected_states) <= bound


def test_segment_lengths():
    def length(lengths, H=16, programs=132):
        return segments.scanned(tuple(lengths), H, programs, 4 * 128 * 128)[0]

    assert length([1, 100, 512]) >= 512
    assert length([2048] * 64) >= 2048  # many sequences fill the card uncut
    assert length([8192]) == 1024  # one does in 8 x 16 pieces
    assert length([2048]) == 256 and length([512]) >= 512
    assert 1_048_576 / length([1_048_576]) * 16 * 4 * 128 * 128 <= segments.SCRATCH
    assert length([4_000_000, 1], H=64) < 4_000_000


def test_which_segments_read_again_what_comes_before():
    def chosen(lengths, once=(132, 0.25, 0), start=0, H=16):
        packing = pack(lengths, range(len(lengths)), [start] * len(lengths))
        return segments.plan(packing, H, 132, 4 * 128 * 128, once)

    def kind(*args, **options):
        work = chosen(*args, **options)
        return work.length, work.reread

    assert kind([512]) == (64, True) and kind([1024]) == (128, True)
    assert kind([512], once=None)[1] is False  # unless that was measured
    assert kind([64]) == (128, False) and kind([1, 64, 30])[1] is False  # nothing to cut
    for lengths in ([2048] * 64, [8192], [131_072], [512] * 16):
        assert kind(lengths) == kind(lengths, once=None)
    assert kind([300, 1, 1024, 64]) == (256, True)  # all at once: 2 + 1 + 4 + 1 items of 16 heads
    new, going_on = chosen([1024, 64]), chosen([1024, 64], start=7)
    assert (len(new.chains), new.segments, new.states) == (0, 0, 0)
    assert (going_on.chains.tolist(), going_on.segments) == ([[0, 0, 0, 0]], 6)
    shared = chosen([1024, 64], (132, 0.25, 96), start=7)  # 6 segments of 16 heads, no copies
    assert (len(shared.chains), shared.segments, shared.states) == (0, 6, 0)
    assert shared.items.tolist() == going_on.items.tolist()
    more = chosen([1024, 64], (132, 0.25, 95), start=7)
    assert (more.chains.tolist(), more.states) == (going_on.chains.tolist(), 2)
    assert [row for row, *_ in new.items.tolist()] == [*range(960, -1, -192), 1024]


def test_bfloat16_state(device):
    dtypes = {"dtype": torch.float32, "state_dtype": torch.bfloat16}
    check([100, 70], [0, 4], dk=32, dv=32, device=device, bound=4e-3, **dtypes)


@pytest.mark.parametrize("splits", [(1, 780), (64, 717), (100, 300, 381), (780, 1)])
def test_chunks_equal_the_whole(device, splits):
    H, d, n = 2, 16, sum(splits)
    q, k, v = interleaved(n, H, (d, d, d), device=device)
    slopes = torch.tensor(SLOPES[:H], device=device)
    (whole,), (parts,) = pool(1, (H, d, d), device=device), pool(1, (H, d, d), device=device)
    expected = lightning_prefill(q, k, v, slopes, 1.0, whole, pack([n], [0], [0], device))
    start, rows = 0, []
    for m in splits:
        q_i, k_i, v_i = (x[start : start + m] for x in (q, k, v))
        packing = pack([m], [0], [start], device)
        rows.append(lightning_prefill(q_i, k_i, v_i, slopes, 1.0, parts, packing))
        start += m
    assert error(torch.cat(rows), expected) <= 1e-5
    assert error(parts, whole) <= 1e-5


def test_token_by_token_equals_the_whole(device):
    H, d, n = 2, 32, 70
    q, k, v = interleaved(n, H, (d, d, d), device=device)
    slopes = torch.tensor(SLOPES[:H], device=device)
    (whole,), (parts,) = pool(1, (H, d, d), device=device), pool(1, (H, d, d), device=device)
    expected = lightning_prefill(q, k, v, slopes, 1.0, whole, pack([n], [0], [0], device))
    slot = torch.zeros(1, dtype=torch.int32, device=device)
    rows = []
    for t in range(n):
        start = torch.tensor([t], device=device)
        q_t, k_t, v_t = (x[t : t + 1] for x in (q, k, v))
        rows.append(lightning_decode(q_t, k_t, v_t, slopes, 1.0, parts, slot, start))
    assert error(torch.cat(rows), expected) <= 1e-5
    assert error(parts, whole) <= 1e-5


@pytest.mark.parametrize("device", ["torch"], indirect=True)
def test_a_small_slope_does_not_drift(device):
    """Multiplied by a rounded decay, the state would be off by 3e-5 after so many blocks."""
    drift(device, 131_072)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="long for the interpreter")
@triton_only
def test_a_small_slope_does_not_drift_on_the_device(device):
    drift(device, 131_072)


def drift(device, n):
    """Fold n tokens in pieces; the state is a sum that float64 takes at once."""
    H, d = 4, 16
    slopes = torch.tensor(SLOPES, device=device)
    (states,) = pool(1, (H, d, d), device=device)
    q, k, v = interleaved(n, H, (d, d, d), device=device)
    for start in range(0, n, 8192):
        rows = slice(start, start + 8192)
        packing = pack([8192], [0], [start], device)
        lightning_prefill(q[rows], k[rows], v[rows], slopes, 1.0, states, packing)
    age = torch.arange(n - 1, -1, -1, dtype=torch.float64, device=device)
    decay = torch.exp(-age[:, None] * slopes.double())
    expected = torch.einsum("thk,thv->hkv", k.double() * decay[..., None], v.double())
    for h in range(H):
        assert error(states[0, h], expected[h]) <= 1e-5, f"slope {SLOPES[h]}"


def test_a_length_of_zero_is_named():
    with pytest.raises(ValueError, match=r"sequence 1 .* length 0"):
        pack([3, 0], [0, 1], [0, 0])


def test_middling_lengths_are_read_in_one_pass_where_that_was_measured(monkeypatch):
    row = {"stages": 4, "resident": 1, "cost": 0.3}
    monkeypatch.setattr(tuning, "measured", lambda card: {"prefill": {"2x128-short": row}})
    prefill_tuning.cache_clear()
    cpu = torch.device("cpu")
    try:
        assert prefill_tuning(cpu, 2, 128) == replace(PREFILL[2, 128], reread=RereadTuning(**row))
        assert prefill_tuning(cpu, 4, 128).reread is None
    finally:
        prefill_tuning.cache_clear()
