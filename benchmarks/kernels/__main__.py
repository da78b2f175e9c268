"""Kernels beside the floor of the card, measured in the same run, and beside FLA if installed.

    python -m benchmarks.kernels [--peer-seconds 120] [--only attention ...]

A floor is the time of a copy as large as what must be read and written once. Every work is checked
against float64 before it is timed; times are those of a replayed CUDA graph.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.kernels import attention, decode, mixture, prefill, rowwise, softmax
from benchmarks.result import Row, write
from benchmarks.timing import copy_bandwidth, gemm_rate

GROUPS = {
    "prefill": prefill.rows,
    "decode": decode.rows,
    "rowwise": rowwise.rows,
    "softmax": softmax.rows,
    "attention": attention.rows,
    "mixture": mixture.rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peer-seconds", type=float, default=120, help="for FLA, 0: leave it out")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth, operations = copy_bandwidth(), gemm_rate()
    torch.cuda.empty_cache()
    rows: list[Row] = []
    with torch.inference_mode():
        for name in options.only:
            rows += GROUPS[name](bandwidth, time.monotonic() + options.peer_seconds)
    write("kernels", rows, copy_TBps=bandwidth / 1e12, gemm_TFLOPs=operations / 1e12)


if __name__ == "__main__":
    main()
