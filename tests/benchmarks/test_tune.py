"""What may win when kernels are tuned: the fastest of the candidates that are right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import candidates, prefilling, tune
from kernels import lightning_prefill, tuning
from kernels.tuning import PrefillTuning, RereadTuning, Tiles, prefill_tuning


def test_a_wrong_candidate_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"nan": 1.0, "wrong": 2.0, "fails": 3.0, "fast": 4.0, "slow": 5.0}
    wrong = {"nan": float("nan"), "wrong": 0.1, "fast": 1e-3, "slow": 0.0}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    won = candidates.best("kernel", times, wrong.__getitem__, 4e-3, times.__getitem__)
    assert won == "fast"
    with pytest.raises(SystemExit, match="no candidate is right"):
        none = ["nan", "wrong", "fails"]
        candidates.best("kernel", none, wrong.__getitem__, 4e-3, times.__getitem__)


def test_when_time_is_over_what_is_in_use_stays(capsys: pytest.CaptureFixture[str]) -> None:
    times = {"usual": 5.0, "faster": 4.0}
    found = candidates.best("kernel", times, lambda _: 0.0, 1.0, times.__getitem__, deadline=0.0)
    assert found == "usual"
    assert "no time for the last 1 of 2" in capsys.readouterr().out
    assert not list(candidates.due(["2x64", "2x128"], ["2x128"], deadline=0.0))
    assert list(candidates.due(["2x64", "2x128"], ["2x128"], deadline=float("inf"))) == ["2x128"]


def test_each_class_is_written_when_it_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tmp_path / "tuning.json"
    name = "sm_{}{}".format(*tuning.card(candidates.DEVICE))
    table.write_text(json.dumps({name: {"decode": {"2": {"old": 1}, "4": {"old": 1}}}}))

    def found(classes: list[str], deadline: float) -> candidates.Found:
        yield "4", {"new": 2}
        yield "2", None
        raise RuntimeError("the card is lost")

    monkeypatch.setattr(tuning, "TABLE", table)
    monkeypatch.setitem(tune.TUNERS, "decode", found)
    monkeypatch.setattr("sys.argv", ["tune", "--only", "decode"])
    with pytest.raises(RuntimeError, match="lost"):
        tune.main()
    assert json.loads(table.read_text()) == {name: {"decode": {"4": {"new": 2}}}}


@torch.inference_mode()
def test_a_candidate_is_held_against_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and uncut, in the interpreter or on the card; a state that is not right is told."""
    monkeypatch.setattr(prefilling, "UGLY", (1, 63, 1000))
    torch.manual_seed(0)
    trial = prefilling.Prefilling(torch.float32, 16, 16)
    usual = prefill_tuning(candidates.DEVICE, 4, 64)
    for candidate in (usual, PrefillTuning(Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1), 2)):
        assert trial.check(candidate) <= prefilling.bound(torch.float32)
    output, state = trial.expected
    for broken in ((output, state * 1.001), (output * 1.001, state), (output, state * torch.nan)):
        trial.expected = broken
        assert not trial.check(usual) <= prefilling.bound(torch.float32)
    monkeypatch.setattr(prefilling, "UGLY", (1, 63))
    with pytest.raises(AssertionError, match="none of"):
        trial.check(usual)


@torch.inference_mode()
def test_sequences_of_middling_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that reads again is checked though it may be dear; equal cuts are timed once."""
    monkeypatch.setattr(prefilling, "UGLY", (63, 700))
    monkeypatch.setattr(prefilling, "MIDDLING", [(128, 4), (1024, 4)])
    monkeypatch.setattr(lightning_prefill, "processors", lambda device: 132)
    torch.manual_seed(0)
    trial = prefilling.Prefilling(torch.float32, 16, 16)
    usual = PrefillTuning(Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1), 2)
    dear = replace(usual, reread=RereadTuning(1, 2, 10.0))
    for candidate in (usual, dear):
        assert trial.check_reread(candidate) <= prefilling.bound(torch.float32)
    output, state = trial.expected
    trial.expected = output, state * 1.001
    assert not trial.check_reread(dear) <= prefilling.bound(torch.float32)

    timed: list[float] = []

    def milliseconds(work: object, rounds: int) -> float:
        timed.append(4.0 ** (len(timed) + 1))
        return timed[-1]

    monkeypatch.setattr(prefilling, "milliseconds", milliseconds)
    middling = prefilling.Middling(trial)
    assert middling.mean(usual) == middling.mean(dear) == pytest.approx(8.0)
    cheap = replace(usual, reread=RereadTuning(1, 2, 0.1))
    middling.mean(cheap)
    assert len(timed) == 3  # of 1024 rows, in one pass
