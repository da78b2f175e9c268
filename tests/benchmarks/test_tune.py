"""What may win when kernels are tuned: the fastest of the candidates that are right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import tune
from kernels.tuning import PrefillTuning, Tiles, prefill_tuning


def test_a_wrong_candidate_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"nan": 1.0, "wrong": 2.0, "fails": 3.0, "fast": 4.0, "slow": 5.0}
    wrong = {"nan": float("nan"), "wrong": 0.1, "fast": 1e-3, "slow": 0.0}
    monkeypatch.setattr(tune, "milliseconds", lambda work, rounds: work())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def work(name: str) -> Callable[[], float]:
        return lambda: times[name]

    won = tune.best("kernel", times, wrong.__getitem__, 4e-3, work)
    assert won == "fast"
    with pytest.raises(SystemExit, match="no candidate is right"):
        tune.best("kernel", ["nan", "wrong", "fails"], wrong.__getitem__, 4e-3, work)


@torch.inference_mode()
def test_a_candidate_is_held_against_the_recurrence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and uncut, in the interpreter or on the card; a state that is not right is told."""
    monkeypatch.setattr(tune, "UGLY", (1, 63, 700))
    monkeypatch.setattr(tune, "LONG", 64)
    torch.manual_seed(0)
    trial = tune.Prefilling(torch.float32, 16, 16)
    usual = prefill_tuning(tune.DEVICE, 4, 64)
    for candidate in (usual, PrefillTuning(Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1), 2)):
        assert trial.check(candidate) <= tune.bound(torch.float32)
    output, state = trial.expected
    for broken in ((output, state * 1.001), (output * 1.001, state), (output, state * torch.nan)):
        trial.expected = broken
        assert not trial.check(usual) <= tune.bound(torch.float32)
