"""The slopes, the frequencies."""

from __future__ import annotations

import math

import pytest
import torch

from model.layers import (
    alibi_slopes,
    geometric_slopes,
    layer_factor,
    rotary_frequencies,
)


def test_slopes_halve_from_head_to_head() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert geometric_slopes(20)[19] == 2.0**-8 and geometric_slopes(1)[0] == 2.0**-8


def test_slopes_of_other_head_counts_are_alibis() -> None:
    assert torch.equal(alibi_slopes(16), geometric_slopes(16))
    assert alibi_slopes(20)[:16].tolist() == [2.0 ** (-i / 2) for i in range(1, 17)]
    assert alibi_slopes(20)[16:].tolist() == [2.0 ** (-i / 4) for i in (1, 3, 5, 7)]
    assert alibi_slopes(40)[32:].tolist() == [2.0 ** (-i / 8) for i in range(1, 17, 2)]
    assert (alibi_slopes(20) - geometric_slopes(20)).abs().max() > 0.05


def test_the_last_layer_forgets_slowest() -> None:
    assert layer_factor(0, 80) == 1 + 1e-5 and layer_factor(0, 1) == 1 + 1e-5
    assert layer_factor(79, 80) == pytest.approx(1e-5, rel=1e-9)


def test_frequencies_are_exact_at_a_million_positions() -> None:
    got = rotary_frequencies(64, 1e7, torch.device("cpu"))
    for i, frequency in enumerate(got.tolist()):
        assert frequency == pytest.approx(1e7 ** (-2 * i / 64), rel=1e-13)
        assert math.cos(frequency * 10**6) == pytest.approx(
            math.cos(1e7 ** (-2 * i / 64) * 10**6), abs=1e-6
        )
