"""What may win when kernels are tuned: the fastest of the candidates that are right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import candidates, mixtures, tune, tune_experts
from kernels.routing import Choice
from kernels.tuning import (
    MixtureTuning,
    PrefillTuning,
    ProductTuning,
    RouteTuning,
    Tiles,
    prefill_tuning,
)


def test_a_wrong_candidate_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"nan": 1.0, "wrong": 2.0, "fails": 3.0, "fast": 4.0, "slow": 5.0}
    wrong = {"nan": float("nan"), "wrong": 0.1, "fast": 1e-3, "slow": 0.0}
    monkeypatch.setattr(candidates, "milliseconds", lambda work, rounds: work())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def work(name: str) -> Callable[[], float]:
        return lambda: times[name]

    won = candidates.best("kernel", times, wrong.__getitem__, 4e-3, work)
    assert won == "fast"
    with pytest.raises(SystemExit, match="no candidate is right"):
        candidates.best("kernel", ["nan", "wrong", "fails"], wrong.__getitem__, 4e-3, work)


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


SMALL = mixtures.Shape("small", 64, 32, 6, Choice(2), False)
ROW, TILE = ProductTuning(1, 16, 32, 4, 1), ProductTuning(16, 32, 32, 4, 2)


@pytest.mark.parametrize("codes", [None, torch.int8], ids=str)
@torch.inference_mode()
def test_a_mixture_is_held_against_each_expert(codes: torch.dtype | None) -> None:
    """Of our kernels and of grouped products; an error in one token of many is told."""
    torch.manual_seed(0)
    mixture = mixtures.Mixture(mixtures.Layers(SMALL, codes, torch.float32), 9)
    due = mixture.due()
    assert (mixture.skewed[0] == SMALL.E // 2).any(1).all()
    for candidate in (None, MixtureTuning(ROW, TILE), MixtureTuning(TILE, ROW)):
        assert mixture.check(candidate, due) <= 1e-5
    for i, factor in ((0, 1.1), (1, 1.1), (1, torch.nan)):
        wrong = [y.clone() for y in due]
        wrong[i][8] *= factor
        assert not mixture.check(None, wrong) <= tune_experts.LIMIT


@torch.inference_mode()
def test_choices_are_held_against_float64() -> None:
    torch.manual_seed(0)
    trial = tune_experts.Routing(SMALL)
    trial.hidden = trial.hidden[:2]
    for candidate in (None, RouteTuning(1, False), RouteTuning(4, True)):
        assert trial.check(candidate) <= 1e-3
    trial.routers = [-trial.routers[0]]
    kept, trial.run = trial.run, lambda h, router, candidate: kept(h, -router, candidate)
    assert not trial.check(None) <= 1e-3


def test_candidates_of_a_mixture_fit_their_class() -> None:
    """Rows alone for few, and no tile far larger than an expert's rows, whatever the class."""
    for shape in mixtures.SHAPES:
        for T in tune_experts.TOKENS:
            rows = T * shape.choice.top
            found = tune_experts.products(rows, shape.E, shape.D)
            assert len(set(found)) == len(found) >= 4
            assert (found[0].rows == 1) == (rows <= max(16, shape.E // 2))
            assert max(each.rows for each in found) <= max(16, 4 * rows // shape.E)
