"""Sampling: distributions, filters, penalties and seeds, against plain arithmetic."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from model import sampling
from model.chunk import Chunk, Sampled, Sampling
from model.sampling import Seen, noise_keys, read, sample, uniform
from model.sequences import Sequences

CPU = torch.device("cpu")
SEQUENCES = Sequences(4, 0, CPU)
LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]


def draw(
    rows: list[Sampling],
    logits: torch.Tensor,
    *,
    generated: int = 0,
    suppress: tuple[int, ...] = (),
) -> list[Sampled]:
    chunks = [
        Chunk(tokens=[0], start=1, slot=i, sampling=s, generated=generated, suppress=suppress)
        for i, s in enumerate(rows)
    ]
    return read(sample(logits.clone(), chunks, Seen(logits.shape[1], CPU)), chunks)


def frequencies(n: int = 4000, **options: float) -> list[float]:
    rows = [Sampling(seed=seed, **options) for seed in range(n)]  # type: ignore[arg-type]
    counts = Counter(s.token for s in draw(rows, torch.tensor([LOGITS] * n)))
    return [counts[i] / n for i in range(len(LOGITS))]


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(v) for v in values]
    return [w / sum(weights) for w in weights]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    want = softmax([v / temperature for v in LOGITS])
    for got, p in zip(frequencies(temperature=temperature), want, strict=True):
        assert abs(got - p) < 4 * math.sqrt(p * (1 - p) / 4000) + 1e-9


def test_top_k_top_p_and_min_p_keep_what_they_should() -> None:
    p = softmax(LOGITS)
    got = frequencies(top_k=2)
    assert got[2:] == [0] * 4 and abs(got[0] - p[0] / (p[0] + p[1])) < 0.03
    assert p[0] < 0.6 < p[0] + p[1]
    assert frequencies(top_p=0.6)[2:] == [0] * 4 and frequencies(top_p=0.6)[1] > 0.1
    assert frequencies(top_p=1e-6)[0] == 1.0
    kept = [q >= 0.2 * p[0] for q in p]
    assert [f > 0 for f in frequencies(min_p=0.2)] == kept


def test_rows_of_every_kind_in_one_batch_equal_each_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    rows = [
        Sampling(temperature=0.0),
        Sampling(seed=1),
        Sampling(seed=2, top_k=5),
        Sampling(seed=3, top_p=0.5, temperature=0.7),
        Sampling(seed=4, min_p=0.1, logit_bias={7: 3.0}),
        Sampling(temperature=0.0, logit_bias={9: 100.0}, logprobs=3),
    ]
    together = draw(rows, logits)
    for i, row in enumerate(rows):
        chunk = Chunk(tokens=[0], start=1, slot=i, sampling=row)
        alone = read(sample(logits[i : i + 1].clone(), [chunk], Seen(50, CPU)), [chunk])[0]
        assert alone.token == together[i].token
    assert together[0].token == int(logits[0].argmax())
    assert together[5].token == 9
    log_p = logits[5].log_softmax(-1)
    assert together[5].logprob == pytest.approx(float(log_p[9]), abs=1e-6)
    assert [i for i, _ in together[5].top] == log_p.topk(3).indices.tolist()
    assert together[0].logprob is None


def test_seed_and_counter_alone_decide() -> None:
    logits = torch.zeros(1, 1000)
    tokens = [draw([Sampling(seed=5)], logits, generated=n)[0].token for n in range(50)]
    assert tokens == [draw([Sampling(seed=5)], logits, generated=n)[0].token for n in range(50)]
    assert len(set(tokens)) > 40
    rows = [
        Chunk(tokens=[0], start=1, slot=0, sampling=Sampling(seed=seed), generated=n)
        for seed in (0, 1, 2**63)
        for n in range(2000)
    ]
    keys = noise_keys(rows)
    assert len(set(keys.tolist())) == 6000 and (keys < 0).any()
    assert keys[2007] == noise_keys(rows[2007:2008])[0]
    assert noise_keys([Chunk(tokens=[0], start=1, slot=0)]) == [0]
    values = uniform(torch.from_numpy(keys)).tolist()
    assert len(set(values)) > 5990 and abs(sum(values) / len(values) - 0.5) < 0.02
    assert all(0 <= v < 1 for v in values)


def test_suppressed_ids_are_never_drawn() -> None:
    logits = torch.tensor([[5.0, 4.0, -2.0]])
    assert draw([Sampling(temperature=0.0)], logits, suppress=(0, 1))[0].token == 2
    assert draw([Sampling(seed=3)], logits, suppress=(0, 1))[0].token == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_minus_one(bad: float) -> None:
    logits = torch.zeros(2, 8)
    logits[1, 3] = bad
    good, failed = draw([Sampling(temperature=0.0)] * 2, logits)
    assert good.token >= 0 and failed.token == -1


def test_penalties_count_what_they_should() -> None:
    seen = Seen(6, CPU)
    options = Sampling(
        temperature=0.0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0
    )
    prompt = Chunk(tokens=[0, 4], start=0, slot=3, prompt=True, penalised=True)
    seen.record([prompt], SEQUENCES)
    for position, token in enumerate([1, 1, 5]):
        fed = Chunk(tokens=[token], start=2 + position, slot=3, prompt=False, penalised=True)
        seen.record([fed], SEQUENCES)
    logits = torch.tensor([LOGITS])
    asked = Chunk(tokens=[5], start=5, slot=3, sampling=options, prompt=False, penalised=True)
    before = logits.clone()
    sample(logits, [asked], seen)
    # id 0 and 4 in the prompt: repetition only; 1 twice and 5 once generated: all three
    want = [1.0, 1.0 / 2 - 0.5 - 0.5, 0.5, 0.0, -2.0, -6.0 - 0.5 - 0.25]
    assert logits[0].tolist() == pytest.approx(want) and not torch.equal(before, logits)


def test_a_recycled_slot_forgets() -> None:
    seen = Seen(6, CPU)
    seen.record([Chunk(tokens=[1], start=0, slot=0, penalised=True)], SEQUENCES)
    seen.record([Chunk(tokens=[2], start=0, slot=0, penalised=True)], SEQUENCES)
    assert seen.rows[0].tolist()[1] == 0
    seen.record([Chunk(tokens=[2], start=0, slot=0)], SEQUENCES)
    assert 0 not in seen.rows


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6, 1e-4])
def test_almost_no_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[1.0, 5.0, -2.0, 0.0]]) * 1000
    assert draw([Sampling(temperature=temperature, seed=3)], logits)[0].token == 1


def test_the_greatest_noise_finds_an_id_that_has_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    greatest = torch.tensor([1 - 2.0**-32], dtype=torch.float64)
    monkeypatch.setattr(sampling, "uniform", lambda keys: greatest)
    logits = torch.tensor([[5.0, 1.0, 0.0, -3.0, -math.inf]])
    assert draw([Sampling(min_p=1e-30)], logits)[0].token == 3
    assert draw([Sampling(top_k=1)], logits)[0].token == 0
    assert draw([Sampling(top_p=0.5)], logits)[0].token == 0


def test_penalties_that_overflow_are_told() -> None:
    seen = Seen(4, CPU)
    seen.record([Chunk(tokens=[1], start=0, slot=0, penalised=True)], SEQUENCES)
    options = Sampling(repetition_penalty=1e-40, logprobs=2)
    asked = Chunk(tokens=[2], start=1, slot=0, sampling=options, penalised=True)
    logits = torch.tensor([[0.0, 5.0, 1.0, -1.0]])
    assert read(sample(logits, [asked], seen), [asked])[0].token == -1
