"""What ncu prints becomes rows; without ncu, or without a counter, nothing is written."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import counters, result
from benchmarks.kernels import decode

FIXED = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream"]
FIXED += ["Block Size", "Grid Size", "Device", "CC"]
NAMES = [*FIXED, "device__attribute_architecture", *sorted(counters.METRICS)]
SCAN = "void at::native::vectorized_elementwise_kernel<4, at::native::Fill<float>>(int, T2, T3)"


def sample(kernels: list[str], **changed: str) -> str:
    """A log of ncu; `changed`: what the last launch has, by the last part of a counter's name."""

    def cell(name: str, last: bool) -> str:
        known = {
            counters.TIME: "12,384",
            counters.READ: "33,554,432",
            counters.WRITTEN: "2,097,152",
            counters.DRAM: "61.5",
            counters.REGISTERS: "64",
            counters.STALLS["long scoreboard"]: "9.25",
            counters.STALLS["wait"]: "1.5",
        }
        return known.get(name, "0.5") if not last else changed.get(name, known.get(name, "0.5"))

    text = io.StringIO()
    lines = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    units = {counters.TIME: "ns", counters.READ: "byte", counters.WRITTEN: "byte"}
    lines.writerow(NAMES)
    lines.writerow([""] * len(FIXED) + [units.get(name, "") for name in NAMES[len(FIXED) :]])
    for i, kernel in enumerate(kernels):
        fixed = [str(i), "71", "python3.12", "127.0.0.1", kernel, "1", "7"]
        fixed += ["(128, 1, 1)", "(32, 32, 1)", "0", "9.0"]
        last = i == len(kernels) - 1
        lines.writerow([*fixed, *(cell(name, last) for name in NAMES[len(FIXED) :])])
    before = '==PROF== Connected to process 71 (/usr/bin/python3.12)\n==PROF== Profiling "a": 0%\n'
    return f"{before}==PROF== Disconnected from process 71\n{text.getvalue()}"


def test_a_line_is_a_launch() -> None:
    first, second = counters.parsed(sample(["_decode_kernel", SCAN]))
    assert (first.kernel, first.grid, first.block) == ("_decode_kernel", 1024, 128)
    assert second.kernel == "at::native::vectorized_elementwise_kernel"
    assert set(first.counters) == set(counters.METRICS)
    assert first.counters[counters.READ] == 33_554_432
    assert first.counters[counters.TIME] == 12_384
    assert counters.parsed("==WARNING== No kernels were profiled.\n") == []
    lines = sample(["_decode_kernel"]).splitlines()
    assert counters.parsed("\n".join(lines[:-1])) == []


def test_units_of_its_own_choice() -> None:
    log = sample(["a"]).replace('"ns"', '"usecond"').replace('"byte"', '"Kbyte"')
    (launch,) = counters.parsed(log.replace("12,384", "12.384"))
    assert launch.counters[counters.TIME] == pytest.approx(12_384)
    assert launch.counters[counters.WRITTEN] == 2_097_152e3


def test_launches_are_numbered_and_summed() -> None:
    launches = counters.parsed(sample(["copy", "scan(int*)", "copy"], **{counters.TIME: "616"}))
    rows = {row.work: row for row in counters.rows_of("prefill", launches)}
    assert len(rows) == 1 + 3 * (7 + counters.TOP)
    assert rows["prefill: 3 launches"].value == pytest.approx(2 * 12.384 + 0.616)
    assert rows["prefill: copy 1, time"].value == pytest.approx(12.384)
    assert rows["prefill: copy 2, time"].value == pytest.approx(0.616)
    row = rows["prefill: scan, DRAM read and written"]
    assert row.value == pytest.approx(35.651584) and row.unit == "MB"
    assert rows["prefill: scan, grid"].value == 1024
    assert rows["prefill: scan, stalled on long scoreboard"].value == 9.25
    assert rows["prefill: scan, stalled on wait"].value == 1.5
    (first, *_) = counters.rows_of("decode", launches[:1])
    assert first.work == "decode: copy, time"


def fake(folder: Path, log: str, status: int = 0) -> str:
    """An ncu that says this into its log file and runs nothing."""
    (folder / "said").write_text(log)
    path = folder / "ncu"
    loop = 'while [ "$1" != --log-file ]; do shift; done'
    path.write_text(f'#!/bin/sh\n{loop}\ncat "{folder}/said" > "$2"\nexit {status}\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(result, "RESULTS", folder)
    return folder


def test_all_works(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "find_spec", lambda name: None)
    ncu = fake(tmp_path, sample(["_outputs_kernel"]))
    monkeypatch.setattr("sys.argv", ["counters", "--ncu", ncu])
    counters.main()
    (path,) = results.iterdir()
    content = json.loads(path.read_text())
    assert path.name.startswith("counters-")
    assert content["missing"] == ["FLA chunk 1 x 512 tokens", "FLA chunk 1 x 1024 tokens"]
    works = [f"decode {B} sequences, ring of 16" for B in (32, 256)]
    works += [f"prefill 1 x {T} tokens" for T in (512, 1024)]
    assert list(content["launches"]) == works
    assert [row["work"] for row in content["rows"] if row["work"].endswith(", time")] == [
        f"{work}: _outputs_kernel, time" for work in works
    ]
    assert all(math.isfinite(row["value"]) for row in content["rows"])


@pytest.mark.parametrize(
    ("log", "status", "match"),
    [
        ("==ERROR== Failed to find metric dram__bits.sum\n", 1, "ended with 1, 0 launches"),
        ("==WARNING== No kernels were profiled.\n", 0, "ended with 0, 0 launches"),
        (sample(["a"]), 7, "ended with 7, 1 launches$"),
        (sample(["a"], **{counters.DRAM: "n/a"}), 0, f"without {counters.DRAM}"),
        (sample(["a"], **{counters.DRAM: "nan"}), 0, f"without {counters.DRAM}"),
    ],
    ids=["unknown", "none", "status", "n/a", "nan"],
)
def test_what_ncu_does_not_say_is_not_written(
    log: str,
    status: int,
    match: str,
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ncu = fake(tmp_path, log, status)
    monkeypatch.setattr("sys.argv", ["counters", "--no-peer", "--ncu", ncu])
    with pytest.raises(SystemExit, match=match):
        counters.main()
    assert not list(results.iterdir())
    assert log in capsys.readouterr().err


def test_without_ncu(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(results))
    monkeypatch.setattr(counters, "PLACES", [])
    monkeypatch.setattr("sys.argv", ["counters"])
    with pytest.raises(SystemExit, match="no ncu: install Nsight Compute"):
        counters.main()
    place = fake(tmp_path, "")
    monkeypatch.setattr(counters, "PLACES", ["/nowhere/ncu", place])
    assert counters.tool(None) == place
    with pytest.raises(SystemExit, match="no /nowhere/ncu"):
        counters.tool("/nowhere/ncu")
    assert not list(results.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="decodes on a GPU")
@torch.inference_mode()
def test_every_sequence_folds_in_the_step_that_is_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "POOL_BYTES", 20_000_000)
    step = counters.decoding(5)
    layers: decode.Layers = step.func.__self__  # type: ignore[attr-defined]
    before = layers.states[0].clone()
    step()
    assert (layers.states[0] != before).flatten(2).any(2).all()
