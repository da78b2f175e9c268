"""What holds a kernel up: the hardware's counters by Nsight Compute, launch by launch.

    python -m benchmarks.counters [--ncu PATH] [--no-peer]

Decoding with a full ring, a fold in every step; a prefill of middling length, and FLA's beside it
if installed. Each work and size is a run of this file under ncu, which profiles one call after
others. ncu runs every kernel alone and several times over: its time has in it what an early start
would hide (`early` in kernels/language.py), and the clock is as it is found. Decoding meets an
empty L2, and what is left in it at the end counts for no byte of DRAM; a prefill meets it as it is,
for in a server its inputs have just been written. The rows hold what tells most, and `launches` in
the file all counters, by their names on Hopper.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.kernels import decode, prefill
from benchmarks.result import ROOT, Row, write
from benchmarks.trace import short
from kernels.lightning_prefill import lightning_prefill
from kernels.packing import Packing

H = 16
WARM = 3  # calls before the one that is profiled
TOP = 2  # reasons of stalls of a launch that get a row
PLACES = ["/usr/local/cuda/bin/ncu", *map(str, Path("/opt/nvidia/nsight-compute").glob("*/ncu"))]
OPTIONS = (
    "--clock-control none --csv --page raw --print-units base "
    "--profile-from-start off --target-processes all"
).split()

TIME = "gpu__time_duration.sum"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
DRAM = "dram__throughput.avg.pct_of_peak_sustained_elapsed"
REGISTERS = "launch__registers_per_thread"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active"
ISSUED = "smsp__issue_active.avg.pct_of_peak_sustained_active"
REASONS = (
    "barrier branch_resolving dispatch_stall drain gmma imc_miss lg_throttle long_scoreboard "
    "math_pipe_throttle membar mio_throttle no_instruction short_scoreboard wait"
).split()
STALLS = {
    reason.replace("_", " "): f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
    for reason in REASONS
}
METRICS = [
    *(TIME, READ, WRITTEN, DRAM, REGISTERS, WARPS, ISSUED),
    "launch__waves_per_multiprocessor",
    "lts__t_bytes.sum",
    "sm__cycles_elapsed.max",
    "smsp__cycles_active.avg",
    "smsp__inst_executed.sum",
    *STALLS.values(),
]
# into nanoseconds and bytes, should ncu have units of its own choice
UNITS = {"s": 1e9, "ms": 1e6, "us": 1e3, "second": 1e9, "msecond": 1e6, "usecond": 1e3}
UNITS |= {"Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


@dataclass(slots=True)
class Launch:
    """A kernel, its programs, their threads, and its counters by ncu's names."""

    kernel: str
    grid: int
    block: int
    counters: dict[str, float]


def decoding(B: int) -> Callable[[], Any]:
    """The next step of the layer that was touched longest ago."""
    layers = decode.Layers(B, torch.float32, ring=True)
    for _ in range(WARM):
        layers.step()
    return partial(layers.layer, 0, layers.inputs, layers.starts)


def prefilling(T: int, by: str) -> Callable[[], Any]:
    """A sequence that goes on from a state; FLA tunes itself at the first call."""
    q, k, v = prefill.Prefill(1, T, H).inputs()
    slopes, states = prefill.slopes_of(H, prefill.MIDDLE), prefill.initial_states(1, H)
    if by == "FLA":
        call = prefill.flas([q, k, v], slopes, states, T)["FLA chunk"]
    else:
        cu_seqlens, slot = (torch.tensor(x, dtype=torch.int32).cuda() for x in ([0, T], [0]))
        packing = Packing((T,), cu_seqlens, slot, slot.long() + 1)
        call = partial(lightning_prefill, q, k, v, slopes, 1.0, states, packing)
    for _ in range(WARM):
        call()
    return call


@dataclass(slots=True, frozen=True)
class Work:
    """Sizes, and what warms each up; cache: what ncu empties before a kernel."""

    name: str
    sizes: tuple[int, ...]
    warm: Callable[[int], Callable[[], Any]]
    cache: str


LENGTHS = 512, 1024
WORKS = {
    "decode": Work(f"decode {{}} sequences, ring of {decode.R}", (32, 256), decoding, "all"),
    "prefill": Work("prefill 1 x {} tokens", LENGTHS, partial(prefilling, by="ours"), "none"),
    "peer": Work("FLA chunk 1 x {} tokens", LENGTHS, partial(prefilling, by="FLA"), "none"),
}


