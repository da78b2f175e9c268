"""The long stream at a small scale: the state that it ends with, and the tokens that it draws."""

from __future__ import annotations

import pytest
import torch

from benchmarks import four_billion

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def test_the_states_are_those_of_the_other_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, piece = 1 << 14, 1 << 11
    monkeypatch.setattr(four_billion, "PERIOD", 1 << 12)
    monkeypatch.setattr(four_billion, "PIECE", piece)
    monkeypatch.setattr(four_billion, "CHUNK", 1500)
    stream = four_billion.Stream(DEVICE)
    for first in range(0, tokens, piece):
        q, k, v = (four_billion.draw(first, piece, salt, DEVICE) for salt in (3, 1, 2))
        o = stream.read(q, k, v)
    errors = four_billion.drift(stream, tokens)
    assert errors[0] <= 1e-6 and max(errors[1:]) <= four_billion.BOUND
    expected = q[-1, 0].double() @ stream.total  # the total reaches the outputs
    assert float((o[-1, 0].double() - expected).norm() / expected.norm()) < 1e-2
    stream.total *= 1.001
    assert four_billion.drift(stream, tokens)[0] > 5e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs both devices")
def test_both_devices_draw_the_same_tokens() -> None:
    for first in (0, four_billion.PERIOD - 3, (1 << 32) - 64):
        drawn = [
            four_billion.draw(first, 64, 1, torch.device(name)).cpu() for name in ("cpu", "cuda")
        ]
        assert torch.equal(*drawn)
