"""TransNormerLLM: its fields, its constant state, and positions that are each sequence's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from model.config import ConfigError
from tests.model.checkpoints import transnormer
from tests.model.harness import Sequence, load, logits_of, prompt


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("norm_type", "layernorm"),
        ("linear_act_fun", "elu"),
        ("glu_act", "swish"),
        ("bias", True),
        ("gate_dim", 16),
        ("hidden_dim", 66),
        ("linear_use_lrpe_list", []),
        ("linear_use_lrpe_list", [1, 0, 2]),
        ("no_scale_embedding", "yes"),
        ("decoder_layers", 0),
    ],
)
def test_a_bad_config_names_the_field(tmp_path: Path, field: str, value: object) -> None:
    transnormer.write(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ConfigError, match=f"{field} is {re.escape(repr(value))}"):
        load(tmp_path)


def test_the_state_is_all_that_a_sequence_keeps(tmp_path: Path) -> None:
    transnormer.write(tmp_path)
    capacity = load(tmp_path, ring=0).capacity
    assert (capacity.blocks, capacity.max_model_len) == (0, None)
    # layer 0 has keys of twice the width
    assert capacity.state_bytes == (2 + 1 + 1) * 4 * 16 * 16 * 4


def test_a_second_prompt_begins_at_position_0(tmp_path: Path) -> None:
    """A slot in which a longer sequence ran, and company at other positions, change nothing."""
    oracle = transnormer.write(tmp_path)
    runner = load(tmp_path)
    old, new, other = prompt(70, seed=1), prompt(9, seed=2), prompt(40, seed=3)
    first, company = Sequence(runner, old, 2), Sequence(runner, other, 5)
    logits_of(runner, [first.chunk(70), company.chunk(39)])
    second = Sequence(runner, new, 2)
    got = logits_of(runner, [company.chunk(1), second.chunk(9)])
    torch.testing.assert_close(got[0], oracle(other)[-1].float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1], oracle(new)[-1].float(), atol=1e-4, rtol=1e-4)


def test_a_tied_head_in_the_file_is_passed_over(tmp_path: Path) -> None:
    config, tensors, oracle = transnormer.make()
    tensors["lm_head.weight"] = torch.full_like(tensors["model.embed_tokens.weight"], torch.nan)
    transnormer.save(tmp_path, config, tensors)
    runner, ids = load(tmp_path), prompt(11)
    got = logits_of(runner, [Sequence(runner, ids, 0).chunk(11)])[0]
    torch.testing.assert_close(got, oracle(ids)[-1].float(), atol=1e-4, rtol=1e-4)
