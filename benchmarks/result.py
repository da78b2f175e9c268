"""The form of a result: one JSON file a benchmark and card, rows with floor, goal and peers."""

from __future__ import annotations

import datetime
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

RESULTS = Path(__file__).parent / "results"


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


def commit() -> str:
    """The commit that was measured, marked where the code beside the results had changes.

    STEADYSTATE_COMMIT names it where the code was copied without its history.
    """
    if "STEADYSTATE_COMMIT" in os.environ:
        return os.environ["STEADYSTATE_COMMIT"]

    def git(*arguments: str) -> str:
        root = Path(__file__).parent.parent
        done = subprocess.run(
            ["git", *arguments], cwd=root, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(bench: str, rows: list[Row], *, name: str | None = None, **measured: Any) -> Path:
    """Write results/<name>-<card>.json, by default the bench's name, and print the rows."""
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
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "versions": versions,
        **measured,
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        peers = ", ".join(f"{name} {value:.4g}" for name, value in row.peers.items())
        print(f"{row.work:58s} {row.value:12.4g} {row.unit:10s} {peers}")
    return path
