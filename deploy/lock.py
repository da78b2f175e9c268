"""python -m deploy.lock: writes deploy/lock/*.txt, what the image installs, with hashes.

common.txt is all but torch's build; cuda.txt is torch as PyPI has it for Linux, with Triton and
the CUDA libraries that it demands; cpu.txt is torch without them. Versions are constraints.txt's,
and what that does not name is the newest that fits. Hashes come from the index: nothing is
downloaded but the one wheel of cpu.txt, which pip must be configured to find.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "deploy" / "lock"
PYTHONS = ("3.11", "3.12", "3.13")  # a base image may have any of them; all must agree
CPU_PYTHON = "3.11"  # that of the Debian release the CPU image is built on
CUDA = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
HEADER = "# python -m deploy.lock writes this; pip install --require-hashes --no-deps reads it.\n"


def resolve(python: str) -> dict[str, str]:
    """What Linux needs under a version of Python: requirement: its lines with hashes."""
    command = [
        *("uv", "pip", "compile", "pyproject.toml", "--quiet", "--constraint", "constraints.txt"),
        *("--generate-hashes", "--no-annotate", "--no-header"),
        *("--python-version", python, "--python-platform", "x86_64-manylinux_2_28"),
    ]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    entries = re.split(r"^(?=\S)", text, flags=re.MULTILINE)
    return {entry.split()[0]: entry for entry in entries if entry}


def cpu_torch(version: str) -> str:
    """The entry of torch's CPU build."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        choice = ["--no-deps", "--only-binary", ":all:", "--python-version", CPU_PYTHON]
        command = [*pip, "download", "--quiet", "--dest", folder, *choice, f"torch=={version}+cpu"]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        hashed = subprocess.run(
            [*pip, "hash", str(wheel)], check=True, capture_output=True, text=True
        )
    digest = hashed.stdout.split()[-1]
    return f"torch=={version}+cpu \\\n    {digest}\n"


def main() -> int:
    found = [resolve(python) for python in PYTHONS]
    entries = found[0]
    for python, other in zip(PYTHONS, found, strict=True):
        if other != entries:
            print(f"Python {python}: {sorted(other.keys() ^ entries.keys())}", file=sys.stderr)
            return 1
    (torch,) = (name.removeprefix("torch==") for name in entries if name.startswith("torch=="))
    files = {
        "common.txt": [text for name, text in entries.items() if not CUDA.match(name)],
        "cuda.txt": [text for name, text in entries.items() if CUDA.match(name)],
        "cpu.txt": [cpu_torch(torch), *(t for n, t in entries.items() if n.startswith("triton"))],
    }
    for name, texts in files.items():
        (LOCK / name).write_text(HEADER + "".join(texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
