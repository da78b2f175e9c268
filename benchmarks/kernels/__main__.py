"""Kernels beside the floor of the card, measured in the same run, and beside FLA if installed.

    python -m benchmarks.kernels [--peer-seconds 240] [--seconds 480] [--only attention ...]
                                 [--tokens 512 ...]

A floor is the time of a copy as large as what must be read and written once. Every work is checked
against float64 before it is timed; times are those of a replayed CUDA graph. The file of results is
written after each row, and names what is not measured yet: a run may be ended at any time. It is
kernels-<card>.json, or kernels-<groups>-<card>.json where only some groups were asked for; of
prefills, those of some lengths by --tokens, which stand in the name too.
FLA tunes itself by trying dozens of kernels, before anything is measured.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.kernels import attention, decode, mixture, prefill, rowwise, skinny, softmax
from benchmarks.result import Row, write
from benchmarks.timing import copy_bandwidth, gemm_rate

GROUPS: dict[str, Callable[[float, float], Iterator[Row]]] = {
    "prefill": prefill.rows,
    "decode": decode.rows,
    "rowwise": rowwise.rows,
    "skinny": skinny.rows,
    "softmax": softmax.rows,
    "attention": attention.rows,
    "mixture": mixture.rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--peer-seconds", type=float, default=240, help="for FLA to tune itself in, 0: without"
    )
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which none begins")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[], help="of a prefill's sequences"
    )
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    torch.manual_seed(0)
    bandwidth, operations = copy_bandwidth(), gemm_rate()
    torch.cuda.empty_cache()
    rates = {"copy_TBps": bandwidth / 1e12, "gemm_TFLOPs": operations / 1e12}
    some = options.only if options.only != list(GROUPS) else []
    file = "-".join(["kernels", *some, *map(str, options.tokens)])
    measured, works = GROUPS, prefill.WORKS
    if options.tokens:
        measured = GROUPS | {"prefill": partial(prefill.rows, tokens=options.tokens)}
        works = [work for shape in prefill.shapes(options.tokens) for work in shape.works]
    rows: list[Row] = []
    finished: set[str] = set()

    def save() -> None:
        done = {row.work for row in rows} | finished
        groups = [works if name == "prefill" else [name] for name in options.only]
        missing = [work for group in groups for work in group if work not in done]
        write("kernels", rows, name=file, missing=missing, **rates)

    with torch.inference_mode():
        for name in options.only:
            for row in measured[name](bandwidth, time.monotonic() + options.peer_seconds):
                rows.append(row)
                print(row, flush=True)
                save()
                if time.monotonic() > until:
                    return
            finished.add(name)
            save()


if __name__ == "__main__":
    main()
