"""States after 100,000 steps of decode and 4 million tokens of prefill, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.drift import SLOPES, decode, prefill

Drift = Callable[..., dict[torch.dtype, list[float]]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The work is a long row of small products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.inference_mode()
@pytest.mark.parametrize(("run", "tokens"), [(decode, 100_000), (prefill, 4 << 20)])
def test_states_drift_no_further_than_the_docs_say(run: Drift, tokens: int) -> None:
    """float32 is exact at every slope. bfloat16 is bounded where the decay is quick; a long memory
    is lost, most of all token by token."""
    errors = run((torch.float32, torch.bfloat16), tokens, DEVICE)
    exact = errors[torch.float32]
    assert len(exact) == len(SLOPES) and max(exact) < 2e-5
    small = dict(zip(SLOPES, errors[torch.bfloat16], strict=True))
    assert max(error for slope, error in small.items() if slope >= 0.1) < 0.006
    assert max(small.values()) < (0.4 if run is decode else 0.05)
    assert small[4e-8] > small[0.9]
