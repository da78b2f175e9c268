"""Every kernel test runs twice: the torch path on the CPU, and Triton on the GPU or interpreted."""

import importlib

import pytest
import torch

MODULES = (
    "exchange",
    "gated",
    "grouped_gemm",
    "join",
    "latest",
    "lightning_decode",
    "lightning_prefill",
    "lightning_ring",
    "lrpe",
    "paged_attention",
    "residual_rmsnorm",
    "rmsnorm",
    "rmsnorm_gate",
    "rotary",
    "routing",
    "sampling",
    "sorting",
    "window_attention",
)


@pytest.fixture(params=["torch", "triton"])
def device(request, monkeypatch):
    """The device whose tensors a wrapper serves by the path that the parameter names."""
    if request.param == "torch":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.importorskip("triton")
    for name in MODULES:
        module = importlib.import_module(f"kernels.{name}")
        for of in ("", "_fold", "_remember", "_take", "_tell", "_send"):
            if hasattr(module, f"_triton{of}"):
                monkeypatch.setattr(module, f"_torch{of}", getattr(module, f"_triton{of}"))
    return torch.device("cpu")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request, device):
    """float16 stands in where the interpreter is at a loss: it multiplies no bfloat16."""
    if request.param == torch.bfloat16 and "triton" in request.node.name and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies no bfloat16")
    return request.param


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """torch.empty and empty_like give NaN: what a kernel leaves unwritten is found out."""

    def poisoned(make):
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return filled

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    """Each test draws the same numbers, whichever ran before it and whatever device it is for."""

    def moved(draw):
        def drawn(*args, device=None, **kwargs):
            if kwargs.get("generator") is not None:  # its device is where it draws
                return draw(*args, device=device, **kwargs)
            tensor = draw(*args, **kwargs)
            return tensor if device is None else tensor.to(device)

        return drawn

    for name in ("rand", "randn", "randint", "randperm"):
        monkeypatch.setattr(torch, name, moved(getattr(torch, name)))
    torch.manual_seed(0)


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """The tensors are small: a second thread would only wait for its turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
