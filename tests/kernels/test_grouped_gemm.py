"""Grouped products with quantised matrices, on ugly numbers of rows, outputs and inputs."""

import pytest
import torch

from kernels import grouped_gemm as module
from kernels.grouped_gemm import grouped_gemm, grouped_gemm_reference, tiles
from kernels.linear import activations
from kernels.quantize import LIMITS, Quantized
from tests.kernels.cases import error, product_bound

CODES = pytest.mark.parametrize("codes", LIMITS, ids=str)
GROUPS = {
    "one-row": [1],
    "empty-ends": [0, 3, 0, 0, 17, 0],
    "all-in-one": [0, 0, 150, 0],
    "uneven": [1, 63, 0, 40, 2, 16],
    "full": [257],
    "many": [i % 3 for i in range(13)],
}


def case(counts, N, K, codes, dtype, device):
    """Rows, matrices whose rows are of unlike size, and where groups end."""
    x = torch.randn(sum(counts), K, device=device).to(dtype)
    w = torch.randn(len(counts) * N, K, device=device)
    w *= torch.linspace(0.1, 10, len(w), device=device)[:, None]
    matrices = Quantized.empty((len(counts), N, K), codes, device)
    for e, matrix in enumerate(w.split(N)):
        matrices[e].copy_(matrix)
    ends = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
    return activations(x, matrices), matrices, ends


def usual(device):
    """What a device computes in; float16 stands in where the interpreter is at a loss."""
    return torch.bfloat16 if device.type == "cuda" else torch.float16


@CODES
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("N", "K"), [(48, 128), (33, 63)])
def test_groups(device, codes, name, N, K):
    dtype = usual(device)
    x, w, ends = case(GROUPS[name], N, K, codes, dtype, device)
    y = grouped_gemm(x, w, ends, dtype)
    assert y.dtype == dtype and y.shape == (sum(GROUPS[name]), N)
    assert error(y, grouped_gemm_reference(x, w, ends)) <= product_bound(dtype, codes, device)


@CODES
@pytest.mark.parametrize(("R", "N"), [(1, 1), (17, 70), (100, 70), (781, 16)])
def test_one_group(device, dtype, codes, R, N):
    x, w, ends = case([R], N, 96, codes, dtype, device)
    bound = product_bound(dtype, codes, device)
    alone, grouped = grouped_gemm(x, w, None, dtype), grouped_gemm(x, w, ends, dtype)
    assert error(alone, grouped_gemm_reference(x, w, ends)) <= bound
    assert error(grouped, alone) <= bound


@CODES
@pytest.mark.parametrize("counts", [[1, 0, 2], [20, 0, 43], [40, 0, 80], [150]], ids=str)
def test_every_size_of_tile(device, codes, counts):
    """As many rows a group as each branch of `tiles` is for, with a group that has none."""
    dtype = usual(device)
    x, w, ends = case(counts, 136, 256, codes, dtype, device)
    y = grouped_gemm(x, w, ends, dtype)
    assert error(y, grouped_gemm_reference(x, w, ends)) <= product_bound(dtype, codes, device)


def test_sizes_cover_every_mean():
    """The branches that test_every_size_of_tile means to take are taken."""
    cpu = torch.device("cpu")
    means = [(3, 3), (63, 3), (120, 3), (150, 1)]
    heights = [tiles(rows, groups, 136, 2, cpu)["BLOCK_M"] for rows, groups in means]
    assert heights == [16, 32, 64, 128]


def test_no_rows(device):
    x, w, ends = case([0, 0], 8, 16, torch.int8, torch.float32, device)
    assert grouped_gemm(x, w, ends, torch.float32).shape == (0, 8)


@CODES
def test_a_row_does_not_depend_on_its_company(device, codes):
    x, w, ends = case([3, 0, 30, 7], 40, 96, codes, torch.float32, device)
    together = grouped_gemm(x, w, ends, torch.float32)
    bounds = [0, *ends.tolist()]
    for e in range(4):
        for r in range(bounds[e], bounds[e + 1], 3):
            alone = grouped_gemm(x[r : r + 1], w[e : e + 1], None, torch.float32)
            assert error(alone, together[r : r + 1]) <= 1e-6


def test_neighbours_with_nan_are_not_read(device):
    """Beside the rows of x and the outputs of w lie others."""
    x, w, ends = case([5, 9], 33, 64, torch.int8, torch.float32, device)
    wide = torch.full((14, 100), torch.nan, device=device)
    wide[:, :64] = x
    want = grouped_gemm_reference(x, w, ends)
    assert error(grouped_gemm(wide[:, :64], w, ends, torch.float32), want) <= 2e-6


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="PyTorch's grouped product of fp8 is Hopper's",
)
@pytest.mark.parametrize("name", GROUPS)
def test_both_products_of_fp8_agree(name, monkeypatch):
    """PyTorch's, which Hopper takes, and the kernel, which other cards take."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    x, w, ends = case(GROUPS[name], 160, 256, torch.float8_e4m3fn, dtype, device)
    want, bound = grouped_gemm_reference(x, w, ends), product_bound(dtype, w.codes.dtype, device)
    assert error(module._library(x, w, ends), want) <= bound
    monkeypatch.setattr(module, "card", lambda _: (8, 9))
    assert error(grouped_gemm(x, w, ends, dtype), want) <= bound
