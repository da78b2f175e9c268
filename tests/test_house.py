"""The walls of the house: which way imports point, and who may import what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("server", "model", "kernels")
BELOW = {"server": {"model"}, "model": {"kernels"}, "kernels": set()}
# the doors between the processes' own folder and the arithmetic, which open when they are called
DOORS = {
    "server/engine/__main__.py": ("model.runner",),
    "server/cli/plan.py": ("model.plan", "model.config"),
    "server/cli/convert.py": ("model.convert",),
}
WORDS = ("model.chunk", "model.index", "model.progress")  # what they share
ONLY_IN = {"triton": ("kernels",), "fastapi": ("server",), "torch": ("model", "kernels")}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide their direction"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_down(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        tops = {module.split(".")[0] for module in imports(path)}
        assert not (tops & set(FOLDERS)) - {folder} - BELOW[folder], name
        for package, homes in ONLY_IN.items():
            assert package not in tops or folder in homes, f"{name} imports {package}"


def test_server_knows_only_the_words_of_model() -> None:
    for path in (ROOT / "server").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        known = (*WORDS, *DOORS.get(name, ()))
        for module in imports(path):
            if module.split(".")[0] == "model" and module != "model":
                assert module.startswith(known), f"{name} imports {module}"


def test_scheduler_and_client_run_without_torch() -> None:
    """transformers' tokenizers load torch where it is installed; nothing of ours does."""
    code = (
        "import sys, server.cli, server.engine.loop, server.api.client;"
        "assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_our_kernels_folder_is_not_taken_for_the_hub_package() -> None:
    code = (
        "from transformers import MiniMaxForCausalLM;"
        "from transformers.utils.import_utils import is_kernels_available;"
        "import kernels; assert kernels.__version__ == '0.1.0';"
        "assert is_kernels_available() is False"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_kernels_init_imports_nothing() -> None:
    assert imports(ROOT / "kernels" / "__init__.py") == set()
