"""Without a GPU, Triton kernels run in Triton's interpreter; it must be told before the import."""

import os

import pytest

COMPILING_SECONDS = 900

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
try:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        from tests import interpreter

        interpreter.quicken()
except ImportError:
    pass


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Beside a GPU the first test of a model waits until its kernels are compiled."""
    for item in items if os.environ.get("TRITON_INTERPRET") != "1" else ():
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(COMPILING_SECONDS))
