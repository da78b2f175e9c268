"""Drawing by the best of noisy logits: the noise, the distribution, the rows that are broken."""

from __future__ import annotations

import pytest
import torch

from kernels.sampling import draw, draw_reference


def rows(R, V, device):
    generator = torch.Generator().manual_seed(R * 1000 + V)
    logits = torch.randn(R, V, generator=generator) * 3
    keys = torch.randint(-(1 << 62), 1 << 62, (R,), generator=generator)
    return logits.to(device), keys.to(device)


@pytest.mark.parametrize("V", [1, 63, 100, 4096, 4097, 9000])
def test_ids_are_the_references(device, V):
    logits, keys = rows(7, V, device)
    temperatures = torch.tensor([0.0, 1.0, 0.5, 2.0, 1e-4, 0.0, 1.0], device=device)
    drawn = draw(logits[None], temperatures, keys)
    assert torch.equal(drawn, draw_reference(logits[None], temperatures, keys))
    assert torch.equal(drawn[[0, 5]], logits[[0, 5]].argmax(1))


@pytest.mark.parametrize("V", [63, 4097])
def test_two_terms_are_added_up(device, V):
    logits, keys = rows(5, V, device)
    terms = torch.stack((logits, torch.randn(5, V, device=device)))
    terms[1, 3, V // 2] = torch.nan
    temperatures = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0], device=device)
    drawn = draw(terms, temperatures, keys)
    assert torch.equal(drawn, draw((terms[0] + terms[1])[None], temperatures, keys))
    assert torch.equal(drawn, draw_reference(terms, temperatures, keys)) and drawn[3] == -1
    wide = torch.empty(2, 9, V, device=device)[:, 2:7].copy_(terms)  # rows of a larger batch
    assert torch.equal(draw(wide, temperatures, keys), drawn)


def test_a_row_is_drawn_the_same_in_every_batch(device):
    logits, keys = rows(9, 500, device)
    temperatures = torch.full((9,), 0.8, device=device)
    together = draw(logits[None], temperatures, keys)
    strided = torch.empty(9, 512, device=device)[:, :500].copy_(logits)
    assert torch.equal(draw(strided[None], temperatures, keys), together)
    for i in (0, 4, 8):
        one = slice(i, i + 1)
        assert torch.equal(draw(logits[None, one], temperatures[one], keys[one]), together[one])


def test_broken_rows_give_minus_one(device):
    logits, keys = rows(5, 5000, device)
    logits[0, 4999] = torch.nan
    logits[1, 0] = torch.inf
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf  # the one that is left
    for temperature in (0.0, 1.0):
        temperatures = torch.full((5,), temperature, device=device)
        drawn = draw(logits[None], temperatures, keys).tolist()
        assert drawn[:4] == [-1, -1, -1, 0] and drawn[4] >= 0


def test_the_distribution(device, request):
    """Chi-squared over 8 ids."""
    interpreted = "triton" in request.node.name and device.type == "cpu"
    n = 500 if interpreted else 50_000
    p = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.08, 0.07, 0.05, 0.05])
    temperature = 0.7
    logits = (p.log() * temperature).expand(n, 8).contiguous().to(device)
    keys = torch.arange(n, device=device) * 0x1E3779B97F4A7C15  # wraps: any spread of keys
    temperatures = torch.full((n,), temperature, device=device)
    counts = draw(logits[None], temperatures, keys).bincount(minlength=8)
    expected = p.double() * n
    chi = float(((counts.cpu().double() - expected) ** 2 / expected).sum())
    assert chi < 24.3  # 0.1 % of fair samplers are above, 7 degrees of freedom