def child(work: str, size: int) -> None:
    """One call between the marks that ncu looks for."""
    torch.manual_seed(0)
    with torch.inference_mode():
        call = WORKS[work].warm(size)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def parsed(log: str) -> list[Launch]:
    """What ncu's raw page says: a line of names, a line of units, and a line a launch."""
    lines = log.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    table = list(csv.reader(line for line in lines[start:] if line.startswith('"')))
    if len(table) < 3:
        return []
    names, units, *rest = table
    found = []
    for line in rest:
        cells = dict(zip(names, line, strict=True))
        counters = {}
        for name, unit, cell in zip(names, units, line, strict=True):
            if name in METRICS and re.fullmatch(r"[-+.,\deE]+", cell):  # else "n/a", "nan", ""
                counters[name] = float(cell.replace(",", "")) * UNITS.get(unit, 1.0)
        sizes = (re.findall(r"\d+", cells[f"{part} Size"]) for part in ("Grid", "Block"))
        grid, block = (math.prod(map(int, size)) for size in sizes)
        found.append(Launch(short(cells["Kernel Name"]), grid, block, counters))
    return found


def numbered(names: list[str]) -> list[str]:
    """Names that come several times get numbers."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(f"{name} {seen[name]}" if names.count(name) > 1 else name)
    return result


def rows_of(name: str, launches: list[Launch]) -> list[Row]:
    """All launches together if there are several, then each."""
    rows: list[Row] = []

    def row(what: str, value: float, unit: str, better: str = "lower") -> None:
        rows.append(Row(work=f"{name}: {what}", value=value, unit=unit, better=better))

    if len(launches) > 1:
        total = sum(launch.counters[TIME] for launch in launches)
        row(f"{len(launches)} launches", total / 1e3, "us")
    titles = numbered([launch.kernel for launch in launches])
    for kernel, launch in zip(titles, launches, strict=True):
        counters = launch.counters
        row(f"{kernel}, time", counters[TIME] / 1e3, "us")
        row(f"{kernel}, DRAM read and written", (counters[READ] + counters[WRITTEN]) / 1e6, "MB")
        row(f"{kernel}, of DRAM's peak rate", counters[DRAM], "%", "higher")
        row(f"{kernel}, grid", launch.grid, "programs")
        row(f"{kernel}, registers", counters[REGISTERS], "a thread")
        row(f"{kernel}, warps active", counters[WARPS], "%", "higher")
        row(f"{kernel}, issue slots active", counters[ISSUED], "%", "higher")
        for reason in sorted(STALLS, key=lambda each: -counters[STALLS[each]])[:TOP]:
            row(f"{kernel}, stalled on {reason}", counters[STALLS[reason]], "warps an issue")
    return rows


def run(work: str, size: int, under: list[str]) -> int:
    """Start this file for one work; what FLA finds in one run serves the next."""
    command = [*under, sys.executable, "-m", "benchmarks.counters", "--work", work]
    environment = os.environ | {"TRITON_CACHE_AUTOTUNING": "1"}
    return subprocess.run([*command, "--size", str(size)], cwd=ROOT, env=environment).returncode


def profiled(ncu: str, work: str, size: int) -> list[Launch]:
    """The launches of one call; ncu's own words, and the end, where a counter is missing."""
    under = [ncu, *OPTIONS, "--cache-control", WORKS[work].cache, "--metrics", ",".join(METRICS)]
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        ended = run(work, size, [*under, "--log-file", str(log)])
        said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    found = parsed(said)
    missing = [name for name in METRICS if not all(name in launch.counters for launch in found)]
    if ended or not found or missing:
        print(said, file=sys.stderr)
        without = f", without {', '.join(missing)}" if missing else ""
        sys.exit(f"{work} {size}: ncu ended with {ended}, {len(found)} launches{without}")
    return found


def tool(given: str | None) -> str:
    """Where ncu is."""
    found = next(filter(shutil.which, [given] if given else ["ncu", *PLACES]), None)
    if not found:
        sys.exit(f"no {given or 'ncu'}: install Nsight Compute, or say --ncu PATH")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ncu", help="the profiler, if not on the PATH")
    parser.add_argument("--no-peer", action="store_true", help="without FLA, which tunes itself")
    parser.add_argument("--work", choices=WORKS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        child(options.work, options.size)
        return
    ncu = tool(options.ncu)
    works, missing = ["decode", "prefill"], []
    if not options.no_peer:
        # it tunes itself without ncu, under which all launches take longer
        if find_spec("fla") and run("peer", LENGTHS[0], []) == 0:
            works.append("peer")
        else:
            missing = [WORKS["peer"].name.format(size) for size in LENGTHS]
            print("FLA is not installed, or fails: without it", flush=True)
    rows: list[Row] = []
    launches: dict[str, list[dict[str, Any]]] = {}
    for work in works:
        for size in WORKS[work].sizes:
            name = WORKS[work].name.format(size)
            found = profiled(ncu, work, size)
            launches[name] = [asdict(launch) for launch in found]
            fresh = rows_of(name, found)
            print(*fresh, sep="\n", flush=True)
            rows += fresh
    write("counters", rows, missing=missing, launches=launches)


if __name__ == "__main__":
    main()
