"""What may win when kernels are tuned: the fastest of the candidates that are right."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import (
    candidates,
    mixtures,
    prefilling,
    skinny,
    tune,
    tune_experts,
    tune_skinny,
)
from kernels import lightning_prefill, tuning
from kernels.routing import Choice
from kernels.tuning import (
    SKINNY,
    MixtureTuning,
    PrefillTuning,
    ProductTuning,
    RereadTuning,
    RouteTuning,
    SkinnyTuning,
    Tiles,
    prefill_tuning,
    skinny_tuning,
)


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


@pytest.mark.parametrize(
    "form", ["plain", "plain-silu_mul", "norm", "norm-silu", "norm-mul", "norm-head", "gate2"]
)
@pytest.mark.parametrize("rows", [1, 16])
@torch.inference_mode()
def test_both_ways_of_a_product_are_held_against_float64(
    form: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of one part in a thousand is told."""
    torch.manual_seed(0)
    monkeypatch.setattr(skinny, "COLD_BYTES", 1)
    trial = skinny.Trial(f"{form}-4x{rows}x48x64", candidates.DEVICE)
    assert len(trial.weights) == 1
    right = skinny.skinny_gemm_reference
    for candidate in (None, SkinnyTuning(rows, 16, 32, 4, 2, early=False)):
        assert trial.check(candidate, every=True) <= trial.limit
        with monkeypatch.context() as patch:
            patch.setattr(skinny, "skinny_gemm_reference", lambda *a, **o: right(*a, **o) * 1.001)
            assert not trial.check(candidate) <= trial.limit


def test_candidates_of_a_product_suit_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skinny, "COLD_BYTES", 1)
    for rows in SKINNY:
        for form in ("norm-silu", "gate4"):
            trial = skinny.Trial(f"{form}-2x{rows}x64x2048", torch.device("cpu"))
            found = tune_skinny.candidates(trial)
            assert len(set(found)) == len(found) >= 4
            assert (found[0].rows == 1) == (rows == 1)
            assert all(each.rows <= max(rows, 16) for each in found)
            assert form == "norm-silu" or all(each.inputs == 512 for each in found)


def test_several_kernels_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the table has no row, and the product goes their way."""
    monkeypatch.setattr(skinny, "COLD_BYTES", 1)
    monkeypatch.setattr(tune_skinny, "DEVICE", torch.device("cpu"))
    names = ["norm-4x1x48x64", "norm-4x16x48x64"]
    won = {names[0]: None, names[1]: SkinnyTuning(16, 16, 32, 4, 2, early=False)}

    def best(title: str, options: object, check: object, **rest: object) -> SkinnyTuning | None:
        return won[title.removeprefix("skinny ")]

    monkeypatch.setattr(tune_skinny, "best", best)
    table = dict(tune_skinny.tune_skinny(names, math.inf))
    assert list(table) == names and table[names[0]] is None
    monkeypatch.setattr(tuning, "measured", lambda capability: {"skinny": table})
    tuning.skinny_of.cache_clear()
    with pytest.raises(SystemExit, match="matches none"):
        list(tune_skinny.tune_skinny(["nothing-*"], math.inf))
    on = torch.device("cpu")
    assert skinny_tuning(on, 4, "norm", 1, 48, 64) is None
    assert skinny_tuning(on, 4, "norm", 9, 48, 64) == won[names[1]]
    tuning.skinny_of.cache_clear()


def test_what_wins_is_right_in_everything_that_goes_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Candidates are timed in one form; a faster one that is wrong in another does not serve."""
    monkeypatch.setattr(skinny, "COLD_BYTES", 1)
    trial = skinny.Trial("norm-4x16x48x64", torch.device("cpu"))
    fast, slow = (SkinnyTuning(16, n, 32, 4, 2, early=False) for n in (16, 32))
    times = {fast: 1.0, replace(fast, early=True): 0.5, slow: 2.0, replace(slow, early=True): 1.5}

    def check(tuning: SkinnyTuning | None, every: bool = False) -> float:
        return 1.0 if every and tuning in (fast, replace(fast, early=True)) else 0.0

    monkeypatch.setattr(trial, "check", check)
    monkeypatch.setattr(trial, "work", lambda tuning: lambda: times.get(tuning, 3.0))
    monkeypatch.setattr(tune_skinny, "candidates", lambda trial: [fast, slow])
    monkeypatch.setattr(candidates, "milliseconds", lambda work, rounds: work())
    assert tune_skinny.tuned("norm", trial, math.inf) == replace(slow, early=True)
    times[slow] = times[replace(slow, early=True)] = 4.0
    assert tune_skinny.tuned("norm", trial, math.inf) is None


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
            for bulk in (False, True):
                found = tune_experts.products(rows, shape.E, shape.D, bulk)
                assert len(set(found)) == len(found) >= 4
                assert (found[0].rows == 1) == (rows <= max(16, shape.E // 2))
                assert max(each.rows for each in found) <= max(16, 4 * rows // shape.E)
                assert bulk or not any(each.bulk for each in found)
                assert len(found) <= 12  # the card's time is dear


@torch.inference_mode()
def test_both_ways_of_copying_weights_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiles that have won; down stays as it is while tiles of gate and up are found."""
    layers = mixtures.Layers(SMALL, None, torch.float32)
    mixture, tried = mixtures.Mixture(layers, 9), []

    def work(tuning: MixtureTuning | None, rounds: int) -> float:
        tried.append(tuning)
        return 9.0 if tuning is None else float(tuning.up.bulk == tuning.down.bulk)

    monkeypatch.setattr(mixture, "step", lambda tuning: None)
    monkeypatch.setattr(tune_experts, "card", lambda device: (9, 0))
    monkeypatch.setattr(tune_experts, "timed", lambda _: partial(work, rounds=1))
    monkeypatch.setattr(tune_experts, "ROWS", [])
    monkeypatch.setattr(tune_experts, "SHORT_ROWS", [])
    monkeypatch.setattr(tune_experts, "TILES", {1 << 30: [(16, 32, 32, 4, 2), (32, 32, 32, 4, 2)]})
    row = tune_experts.tune_mixture("small", mixture, 18, math.inf)
    assert row is not None and row["up"] == asdict(replace(TILE, bulk=True))
    assert row["down"] == asdict(TILE)
    assert {each.down for each in tried[:4] if each} == {TILE}
