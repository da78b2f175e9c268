"""Without a GPU, Triton kernels run in Triton's interpreter; it must be told before the import."""

import os
from pathlib import Path

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
    """Tests of the whole, in this folder, begin first: they take long, and at the end one process
    would be alone with them.

    Beside a GPU the first test of a model waits until its kernels are compiled.
    """
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
    for item in items if os.environ.get("TRITON_INTERPRET") != "1" else ():
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(COMPILING_SECONDS))
