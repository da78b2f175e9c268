"""The form of a result: one JSON file a benchmark and card, rows with floor, goal and peers.

    python -m benchmarks.result

prints the commit and the digest of the code at hand, for a copy of it that has no history.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
CODE = ("benchmarks", "kernels", "model", "server", "constraints.txt", "pyproject.toml")


@dataclass(slots=True, kw_only=True)
class Row:
    """One measured value. peers: the same work done by others in the same run."""

    work: str
    value: float
    unit: str
    better: str  # "lower" or "higher"
    floor: float | None = None
    goal: float | None = None
    peers: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        peers = ", ".join(f"{name} {value:.4g}" for name, value in self.peers.items())
        return f"{self.work:58s} {self.value:12.4g} {self.unit:10s} {peers}"


def device_name() -> str:
    """The GPU's name, or the processor's with the number of cores in use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def card_name(gpu: str) -> str:
    """A GPU's model, without its maker, as it stands in names of files."""
    words = [word for word in gpu.split() if word not in ("NVIDIA", "Tesla", "GeForce", "RTX")]
    return words[0].lower()


def digest() -> str:
    """Of the code that is measured, as it lies here: names and contents of its files."""
    files = [path for top in CODE for path in (ROOT / top, *(ROOT / top).rglob("*"))]
    total = hashlib.sha256()
    for path in sorted(files):
        if path.is_file() and "__pycache__" not in path.parts and RESULTS not in path.parents:
            content = path.read_bytes()
            total.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode())
            total.update(content)
    return total.hexdigest()[:16]


def commit() -> str:
    """The commit that was measured, marked where the code beside the results had changes.

    Where the code was copied without its history, STEADYSTATE_COMMIT is the commit and, after a
    colon, the digest of its code (`python -m benchmarks.result` prints both): the copy is marked
    if it has another digest, or if there is none to hold it against. Every result keeps the digest
    of its code too: of a marked one it tells which commit holds the changes.
    """
    if "STEADYSTATE_COMMIT" in os.environ:
        name, _, expected = os.environ["STEADYSTATE_COMMIT"].partition(":")
        if not expected:
            return name + "-unchecked"
        return name + ("" if digest() == expected else "-dirty")

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(
    bench: str,
    rows: list[Row],
    *,
    name: str | None = None,
    missing: list[str] | None = None,
    **measured: Any,
) -> Path:
    """Write results/<name>-<card>.json, by default the bench's name, and print the rows.

    missing: works that were to be measured and are not; a run that writes as it goes names what
    is still to come, and prints its rows itself.
    """
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    import torch

    gpu = device_name()
    card = card_name(gpu) if torch.cuda.is_available() else "cpu"
    path = RESULTS / f"{name or bench}-{card}.json"
    arguments = " ".join(map(shlex.quote, sys.argv[1:]))
    content = {
        "command": f"python -m benchmarks.{bench} {arguments}".strip(),
        "commit": commit(),
        "code": digest(),
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "versions": versions,
        **measured,
        **({"missing": missing} if missing else {}),
        "rows": [asdict(row) for row in rows],
    }
    half = path.with_suffix(".part")
    half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    half.replace(path)  # a run that is ended leaves a whole file
    for row in rows if missing is None else ():
        print(row)
    return path


if __name__ == "__main__":
    print(f"{commit()}:{digest()}")
