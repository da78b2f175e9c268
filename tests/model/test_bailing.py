"""Ring-linear: its fields, its two kinds of layers, and the decay that is a setting."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks.decay import compare
from model.config import ConfigError, Fields
from model.families.bailing import Bailing, BailingConfig, LightningMixer
from model.runner import ModelRunner
from model.weights import fingerprint
from server.engine.__main__ import load as engine_load
from server.settings import Settings
from tests.model.checkpoints import bailing, minimax, transnormer
from tests.model.harness import DEVICE, Sequence, load, logits_of, prompt


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qk_norm", False),
        ("use_bias", True),
        ("linear_silu", True),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_theta", True),
        ("partial_rotary_factor", float("inf")),
        ("rms_norm_eps", 0),
        ("score_function", "softmax"),
        ("moe_router_enable_expert_bias", False),
        ("num_nextn_predict_layers", 1),
        ("decay_layer_factor", "fla"),
        ("group_norm_size", 3),
        ("partial_rotary_factor", 1.5),
        ("n_group", 5),
        ("topk_group", 5),
        ("num_experts_per_tok", 9),
        ("layer_group_size", None),
    ],
)
def test_a_bad_config_names_the_field(tmp_path: Path, field: str, value: object) -> None:
    bailing.write(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ConfigError, match=f"{field} is {re.escape(repr(value))}"):
        load(tmp_path)


def test_rotary_fields_as_transformers_5_writes_them(tmp_path: Path) -> None:
    bailing.write(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    moved = {name: values.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    nested = values | {"rope_parameters": moved | {"rope_type": "default"}}
    assert BailingConfig.parse(Fields(nested)) == BailingConfig.parse(Fields(values | moved))


@pytest.mark.parametrize("other", ["BailingMoeV3ForCausalLM", "BailingMoeV2_5ForCausalLM"])
def test_relatives_under_the_same_model_type_are_refused(tmp_path: Path, other: str) -> None:
    bailing.write(tmp_path, architectures=[other])
    with pytest.raises(ConfigError, match=f"architecture '{other}' is not served"):
        load(tmp_path)


def test_softmax_closes_each_group_of_layers_and_takes_what_is_left_over(tmp_path: Path) -> None:
    bailing.write(tmp_path, num_hidden_layers=8, layer_group_size=3)
    assert model_of(load(tmp_path)).config.softmax == (0, 0, 1, 0, 0, 1, 1, 1)


def last_logits(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    return logits_of(runner, [Sequence(runner, ids, 0).chunk(len(ids))])[0]


@pytest.mark.parametrize("name", bailing.VARIANTS)
def test_the_decay_is_a_setting(tmp_path: Path, name: str) -> None:
    """The flag over config.json, config.json over the default; each with its oracle."""
    other = "hf" if name != "hf" else "mlx"
    oracle = bailing.write(tmp_path / "named", decay_layer_factor=name)
    bailing.write(tmp_path / "plain")
    bailing.write(tmp_path / "other", decay_layer_factor=other)
    ids = prompt(60)
    want = oracle(ids)[-1].float()
    for runner in (
        load(tmp_path / "named"),
        load(tmp_path / "plain", decay_layer_factor=name),
        load(tmp_path / "other", decay_layer_factor=name),
    ):
        torch.testing.assert_close(last_logits(runner, ids), want, atol=1e-4, rtol=1e-4)


def test_the_decays_differ(tmp_path: Path) -> None:
    bailing.write(tmp_path)
    runners = {name: load(tmp_path, decay_layer_factor=name) for name in bailing.VARIANTS}
    ids = prompt(60)
    logits = {name: last_logits(runner, ids) for name, runner in runners.items()}
    assert (logits["sglang"] - logits["hf"]).abs().max() > 1e-2
    assert (logits["mlx"] - logits["hf"]).abs().max() > 1e-3
    default = load(tmp_path)
    torch.testing.assert_close(last_logits(default, ids), logits["sglang"])
    assert default.capacity.fingerprint != runners["hf"].capacity.fingerprint


def test_the_flag_reaches_the_model(tmp_path: Path) -> None:
    bailing.write(tmp_path)
    settings = Settings(
        model=str(tmp_path),
        decay_layer_factor="hf",
        device="cpu",
        max_running=1,
        state_memory_gb=0.02,
    )
    runner = engine_load(settings)
    assert isinstance(runner, ModelRunner)
    assert model_of(runner).config.layer_factor == "hf"


def test_the_decays_can_be_compared_on_a_text(tmp_path: Path) -> None:
    ids, last = prompt(70), 20
    bailing.write(tmp_path / "model")
    options = {"device": DEVICE, "dtype": "float32", "state_memory_gb": 0.02}
    got = compare(tmp_path / "model", ids, last, max_step_tokens=32, **options)
    for name in bailing.VARIANTS:
        oracle = bailing.write(tmp_path / name, decay_layer_factor=name)
        rows = oracle(ids)[-last - 1 : -1].log_softmax(-1)
        want = rows.gather(1, torch.tensor(ids[-last:])[:, None]).mean()
        assert got[name] == pytest.approx(float(want), abs=1e-4)
    assert len(set(got.values())) == 3


def test_slopes_of_the_published_variants(tmp_path: Path) -> None:
    bailing.write(tmp_path, num_hidden_layers=20, layer_group_size=5)
    for name, factors in {
        "sglang": (1 + 1e-5, 18 / 19 + 1e-5, 1 / 19 + 1e-5),
        "hf": (20 / 19 + 1e-5, 1 + 1e-5, 2 / 19 + 1e-5),
        "mlx": (1 + 1e-5, 1 + 1e-5, 2 / 19 + 1e-5),
    }.items():
        mixers = model_of(load(tmp_path, decay_layer_factor=name)).mixers
        for i, factor in zip((0, 1, 18), factors, strict=True):
            mixer = mixers[i]
            assert isinstance(mixer, LightningMixer)
            want = [factor * 2.0**-e for e in (2, 4, 6, 8)]
            assert mixer.lightning.slopes.tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("family", [minimax, transnormer])
def test_other_families_have_one_decay(tmp_path: Path, family: object) -> None:
    family.write(tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="decay_layer_factor is 'hf', but only one is published"):
        load(tmp_path, decay_layer_factor="hf")


def test_a_fingerprint_tells_settings_apart(tmp_path: Path) -> None:
    bailing.write(tmp_path)
    assert fingerprint(tmp_path, "a") == fingerprint(tmp_path, "a") != fingerprint(tmp_path, "b")


def model_of(runner: ModelRunner) -> Bailing:
    assert isinstance(runner.model, Bailing)
    return runner.model
