"""States after 100,000 steps of decode and 4 million tokens of prefill, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.drift import SLOPES, decode, prefill

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The work is a long row of small products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.inference_mode()
@pytest.mark.parametrize("run", [decode, prefill])
def test_a_float32_state_stays_exact_at_every_slope(run) -> None:  # type: ignore[no-untyped-def]
    errors = run(torch.float32, 100_000 if run is decode else 4 << 20, DEVICE)
    assert len(errors) == len(SLOPES) and max(errors) < 2e-5


@torch.inference_mode()
@pytest.mark.parametrize("run", [decode, prefill])
def test_a_bfloat16_state_drifts_as_the_docs_say(run) -> None:  # type: ignore[no-untyped-def]
    """Bounded where the decay is quick; a long memory is lost, most of all token by token."""
    errors = dict(zip(SLOPES, run(torch.bfloat16, 100_000, DEVICE), strict=True))
    assert max(error for slope, error in errors.items() if slope >= 0.1) < 0.006
    assert max(errors.values()) < (0.4 if run is decode else 0.02)
    assert errors[4e-8] > errors[0.9]
