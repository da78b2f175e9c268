"""Where a result says it comes from, and what a run that is ended leaves behind."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import result, table
from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels import prefill
from benchmarks.result import Row
from kernels.lightning_reference import lightning_reference


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree without history."""
    monkeypatch.setattr(result, "ROOT", tmp_path)
    monkeypatch.setattr(result, "RESULTS", tmp_path / "benchmarks" / "results")
    for name in ("benchmarks/results/a.json", "kernels/a.py", "kernels/__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "pyproject.toml").write_text("[project]")
    return tmp_path


def test_a_copy_is_what_its_digest_says(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEADYSTATE_COMMIT", "0123abc")
    assert result.commit() == "0123abc-unchecked"
    monkeypatch.setenv("STEADYSTATE_COMMIT", f"0123abc:{result.digest()}")
    assert result.commit() == "0123abc"
    for name in ("benchmarks/results/a.json", "kernels/__pycache__/a.pyc", "notes.txt"):
        (copy / name).write_text("other")  # no code
    assert result.commit() == "0123abc"
    (copy / "kernels" / "b.py").write_text("")
    assert result.commit() == "0123abc-dirty"
    (copy / "kernels" / "b.py").unlink()
    (copy / "kernels" / "a.py").write_text("other")
    assert result.commit() == "0123abc-dirty"


def test_a_tree_without_history_and_without_a_name(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STEADYSTATE_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(copy.parent))
    assert result.commit() == "unknown"


def test_a_run_that_is_ended_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = ["prefill a", "prefill b", "prefill c"]

    def row(work: str) -> Row:
        return Row(work=work, value=1.0, unit="ms", better="lower", peers={"FLA chunk": 2.0})

    def prefills(bandwidth: float, deadline: float) -> Iterator[Row]:
        assert 0 < deadline - time.monotonic() <= 7
        yield row(works[0])  # the second does not fit
        yield row(works[2])

    def decodes(bandwidth: float, deadline: float) -> Iterator[Row]:
        yield row("decode a")
        raise RuntimeError("the card is lost")

    monkeypatch.setattr(result, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(prefill, "WORKS", works)
    monkeypatch.setattr(kernels, "GROUPS", {"prefill": prefills, "decode": decodes, "rowwise": []})
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda: 3e12)
    monkeypatch.setattr(kernels, "gemm_rate", lambda: 7e14)
    command = "kernels --peer-seconds 7 --only prefill decode"
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(RuntimeError, match="lost"):
        kernels.main()
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert path.name.startswith("kernels-prefill-decode-") and content["copy_TBps"] == 3.0
    assert [row["work"] for row in content["rows"]] == ["prefill a", "prefill c", "decode a"]
    assert content["missing"] == ["prefill b", "decode"]
    assert content["command"] == f"python -m benchmarks.{command}"
    assert "Not measured: prefill b; decode." in table.table(path.stem)

    monkeypatch.setattr("sys.argv", ["kernels", "--peer-seconds", "7", "--seconds", "0"])
    path.unlink()
    kernels.main()
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    assert path.name.startswith("kernels-") and len(content["rows"]) == 1
    assert content["missing"] == ["prefill b", "prefill c", "decode", "rowwise"]


def test_names_of_prefills() -> None:
    assert len(set(prefill.WORKS)) == len(prefill.WORKS)
    assert all(shape.works[0] in prefill.WORKS for shape in prefill.SHAPES)


def test_the_check_of_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, against the recurrence; it tells a wrong output and a wrong state."""
    monkeypatch.setattr(prefill, "PIECE", 100)
    torch.manual_seed(0)
    T, H, d = 257, 3, 16
    inputs = [torch.randn(T, H, d) for _ in range(3)]
    slopes, initial = torch.tensor([0.9, 0.0, 0.03]), torch.randn(1, H, d, d)
    o, state = lightning_reference(*inputs, slopes, 1.0, initial[0])
    rest = inputs, slopes, initial
    assert prefill.check(*rest, o, state[None], T) < 1e-12
    assert prefill.check(*rest, o, state[None] * 1.01, T) > 5e-3
    o[T - 1] *= 1.1
    assert prefill.check(*rest, o, state[None], T) > 5e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU")
def test_prefills_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [prefill.Prefill(1, 300, 8), prefill.Prefill(3, 64, 4, 1.9, prefill.EACH)]
    monkeypatch.setattr(prefill, "SHAPES", shapes)
    with torch.inference_mode():
        rows = list(prefill.rows(3e12, deadline=0.0))
    assert [row.work for row in rows] == [work for shape in shapes for work in shape.works]
    assert all(row.value > 0 and not row.peers for row in rows)
