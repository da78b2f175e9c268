"""Launches that are made again: for the same shapes alone, and on the tensors that are given."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from kernels import lightning_ring
from kernels.launches import Launches, launch
from kernels.lightning_prefill import lightning_prefill
from kernels.lightning_reference import lightning_reference
from kernels.lightning_ring import lightning_ring_decode
from tests.kernels.cases import pack

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class Kernel:
    """As Triton's: compiled at the first launch, which is in `first`; those after are in `more`."""

    arg_names = ("x_ptr", "n", "desc", "BLOCK")

    def __init__(self, interpreted=False):
        self.first, self.more, self.interpreted = [], [], interpreted

    def __getitem__(self, grid):
        def run(*args, **rest):
            self.first.append((grid, args, rest))
            return None if self.interpreted else self

        def again(*args):
            self.more.append((grid, args))

        return run if not self.first else again


def descriptor(x):
    return SimpleNamespace(base=x, shape=x.shape)


def made(kernel, x, y, n=3):
    return launch(kernel, (2, 5), (x, y), x, n, BLOCK=64, desc=descriptor(y), num_warps=4)


def test_what_was_launched_is_launched_again_on_other_tensors():
    kernel, known = Kernel(), Launches()
    x, y = torch.zeros(4, 8), torch.zeros(6, 2)
    assert not known.again((x, y), 3)
    known.keep((made(kernel, x, y),), (x, y), 3)
    (grid, args, rest), others = kernel.first[0], (torch.ones(4, 8), torch.ones(6, 2))
    assert grid == (2, 5) and args == (x, 3) and rest["num_warps"] == 4
    assert known.again(others, 3)
    [(grid, (pointer, n, desc, block))] = kernel.more
    assert grid == (2, 5, 1) and (pointer, n, block) == (others[0].data_ptr(), 3, 64)
    assert desc.base is others[1] and desc.shape == (6, 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: torch.zeros(5, 8),
        lambda x: torch.zeros(8, 4).t(),
        lambda x: x.double(),
        lambda x: torch.zeros(33)[1:].view(4, 8),
    ],
    ids=["shape", "strides", "dtype", "alignment"],
)
def test_other_shapes_are_others(change):
    kernel, known = Kernel(), Launches()
    x, y = torch.zeros(4, 8), torch.zeros(6, 2)
    known.keep((made(kernel, x, y),), (x, y), 3)
    assert known.again((x, y), 3) and not known.again((x, y), 4)
    assert not known.again((change(x), y), 3)
    assert len(kernel.more) == 1


def test_no_memory_is_kept_and_no_more_launches_than_are_allowed():
    known = Launches(2)
    x, y = torch.zeros(4, 8), torch.zeros(6, 2)
    kernels = [Kernel() for _ in range(4)]
    for n, kernel in enumerate(kernels):
        known.keep((made(kernel, x, y, n),), (x, y), n)
    assert [known.again((x, y), n) for n in range(4)] == [False, False, True, True]
    gone = weakref.ref(x), weakref.ref(y)
    for kernel in kernels:  # which remember more than Triton's
        kernel.first.clear()
        kernel.more.clear()
    del x, y
    assert [each() for each in gone] == [None, None]


def test_what_is_interpreted_is_not_kept():
    known = Launches()
    x, y = torch.zeros(4, 8), torch.zeros(6, 2)
    known.keep((made(Kernel(interpreted=True), x, y),), (x, y))
    known.keep((), (x, y))
    assert not known.again((x, y))


def test_a_tensor_in_two_parts_says_nothing_of_two_tensors():
    kernel, known = Kernel(), Launches()
    x = torch.zeros(4, 8)
    known.keep((launch(kernel, (1,), (x, x), x, 3, BLOCK=64, desc=x),), (x, x))
    assert len(kernel.first) == 1 and not known.again((x, x))


@pytest.mark.skipif(not CUDA, reason="Triton compiles for a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_are_launched_again_compute_the_same(dtype):
    """Layers by turns, whose tensors differ, through what the first of them has left."""
    H, D, lengths = 4, 128, [300, 70]
    slopes = torch.tensor([0.5, 0.05, 0.001, 0.0], device=DEVICE)
    packing = pack(lengths, [1, 0], [0, 0], DEVICE)
    for layer in range(3):
        torch.manual_seed(layer)
        q, k, v = (torch.randn(370, H, D, device=DEVICE, dtype=dtype) / 4 for _ in range(3))
        states = torch.full((2, H, D, D), torch.nan, device=DEVICE)
        o = lightning_prefill(q, k, v, slopes, 1.0, states, packing)
        for rows, slot in ((slice(0, 300), 1), (slice(300, 370), 0)):
            zeros = torch.zeros(H, D, D, device=DEVICE)
            want, state = lightning_reference(q[rows], k[rows], v[rows], slopes, 1.0, zeros)
            for actual, sure in ((o[rows], want), (states[slot], state)):
                error = (actual.double() - sure).norm() / sure.norm()
                assert error < (4e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.skipif(not CUDA, reason="Triton compiles for a GPU")
def test_the_ring_is_launched_again_on_the_memory_of_each_layer():
    H, D, R, N = 4, 128, 8, 3
    slopes = torch.tensor([0.5, 0.05, 0.001, 0.0], device=DEVICE)
    slots = torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)
    known = len(lightning_ring.DECODES._known)
    for layer in range(3):
        torch.manual_seed(layer)
        steps = [[torch.randn(N, H, D, device=DEVICE) / 4 for _ in range(3)] for _ in range(20)]
        states = torch.full((N, H, D, D), torch.nan, device=DEVICE)
        rings = [torch.full((N, H, R, D), torch.nan, device=DEVICE) for _ in range(2)]
        folded = torch.zeros(N, H, lightning_ring.parts(D), 2, dtype=torch.int64, device=DEVICE)
        outputs = []
        for t, inputs in enumerate(steps):
            starts, o = torch.full((N,), t, device=DEVICE), torch.empty_like(inputs[2])
            where = states, *rings, folded, slots, starts
            lightning_ring_decode(*inputs, slopes, 1.0, *where, drafts=1, out=o)
            outputs.append(o)
        for n in range(N):
            q, k, v = (torch.stack([step[j][n] for step in steps]) for j in range(3))
            zeros = torch.zeros(H, D, D, device=DEVICE)
            want, _ = lightning_reference(q, k, v, slopes, 1.0, zeros)
            found = torch.stack([o[n] for o in outputs])
            assert (found.double() - want).norm() / want.norm() < 1e-5
    assert len(lightning_ring.DECODES._known) <= known + 1
