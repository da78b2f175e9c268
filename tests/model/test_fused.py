"""Decode steps whose products are one kernel with what surrounds them, a family each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.cases import skinny_everywhere
from tests.model.checkpoints import KINDS
from tests.model.harness import Sequence, load, logits_of, prompt

FORMS = {
    "native-hybrid": {"norm-silu", "norm", "gate", "plain", "norm-head"},
    "minimax-text-01": {"norm-silu", "norm", "gate", "plain", "norm-head"},
    "transnormer": {"norm-silu", "norm-mul", "gate", "plain", "norm-head"},
    "ring-linear": {"norm", "plain-silu_mul", "gate4", "plain", "norm-head"},
}
TEXTS = [prompt(40, seed=1), prompt(9, seed=2), prompt(21, seed=3)]
STEPS = 2


@pytest.mark.parametrize("kind", FORMS)
def test_one_kernel_for_few_rows_decodes_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of one sequence and of three, beside the oracle and beside kernels one by one."""
    pytest.importorskip("triton")
    oracle = KINDS[kind](tmp_path)
    runner = load(tmp_path)
    wants = [oracle(text)[-STEPS:].float() for text in TEXTS]

    def decode(slots: list[int]) -> torch.Tensor:
        sequences = [Sequence(runner, TEXTS[slot], slot) for slot in slots]
        for sequence in sequences:
            logits_of(runner, [sequence.chunk(len(sequence.ids) - STEPS)])
        return torch.stack(
            [logits_of(runner, [s.chunk(1) for s in sequences]) for _ in range(STEPS)]
        )

    separate = decode([0, 1, 2])
    met = skinny_everywhere(monkeypatch)
    fused = decode([0, 1, 2])
    assert {name.rpartition("-")[0] for name in met} == FORMS[kind]
    torch.testing.assert_close(fused, separate, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(fused, torch.stack(wants, 1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decode([0])[:, 0], wants[0], atol=1e-4, rtol=1e-4)
